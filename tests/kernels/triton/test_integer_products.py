"""Products of rounded activations on integer tensor cores: where they are taken, and the same bits as in float16."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from random_weights import random_weight
from torch import Tensor

from dibit.kernels.formats import Format, dequantize
from dibit.kernels.qlinear import quantize_activations
from dibit.kernels.triton import fused, layout
from dibit.kernels.triton.availability import INTERPRETER
from dibit.kernels.triton.layout import PLANE_COLUMNS, TritonQWeight, plane_shift
from dibit.kernels.triton.plan import INTEGER_TOKENS, Gpu, plan, takes_integers
from dibit.kernels.triton.qlinear import Prepared, multiply, plan_of, prepare, qlinear

MANY = INTEGER_TOKENS + 1
TAKEN = [
    Format(2, 128),
    Format(2, -1),
    Format(3, 64),
    Format(3, 128),
    Format(3, -1),
    Format(4, 64),
    Format(4, 128),
    Format(4, -1),
    Format(8, 32),
    Format(8, 64),
    Format(8, 128),
]


def taken(w: TritonQWeight, tokens: int, activation_bits: int | None) -> bool:
    return takes_integers(w.format, w.geometry, tokens, gpu=INTERPRETER, activation_bits=activation_bits)


def prepared_by_hand(x: Tensor, w: TritonQWeight, padded: int, *, integers: bool) -> Prepared:
    """What `prepare` makes of integers of which the largest of a row is 127, without the interpreter's time."""
    (tokens, k), geometry = x.shape, w.geometry
    made = Prepared.empty(w, tokens, padded, integers=integers)
    codes = torch.nn.functional.pad(x, (0, geometry.columns - k, 0, padded - tokens))
    planes = torch.arange(geometry.columns) % geometry.unit_columns // PLANE_COLUMNS
    shifts = torch.tensor([plane_shift(w.format.bits, p) for p in range(geometry.planes)])
    if integers:
        # Bytes of a word beside each other, fields of a byte 32 columns apart; at 3 bits neighbouring planes.
        fields_of_a_byte = 1 if w.format.bits == 3 else geometry.planes // 2
        fields = codes.view(padded, -1, 2, fields_of_a_byte, PLANE_COLUMNS)
        made.half.copy_(fields.permute(0, 1, 3, 4, 2).reshape(padded, -1))
    else:
        made.half.copy_(codes / 2.0 ** shifts[planes])
    made.sums.copy_(codes.view(padded, geometry.groups, -1).sum(2).T)
    made.factors.fill_(1.0)
    return made


@pytest.mark.parametrize("integers", [False, True])
@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_by_hand_is_what_the_kernel_prepares(bits: int, *, integers: bool) -> None:
    w = layout.pack(random_weight(64, 256, Format(bits, 128)))
    x = torch.randint(-127, 128, (2, 256)).float()
    x[:, 0] = 127.0
    found = prepare(x, w, padded_tokens=3, activation_bits=8, integers=integers)
    by_hand = prepared_by_hand(x, w, 3, integers=integers)
    assert found.integers == by_hand.integers == integers
    assert torch.equal(found.half, by_hand.half)
    assert torch.equal(found.sums, by_hand.sums)
    assert torch.equal(found.factors[:2], by_hand.factors[:2])


@pytest.mark.parametrize(
    ("format", "n", "tokens", "splits"),
    [
        (Format(2, 128), 100, MANY, 1),
        (Format(2, -1), 40, 70, 2),
        (Format(3, 64), 40, MANY, 2),
        (Format(3, 128), 100, 70, 1),
        (Format(3, -1), 40, MANY, 2),
        (Format(4, 64), 40, MANY, 2),
        (Format(4, 128), 100, MANY, 1),
        (Format(4, 128), 40, 70, 2),
        (Format(8, 32), 40, MANY, 1),
        (Format(4, -1), 100, MANY, 2),
        (Format(8, 64), 40, MANY, 2),
        (Format(8, 128), 100, 70, 1),
    ],
    ids=lambda v: v.name if isinstance(v, Format) else str(v),
)
def test_the_bits_of_the_float16_product(format: Format, n: int, tokens: int, splits: int) -> None:
    """Whatever is around the inner product is the same, and the inner product is exact in both."""
    k = 389 if format.group_size < 0 else 256 + format.group_size if format.bits == 3 else 256
    w = layout.pack(random_weight(n, k, format))
    # Whole ranges of integers, extremes of both signs included.
    x = torch.randint(-127, 128, (tokens, k)).float()
    x[:, 0], x[3], x[4] = 127.0, 127.0, -127.0
    bias, residual = torch.randn(n), torch.randn(tokens, n)
    found = {}
    for integers in (False, True):
        chosen = plan(w.geometry, w.padded_rows, tokens, gpu=INTERPRETER, integers=integers)
        run = -(-w.geometry.steps // splits)
        chosen = replace(chosen, splits=splits, run=run, partial=splits > 1 and tokens <= 64)
        padded = chosen.padded_tokens(tokens)
        made = prepared_by_hand(x, w, padded, integers=integers)
        y = torch.full((tokens, n), 1e30)
        found[integers] = multiply(made, w, chosen, y, bias=bias, residual=residual)
    assert torch.equal(found[True], found[False])


@pytest.mark.parametrize(
    ("format", "activation_bits"),
    [
        (Format(2, 128), 8),
        (Format(3, 128), 8),
        (Format(3, -1), 6),
        (Format(4, 128), 8),
        (Format(4, -1), 4),
        (Format(8, 128), 6),
    ],
    ids=lambda v: v.name if isinstance(v, Format) else str(v),
)
def test_a_token_is_the_same_among_few_and_many(format: Format, activation_bits: int) -> None:
    n, k = 60, 301 if format.group_size < 0 else 384 if format.bits == 3 else 256
    weight = random_weight(n, k, format)
    w = layout.pack(weight)
    x = torch.randn(MANY, k) * 10.0 ** torch.randint(-4, 5, (MANY, 1))
    x[5] = 0.0
    assert taken(w, MANY, activation_bits)
    many = qlinear(x, w, activation_bits=activation_bits, out=torch.full((MANY, n), 1e30))
    few = qlinear(x[:7], w, activation_bits=activation_bits)
    assert torch.equal(many[:7], few)
    rounded = quantize_activations(x, bits=activation_bits).double()
    want = rounded @ dequantize(weight).double().T
    assert float((many.double() - want).abs().amax() / want.abs().amax()) < 1e-5


def test_a_row_that_is_not_finite_becomes_nan_alone() -> None:
    w = layout.pack(random_weight(64, 128, Format(4, 128)))
    x = torch.randn(MANY, 128)
    x[1, 77], x[2, 5] = float("nan"), float("inf")
    y = qlinear(x, w, activation_bits=8)
    assert bool(y[1:3].isnan().all())
    assert bool(y[3:].isfinite().all())
    assert bool(y[0].isfinite().all())


def test_fused_ops_prepare_them_too() -> None:
    before, after = (
        layout.pack(random_weight(256, 128, Format(4, 128))),
        layout.pack(random_weight(64, 128, Format(4, 128))),
    )
    x = torch.randn(MANY, 128) / 1024
    integers = taken(before, MANY, 8)
    assert integers
    padded = plan_of(before, MANY, integers=integers).padded_tokens(MANY)
    gate_up = fused.product(prepare(x, before, padded_tokens=padded, activation_bits=8, integers=True), before, None)
    made = fused.silu_prepared(gate_up, after, activation_bits=8)
    assert made.integers
    assert not fused.room(after, MANY, None).integers
    y = fused.finished(fused.product(made, after, None))
    gate, up = qlinear(x, before, activation_bits=8).chunk(2, 1)
    want = qlinear(torch.nn.functional.silu(gate) * up, after, activation_bits=8)
    # An element at the border of two integers may go to the other one.
    torch.testing.assert_close(y, want, rtol=0.0, atol=float(want.abs().max()) * 0.01)
    assert float((y - want).abs().median()) <= float(want.abs().max()) * 1e-5


@pytest.mark.parametrize(
    ("format", "k", "tokens", "activation_bits", "expected"),
    [
        (Format(4, 128), 4096, MANY, 8, True),
        (Format(4, 128), 4096, MANY, None, False),
        (Format(4, 128), 4096, INTEGER_TOKENS, 8, False),
        (Format(4, -1), 8192, MANY, 8, True),
        (Format(4, -1), 11008, MANY, 8, False),
        (Format(4, -1), 11008, MANY, 6, True),
        (Format(4, 64), 4096, MANY, 8, True),
        (Format(4, 32), 4096, MANY, 8, False),
        (Format(8, 64), 4096, MANY, 8, True),
        (Format(8, 32), 4096, MANY, 8, True),
        (Format(8, -1), 4096, MANY, 8, False),
        (Format(2, 128), 4096, MANY, 8, True),
        (Format(2, 64), 4096, MANY, 8, False),
        (Format(2, -1), 11008, MANY, 8, True),
        (Format(3, 128), 4096, MANY, 4, True),
        (Format(3, 64), 4096, MANY, 8, True),
        (Format(3, 32), 4096, MANY, 8, False),
        (Format(3, -1), 11008, MANY, 8, True),
        (Format(3, -1), 28672, MANY, 8, False),
    ],
)
def test_where_they_are_taken(
    format: Format, k: int, tokens: int, activation_bits: int | None, *, expected: bool
) -> None:
    """Not where float32 could not hold a sum, nor where a step has several groups (at 3 bits, more than four)."""
    geometry = layout.Geometry.of(format, k)
    assert takes_integers(format, geometry, tokens, gpu=Gpu(28, 86), activation_bits=activation_bits) == expected


def test_where_float16_is_fast_short_groups_stay_there() -> None:
    taken_on = {
        weight.name: [
            arch
            for arch in (80, 86, 89, 90, 100, 120)
            if takes_integers(weight, layout.Geometry.of(weight, 4096), MANY, gpu=Gpu(100, arch), activation_bits=8)
        ]
        for weight in TAKEN
    }
    assert taken_on == {
        "int2-g128": [80, 86, 89, 100, 120],
        "int2-channel": [80, 86, 89, 90, 100, 120],
        "int3-g64": [86, 89, 120],
        "int3-g128": [80, 86, 89, 100, 120],
        "int3-channel": [80, 86, 89, 90, 100, 120],
        "int4-g64": [86, 89, 120],
        "int4-g128": [80, 86, 89, 100, 120],
        "int4-channel": [80, 86, 89, 90, 100, 120],
        "int8-g32": [86, 89, 120],
        "int8-g64": [86, 89, 120],
        "int8-g128": [80, 86, 89, 100, 120],
    }


def test_splits_are_those_of_the_float16_product() -> None:
    geometry = layout.Geometry.of(Format(4, 128), 4096)
    for gpu in (Gpu(108, 80), Gpu(132, 90), Gpu(148, 100)):
        for tokens in (33, 64, 65, 500):
            half, integer = (plan(geometry, 4096, tokens, gpu=gpu, integers=flag) for flag in (False, True))
            assert (half.splits, half.run, half.partial) == (integer.splits, integer.run, integer.partial)
