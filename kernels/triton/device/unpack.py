"""Planes of packed words as float16 values code * 2^(plane_shift - 24), for the layout of layout.py.

Each plane costs one AND for two weights, and one shift serves two planes: a masked field is read as a subnormal
float16, never converted. With ASM the words are taken as 32-bit registers that hold two neighbouring columns, which
is what a matrix instruction's operand is; LLVM does not find that pairing by itself and needs twice the instructions.
Without it the same is said in plain operations, which the interpreter can run.

Integer products take the words as bytes, so that every mask serves four weights. Which column a byte's field belongs to
is seen to beforehand: device/prepare.py puts activations where the fields want them.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def as_half(word):
    return word.to(tl.float16, bitcast=True)


@triton.jit
def planes_2(w, ASM: tl.constexpr):
    if ASM:
        return tl.inline_asm_elementwise(
            """{ .reg .b32 h, i, j;
            and.b32 $0, $8, 0x00030003; and.b32 $1, $8, 0x000c000c;
            shr.u32 h, $8, 4;  and.b32 $2, h, 0x00030003; and.b32 $3, h, 0x000c000c;
            shr.u32 i, $8, 8;  and.b32 $4, i, 0x00030003; and.b32 $5, i, 0x000c000c;
            shr.u32 j, $8, 12; and.b32 $6, j, 0x00030003; and.b32 $7, j, 0x000c000c; }""",
            "=&r,=&r,=&r,=&r,=&r,=&r,=&r,=&r,r",
            [w],
            dtype=(tl.float16,) * 8,
            is_pure=True,
            pack=2,
        )
    else:
        h = w >> 4
        i = w >> 8
        j = w >> 12
        return (
            as_half(w & 3),
            as_half(w & 12),
            as_half(h & 3),
            as_half(h & 12),
            as_half(i & 3),
            as_half(i & 12),
            as_half(j & 3),
            as_half(j & 12),
        )


@triton.jit
def planes_4(w, ASM: tl.constexpr):
    if ASM:
        return tl.inline_asm_elementwise(
            """{ .reg .b32 h;
            and.b32 $0, $4, 0x000f000f; and.b32 $1, $4, 0x00f000f0;
            shr.u32 h, $4, 8; and.b32 $2, h, 0x000f000f; and.b32 $3, h, 0x00f000f0; }""",
            "=&r,=&r,=&r,=&r,r",
            [w],
            dtype=(tl.float16,) * 4,
            is_pure=True,
            pack=2,
        )
    else:
        h = w >> 8
        return as_half(w & 0xF), as_half(w & 0xF0), as_half(h & 0xF), as_half(h & 0xF0)


@triton.jit
def planes_8(w, ASM: tl.constexpr):
    if ASM:
        return tl.inline_asm_elementwise(
            """{ .reg .b32 h;
            and.b32 $0, $2, 0x00ff00ff; shr.u32 h, $2, 8; and.b32 $1, h, 0x00ff00ff; }""",
            "=&r,=&r,r",
            [w],
            dtype=(tl.float16, tl.float16),
            is_pure=True,
            pack=2,
        )
    else:
        return as_half(w & 0xFF), as_half((w >> 8) & 0xFF)


@triton.jit
def planes_3(w, ASM: tl.constexpr):
    """The five whole planes of one word set."""
    if ASM:
        return tl.inline_asm_elementwise(
            """{ .reg .b32 h, i;
            and.b32 $0, $5, 0x00070007; and.b32 $1, $5, 0x00380038;
            shr.u32 h, $5, 6;  and.b32 $2, h, 0x00070007; and.b32 $3, h, 0x00380038;
            shr.u32 i, $5, 12; and.b32 $4, i, 0x00070007; }""",
            "=&r,=&r,=&r,=&r,=&r,r",
            [w],
            dtype=(tl.float16,) * 5,
            is_pure=True,
            pack=2,
        )
    else:
        h = w >> 6
        i = w >> 12
        return as_half(w & 7), as_half(w & 56), as_half(h & 7), as_half(h & 56), as_half(i & 7)


@triton.jit
def last_plane_3(a, b, c, ASM: tl.constexpr):
    """Plane 15: the top bits of three word sets."""
    if ASM:
        return tl.inline_asm_elementwise(
            """{ .reg .b32 x, y, z;
            shr.u32 x, $1, 15; and.b32 x, x, 0x00010001;
            shr.u32 y, $2, 14; and.b32 y, y, 0x00020002;
            shr.u32 z, $3, 13; and.b32 z, z, 0x00040004;
            or.b32 x, x, y; or.b32 $0, x, z; }""",
            "=r,r,r,r",
            [a, b, c],
            dtype=tl.float16,
            is_pure=True,
            pack=2,
        )
    else:
        return as_half(((a >> 15) & 1) | ((b >> 14) & 2) | ((c >> 13) & 4))


@triton.jit
def bytes_2(b, ASM: tl.constexpr):
    """The four fields of bytes of 2-bit codes, in order, as int8 codes."""
    if ASM:
        return tl.inline_asm_elementwise(
            """{ .reg .b32 i, j, k;
            and.b32 $0, $4, 0x03030303; shr.u32 i, $4, 2; and.b32 $1, i, 0x03030303;
            shr.u32 j, $4, 4; and.b32 $2, j, 0x03030303; shr.u32 k, $4, 6; and.b32 $3, k, 0x03030303; }""",
            "=&r,=&r,=&r,=&r,r",
            [b],
            dtype=(tl.int8,) * 4,
            is_pure=True,
            pack=4,
        )
    else:
        return b & 3, (b >> 2) & 3, (b >> 4) & 3, (b >> 6) & 3


@triton.jit
def bytes_4(b, ASM: tl.constexpr):
    """The two fields of bytes of 4-bit codes as int8 codes."""
    if ASM:
        return tl.inline_asm_elementwise(
            """{ .reg .b32 h;
            and.b32 $0, $2, 0x0f0f0f0f; shr.u32 h, $2, 4; and.b32 $1, h, 0x0f0f0f0f; }""",
            "=&r,=&r,r",
            [b],
            dtype=(tl.int8, tl.int8),
            is_pure=True,
            pack=4,
        )
    else:
        return b & 15, (b >> 4) & 15


@triton.jit
def bytes_8(b, ASM: tl.constexpr):
    """8-bit codes minus 128 as int8."""
    if ASM:
        return tl.inline_asm_elementwise(
            "xor.b32 $0, $1, 0x80808080;", "=r,r", [b], dtype=tl.int8, is_pure=True, pack=4
        )  # fmt: skip
    else:
        return b ^ -128


@triton.jit
def bytes_3(a, b, c, ASM: tl.constexpr):
    """Three word sets of 3-bit codes, as bytes, to int8 codes: field f has planes 2 f and 2 f + 1, the even one in the
    lower byte of each word."""
    if ASM:
        return tl.inline_asm_elementwise(
            """{ .reg .b32 s, t, u, v;
            shl.b32 s, $8, 5; and.b32 t, $8, 0x00070007; and.b32 s, s, 0x07000700; or.b32 $0, s, t;
            shr.u32 s, $8, 6; shr.u32 t, $8, 1;
            and.b32 s, s, 0x00070007; and.b32 t, t, 0x07000700; or.b32 $1, s, t;
            shr.u32 s, $8, 12; shl.b32 t, $9, 8;
            and.b32 s, s, 0x00070007; and.b32 t, t, 0x07000700; or.b32 $2, s, t;
            shr.u32 s, $9, 3; shl.b32 t, $9, 2;
            and.b32 s, s, 0x00070007; and.b32 t, t, 0x07000700; or.b32 $3, s, t;
            shr.u32 s, $9, 9; shr.u32 t, $9, 4;
            and.b32 s, s, 0x00070007; and.b32 t, t, 0x07000700; or.b32 $4, s, t;
            shl.b32 s, $10, 5; and.b32 t, $10, 0x00070007; and.b32 s, s, 0x07000700; or.b32 $5, s, t;
            shr.u32 s, $10, 6; shr.u32 t, $10, 1;
            and.b32 s, s, 0x00070007; and.b32 t, t, 0x07000700; or.b32 $6, s, t;
            shr.u32 s, $10, 12; shr.u32 t, $8, 7; shr.u32 u, $9, 6; shr.u32 v, $10, 5;
            and.b32 s, s, 0x00070007; and.b32 t, t, 0x01000100; or.b32 s, s, t;
            and.b32 u, u, 0x02000200; or.b32 s, s, u; and.b32 v, v, 0x04000400; or.b32 $7, s, v; }""",
            "=&r,=&r,=&r,=&r,=&r,=&r,=&r,=&r,r,r,r",
            [a, b, c],
            dtype=(tl.int8,) * 8,
            is_pure=True,
            pack=4,
        )
    else:
        high = (tl.arange(0, a.shape[1]) % 2 == 1)[None, :]
        a, b, c = both_bytes(a), both_bytes(b), both_bytes(c)
        tops = ((a >> 15) & 1) | ((b >> 14) & 2) | ((c >> 13) & 4)
        return (
            (tl.where(high, a >> 3, a) & 7).to(tl.int8),
            (tl.where(high, a >> 9, a >> 6) & 7).to(tl.int8),
            (tl.where(high, b, a >> 12) & 7).to(tl.int8),
            (tl.where(high, b >> 6, b >> 3) & 7).to(tl.int8),
            (tl.where(high, b >> 12, b >> 9) & 7).to(tl.int8),
            (tl.where(high, c >> 3, c) & 7).to(tl.int8),
            (tl.where(high, c >> 9, c >> 6) & 7).to(tl.int8),
            tl.where(high, tops, (c >> 12) & 7).to(tl.int8),
        )


@triton.jit
def both_bytes(b):
    """At each byte [rows, bytes] the whole word that it is of, as int32."""
    low, high = tl.split(tl.reshape(b, (b.shape[0], b.shape[1] // 2, 2)))
    word = (low.to(tl.int32) & 255) | ((high.to(tl.int32) & 255) << 8)
    return tl.reshape(tl.join(word, word), b.shape)
