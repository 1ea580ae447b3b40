"""Rotary embedding and the KV write: the reference against complex rotation, the C++ body against the reference."""

from __future__ import annotations

from dataclasses import dataclass, replace

import pytest
import torch
from torch import Tensor

from dibit.kernels import native
from dibit.kernels.contract import ContractError
from dibit.kernels.kv import CODES, FP8, head_dim, row_width
from dibit.kernels.rope import rope_kv_write_reference, rotate
from dibit.kernels.rope_cpu import rope_kv_write

NAN = float("nan")
DTYPES = [torch.float32, torch.float16, torch.bfloat16, FP8, torch.int8, torch.uint8]


@dataclass(frozen=True)
class Case:
    qkv: Tensor
    positions: Tensor
    cos: Tensor
    sin: Tensor
    k_cache: Tensor
    v_cache: Tensor
    slots: Tensor
    heads: int


def case(
    tokens: int,
    *,
    heads: int = 6,
    kv_heads: int = 2,
    d: int = 64,
    rotary: int = 64,
    block_size: int = 7,
    dtype: torch.dtype = torch.float32,
    positions: int = 50,
) -> Case:
    angles = torch.randn(positions, rotary // 2) * 10
    blocks = -(-tokens // block_size) + 3
    slots = torch.randperm(blocks * block_size)[:tokens]
    slots[1::5] = -1
    cache = torch.empty(blocks, kv_heads, block_size, row_width(d, dtype), dtype=dtype)
    cache.fill_(NAN if dtype.is_floating_point else 0x7F)
    return Case(
        torch.randn(tokens, (heads + 2 * kv_heads) * d) * 50,
        torch.randint(0, positions, (tokens,)),
        angles.cos(),
        angles.sin(),
        cache,
        cache.clone(),
        slots,
        heads,
    )


def raw(x: Tensor) -> Tensor:
    """The bits, so that poison equals poison."""
    return x.view(torch.uint8)


def run_both(c: Case) -> Tensor:
    """Runs the C++ body and the reference on copies of the cache: same q, same bits everywhere in the caches."""
    ours = replace(c, k_cache=c.k_cache.clone(), v_cache=c.v_cache.clone())
    theirs = replace(c, k_cache=c.k_cache.clone(), v_cache=c.v_cache.clone())
    memory = torch.full((c.qkv.shape[0] + 2, c.heads * head_dim(c.k_cache)), NAN)
    memory[0] = memory[-1] = 7.0
    q = memory[1:-1]
    assert rope_kv_write(*vars(ours).values(), out=q) is q
    assert memory[0].eq(7.0).all()
    assert memory[-1].eq(7.0).all()
    torch.testing.assert_close(q, rope_kv_write_reference(*vars(theirs).values()), rtol=0, atol=0, equal_nan=True)
    assert torch.equal(raw(ours.k_cache), raw(theirs.k_cache))
    assert torch.equal(raw(ours.v_cache), raw(theirs.v_cache))
    return q


def test_reference_rotates_pairs_as_complex_numbers() -> None:
    angles = torch.randn(5, 4)
    x = torch.randn(5, 3, 11)
    turned = torch.complex(x[..., :4], x[..., 4:8]) * torch.polar(torch.ones(5, 4), angles)[:, None]
    expected = torch.cat([turned.real, turned.imag, x[..., 8:]], -1)
    torch.testing.assert_close(rotate(x, angles.cos(), angles.sin()), expected)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    ("d", "rotary"), [(64, 64), (128, 128), (80, 32), (20, 20), (20, 10), (6, 2), (5, 0), (72, 72)]
)
@pytest.mark.parametrize("tokens", [0, 1, 13])
def test_equals_the_reference(isa: str, tokens: int, d: int, rotary: int, dtype: torch.dtype) -> None:
    if d % 2 and dtype in CODES:
        with pytest.raises(ContractError, match="an even head dim"):
            row_width(d, dtype)
        return
    run_both(case(tokens, d=d, rotary=rotary, dtype=dtype))


@pytest.mark.parametrize("threads", [1, 2, 3])
def test_many_tokens_on_threads(isa: str, threads: int) -> None:
    native.set_threads(threads)
    run_both(case(301, block_size=16, dtype=torch.float16))


@pytest.mark.parametrize("dtype", DTYPES[1:], ids=str)
def test_rounding_to_the_cache_is_torchs(isa: str, dtype: torch.dtype) -> None:
    """Ties, subnormals, overflow, infinities, through v, which is stored unrotated."""
    steps = torch.arange(0, 1 << 16, 5, dtype=torch.int32)
    values = torch.cat(
        [(steps << 16 | low).view(torch.float32) for low in (0, 1, 0xFFF, 0x1000, 0x1001, 0x7FFF, 0x8000, 0xFFFF)]
    )
    # Other types keep what they can of a NaN's bits.
    values = values if dtype == FP8 else values[~values.isnan()]
    fine = torch.arange(-4100, 4100) * 2.0**-26
    values = torch.cat([values, fine, torch.tensor([65504.0, 65519.9, 65520.0, -65520.0])])
    d = 64
    tokens = -(-values.numel() // d)
    c = case(tokens, heads=1, kv_heads=1, d=d, rotary=0, block_size=16, dtype=dtype)
    c.qkv[:, 2 * d :] = torch.nn.functional.pad(values, (0, tokens * d - values.numel())).view(tokens, d)
    c.slots.copy_(torch.arange(tokens))
    run_both(c)


def test_nan_and_infinity_reach_what_they_rotate_into(isa: str) -> None:
    c = case(3, d=20, rotary=16, dtype=torch.float16)
    c.slots.copy_(torch.arange(3))
    for column, hit in ((2, [2, 10]), (10, [2, 10]), (17, [17])):
        for value in (NAN, torch.inf):
            dirty = c.qkv.clone()
            dirty[1, 20 + column] = value
            q = run_both(replace(c, qkv=dirty))
            assert (~q.isfinite()).nonzero().tolist() == [[1, 20 + i] for i in hit]


def test_a_token_alone_gives_the_same_bits(isa: str) -> None:
    c = case(9)
    together = run_both(c)
    for t in range(9):
        row = slice(t, t + 1)
        alone = replace(c, qkv=c.qkv[row], positions=c.positions[row], slots=c.slots[row])
        assert torch.equal(run_both(alone), together[row])


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("positions", 50, "tables cover 0 to 49"),
        ("positions", -1, "tables cover"),
        ("slots", 28, "cache has 0 to 27"),
        ("slots", -2, "cache has"),
        ("slots", 1 << 40, "cache has"),
    ],
)
def test_what_would_write_outside_is_refused_whole(isa: str, field: str, value: int, message: str) -> None:
    c = case(4)
    getattr(c, field)[3] = value
    out = torch.full((4, 6 * 64), NAN)
    with pytest.raises(native.NativeError, match=message):
        rope_kv_write(*vars(c).values(), out=out)
    assert out.isnan().all()
    assert c.k_cache.isnan().all()
    assert c.v_cache.isnan().all()


def test_wrong_tensors_are_refused() -> None:
    c = case(4)
    bad = [
        replace(c, qkv=c.qkv.double()),
        replace(c, qkv=c.qkv[:, :-1].contiguous()),
        replace(c, qkv=c.qkv.repeat(1, 2)[:, ::2]),
        replace(c, heads=5),
        replace(c, positions=c.positions.int()),
        replace(c, positions=c.positions[:3]),
        replace(c, slots=c.slots.int()),
        replace(c, slots=c.slots.repeat(2)[::2]),
        replace(c, cos=c.cos.double()),
        replace(c, sin=c.sin[:-1]),
        replace(c, cos=torch.ones(50, 33), sin=torch.ones(50, 33)),
        replace(c, k_cache=c.k_cache.double(), v_cache=c.v_cache.double()),
        replace(c, v_cache=c.v_cache.half()),
        replace(c, v_cache=c.v_cache[:-1]),
        replace(c, k_cache=c.k_cache.transpose(1, 2), v_cache=c.v_cache.transpose(1, 2)),
    ]
    for wrong in bad:
        with pytest.raises(ContractError, match="rope_kv_write"):
            rope_kv_write(*vars(wrong).values())
    with pytest.raises(ContractError, match="out"):
        rope_kv_write(*vars(c).values(), out=torch.empty(4, 6 * 64 + 1))
