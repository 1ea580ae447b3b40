"""How low-bit weights are represented, and the only place that knows the order of bits.

A quantized weight is a `QTensor`: unsigned integer codes, and one zero point and one scale for every group of
`group_size` consecutive input columns of a row:

    w[n, k] = (codes[n, k] - z[n, k // G]) * scales[n, k // G]

The zero field is as wide as a code, c in [0, 2^bits - 1], and the format says what z it stands for:

    integer      z = c, what every exchange format means
    fractional   z = 1 + c / 3 at 2 bits, z = 2.25 + 5 c / 14 at 3 bits: the same number of values in the middle of
                 the code range, where the best zero points of real weights lie. Less error for no bit and no time

Every quantization method ends in a QTensor, every on-disk format is a pair of functions to and from it, and every
backend has one function from it to a layout of its own.

The packed form shared by GPTQ, EfficientQAT and compressed-tensors is a dense stream of bits, least significant
bit first, cut into 32-bit words:

    2 bits   |c15 ...  c2  c1  c0|                          16 codes a word
    4 bits   |c7 ... c2 c1 c0|                               8 codes a word
    8 bits   |c3 c2 c1 c0|                                   4 codes a word
    3 bits   |c10.. c9 ... c1 c0| |c21. c20 ... c11 .c10| |c31 ... c22 ..c21|    32 codes in 3 words;
             codes 10 and 21 straddle a word border (GPTQ's layout)
"""

from __future__ import annotations

import struct
import sys
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

BITS = (2, 3, 4, 8)
GROUP_SIZES = (-1, 16, 32, 64, 128)
PER_CHANNEL = -1

ZeroGrid = Literal["integer", "fractional"]
ZERO_GRIDS: tuple[ZeroGrid, ...] = ("integer", "fractional")
# Least value and step of z by bits.
_FRACTIONAL = {2: (1.0, 1 / 3), 3: (2.25, 5 / 14)}
FRACTIONAL_BITS = tuple(_FRACTIONAL)


class FormatError(ValueError):
    """A weight or a format that this code cannot represent; the message says what was found and what is allowed."""


@dataclass(frozen=True)
class Format:
    """Bits per code, columns per group (-1: one group a row) and how the zero field is read.

    zero_grid  the values of z that the zero field stands for (module docstring); "fractional" at 2 and 3 bits only
    """

    bits: int
    group_size: int
    zero_grid: ZeroGrid = "integer"

    def __post_init__(self) -> None:
        if self.bits not in BITS:
            raise FormatError(f"{self.bits} bits per weight; supported: {', '.join(map(str, BITS))}")
        if self.group_size not in GROUP_SIZES:
            allowed = ", ".join(map(str, GROUP_SIZES))
            raise FormatError(f"group size {self.group_size}; supported: {allowed} (-1 is one group per row)")
        if self.zero_grid not in ZERO_GRIDS:
            raise FormatError(f"zero grid {self.zero_grid!r}; supported: {', '.join(ZERO_GRIDS)}")
        if self.zero_grid == "fractional" and self.bits not in FRACTIONAL_BITS:
            allowed = " and ".join(map(str, FRACTIONAL_BITS))
            raise FormatError(f"fractional zero points at {self.bits} bits; they exist at {allowed} bits")

    @property
    def qmax(self) -> int:
        return (1 << self.bits) - 1

    @property
    def name(self) -> str:
        group = "channel" if self.group_size == PER_CHANNEL else f"g{self.group_size}"
        return f"int{self.bits}-{group}{'-fractional' if self.zero_grid == 'fractional' else ''}"

    @property
    def zero_range(self) -> tuple[float, float]:
        """The least and the largest z."""
        first, step = self.zero_line
        return first, first + step * self.qmax

    @property
    def zero_line(self) -> tuple[float, float]:
        """(z of field 0, step): field c stands for z = first + step * c."""
        return _FRACTIONAL[self.bits] if self.zero_grid == "fractional" else (0.0, 1.0)

    def groups(self, k: int) -> int:
        """Number of groups in a row of `k` columns. Raises FormatError when they do not come out even."""
        if self.group_size == PER_CHANNEL:
            return 1
        if k % self.group_size:
            raise FormatError(
                f"{k} input columns do not divide into groups of {self.group_size}; "
                f"choose a group size that divides {k}, or -1 for one group per row"
            )
        return k // self.group_size

    def columns_per_group(self, k: int) -> int:
        return k // self.groups(k)

    def bits_per_weight(self, k: int, scale_bits: int = 16) -> float:
        """Average stored bits of a weight with `k` input columns: codes, plus a scale and a zero point per group."""
        return self.bits + (self.bits + scale_bits) / self.columns_per_group(k)

    def ranges(self, w: Tensor, *, symmetric: bool = False) -> tuple[Tensor, Tensor]:
        """Min-max scales and zero fields of `w`.

        w        [N, K] float
        returns  scales [N, K/G] float32, already rounded to float16 (the precision on disk), zeros [N, K/G] uint8

        The range always includes 0, so that z fits its field and, on the integer grid, zero is exact (what GPTQ
        does). A group of zeros gets scale 1. `symmetric` puts z at the middle, 2^(bits-1), and covers
        [-max|w|, max|w|]; FormatError on the fractional grid, which has no middle. On the fractional grid the scale
        is the least under which some z covers every weight.
        """
        n, k = w.shape
        grouped = w.float().reshape(n, self.groups(k), self.columns_per_group(k))
        hi = grouped.amax(dim=2).clamp_min(0)
        lo = grouped.amin(dim=2).clamp_max(0)
        if self.zero_grid == "fractional":
            return self._covering(lo, hi, symmetric=symmetric)
        if symmetric:
            bound = torch.maximum(hi, -lo)
            scales = bound * 2 / self.qmax
        else:
            scales = (hi - lo) / self.qmax
        scales = round_scales(scales)
        if symmetric:
            zeros = torch.full_like(scales, 1 << (self.bits - 1))
        else:
            zeros = torch.round(-lo / scales).clamp(0, self.qmax)
        return scales, zeros.to(torch.uint8)

    def _covering(self, lo: Tensor, hi: Tensor, *, symmetric: bool) -> tuple[Tensor, Tensor]:
        if symmetric:
            raise FormatError("symmetric weights on the fractional zero grid; choose one of the two")
        z = zero_points(torch.arange(self.qmax + 1, dtype=torch.uint8, device=lo.device), self)
        scales, zeros = torch.maximum(-lo[..., None] / z, hi[..., None] / (self.qmax - z)).min(dim=-1)
        return round_scales(scales), zeros.to(torch.uint8)

    def encode(self, w: Tensor, scales: Tensor, zeros: Tensor) -> QTensor:
        """Round `w` [N, K] to the nearest code under given `scales` and zero fields [N, K/G]."""
        n, k = w.shape
        grouped = w.float().reshape(n, self.groups(k), self.columns_per_group(k))
        ratio, z = grouped / scales.float()[..., None], zero_points(zeros, self)[..., None]
        # An integer z is added after rounding: ties go as without it.
        q = torch.round(ratio + z) if self.zero_grid == "fractional" else torch.round(ratio) + z
        codes = q.clamp(0, self.qmax).to(torch.uint8).reshape(n, k)
        return QTensor(codes=codes, zeros=zeros, scales=scales, format=self)


def round_scales(scales: Tensor) -> Tensor:
    """Scales as a checkpoint stores them: float16 values (kept in float32), never 0 or subnormal, never infinite.

    Codes must be computed from the rounded scale, or the stored weight differs from the one that was measured.
    """
    tiny = torch.finfo(torch.float16).tiny
    scales = torch.where(scales == 0, torch.ones_like(scales), scales)
    return scales.clamp(tiny, torch.finfo(torch.float16).max).to(torch.float16).float()


def zero_points(zeros: Tensor, format: Format) -> Tensor:
    """What zero fields stand for: uint8 of any shape -> z float32 of that shape.

    With the two numbers of the line as float32, z = first + step * c rounded once (a fused multiply-add).
    """
    if format.zero_grid == "integer":
        return zeros.float()
    first, step = (struct.unpack("f", struct.pack("f", value))[0] for value in format.zero_line)
    z: Tensor = zeros.double() * step + first
    return z.float()


def zero_fields(z: Tensor, format: Format) -> Tensor:
    """The fields whose values are nearest to z, float of any shape -> uint8; the inverse of `zero_points`."""
    first, step = format.zero_line
    return torch.round((z.double() - first) / step).clamp_(0, format.qmax).to(torch.uint8)


@dataclass(frozen=True)
class QTensor:
    """A quantized weight of a linear layer, N outputs and K inputs.

    codes   uint8 [N, K]     in [0, 2^bits - 1]
    zeros   uint8 [N, K/G]   in [0, 2^bits - 1], the zero fields; `zero_points` has what they stand for
    scales  float16 or float32 [N, K/G]
    """

    codes: Tensor
    zeros: Tensor
    scales: Tensor
    format: Format

    def __post_init__(self) -> None:
        if self.codes.dim() != 2:
            raise FormatError(f"codes of shape {tuple(self.codes.shape)}; expected [N, K]")
        n, k = self.codes.shape
        expected = (n, self.format.groups(k))
        for name, tensor in (("zeros", self.zeros), ("scales", self.scales)):
            if tuple(tensor.shape) != expected:
                raise FormatError(
                    f"{name} of shape {tuple(tensor.shape)} for codes [{n}, {k}] in {self.format.name}; "
                    f"expected {expected}"
                )
        for name, tensor in (("codes", self.codes), ("zeros", self.zeros)):
            if tensor.dtype != torch.uint8:
                raise FormatError(f"{name} of type {tensor.dtype}; expected torch.uint8")
        if self.scales.dtype not in (torch.float16, torch.float32):
            raise FormatError(f"scales of type {self.scales.dtype}; expected float16 or float32")

    @property
    def shape(self) -> tuple[int, int]:
        return self.codes.shape[0], self.codes.shape[1]

    def rows(self, start: int, stop: int) -> QTensor:
        """The weight restricted to output rows start:stop (a view)."""
        return QTensor(self.codes[start:stop], self.zeros[start:stop], self.scales[start:stop], self.format)


def concat_rows(parts: list[QTensor]) -> QTensor:
    """Stack weights of one format on their output dimension (fused QKV, gate/up)."""
    formats = {p.format for p in parts}
    if len(formats) != 1:
        raise FormatError(f"cannot fuse weights of different formats: {sorted(f.name for f in formats)}")
    return QTensor(
        codes=torch.cat([p.codes for p in parts]),
        zeros=torch.cat([p.zeros for p in parts]),
        scales=torch.cat([p.scales for p in parts]),
        format=parts[0].format,
    )


def dequantize(q: QTensor) -> Tensor:
    """The float32 weight [N, K] that a QTensor stands for."""
    n, k = q.shape
    groups = q.format.groups(k)
    codes = q.codes.reshape(n, groups, -1).float()
    return ((codes - zero_points(q.zeros, q.format)[..., None]) * q.scales.float()[..., None]).reshape(n, k)


def pack_stream(codes: Tensor, bits: int) -> Tensor:
    """Pack the last axis into the dense bit stream of the module docstring.

    codes    uint8 [..., n], n * bits a multiple of 32, values < 2^bits
    returns  int32 [..., n * bits / 32]
    """
    n = codes.shape[-1]
    if (n * bits) % 32:
        raise FormatError(f"{n} codes of {bits} bits do not fill whole 32-bit words")
    period_codes, period_words = _period(bits)
    cells = codes.reshape(*codes.shape[:-1], n // period_codes, period_codes).to(torch.int64)
    words = torch.zeros(*cells.shape[:-1], period_words, dtype=torch.int64, device=codes.device)
    for i in range(period_codes):
        word, shift = divmod(i * bits, 32)
        words[..., word] |= (cells[..., i] << shift) & 0xFFFFFFFF
        if shift + bits > 32:
            words[..., word + 1] |= cells[..., i] >> (32 - shift)
    signed = torch.where(words >= 1 << 31, words - (1 << 32), words)
    return signed.to(torch.int32).reshape(*codes.shape[:-1], n * bits // 32)


def unpack_stream(words: Tensor, bits: int) -> Tensor:
    """Inverse of pack_stream: int32 [..., W] -> uint8 [..., W * 32 / bits]."""
    period_codes, period_words = _period(bits)
    if words.shape[-1] % period_words:
        raise FormatError(f"{words.shape[-1]} words do not hold a whole number of {bits}-bit codes")
    mask = (1 << bits) - 1
    if 8 % bits == 0 and sys.byteorder == "little":
        # Whole codes in every byte, the bytes in the order of the stream: one pass over bytes.
        shifts = torch.arange(0, 8, bits, dtype=torch.uint8, device=words.device)
        fields = words.reshape(-1).contiguous().view(torch.uint8)[:, None] >> shifts
        return fields.bitwise_and_(mask).reshape(*words.shape[:-1], words.shape[-1] * 32 // bits)
    cells = words.reshape(*words.shape[:-1], words.shape[-1] // period_words, period_words)
    codes = torch.empty(*cells.shape[:-1], period_codes, dtype=torch.uint8, device=words.device)
    for i in range(period_codes):
        word, shift = divmod(i * bits, 32)
        # An arithmetic shift of a negative int32 brings in ones from above; masking to what the word holds of the
        # field removes them.
        held = min(bits, 32 - shift)
        value = (cells[..., word] >> shift) & ((1 << held) - 1)
        if held < bits:
            value = value | (cells[..., word + 1] << held)
        codes[..., i] = (value & mask).to(torch.uint8)
    return codes.reshape(*words.shape[:-1], words.shape[-1] * 32 // bits)


def _period(bits: int) -> tuple[int, int]:
    """Smallest run of codes that fills whole words: (codes, words)."""
    return (32, 3) if bits == 3 else (32 // bits, 1)
