"""Matrices at v and o and rotations at q and k change nothing before rounding, and stay invertible while they learn."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from random_blocks import random_block, run, sizes
from torch import Tensor

from dibit.engine.models.decoder import Block, FloatLinear
from dibit.engine.models.rope import Llama3, Rope, Yarn
from dibit.kernels.formats import Format
from dibit.quantize.fold import copied
from dibit.quantize.transforms import Mixing, PairTurning, ValueMixing, mix_values, turn_pairs

HEADS = [(6, 2), (4, 4), (4, 1)]


def difference(found: Block, expected: Block, x: Tensor) -> float:
    wanted = run(expected, x)
    return float((run(found, x) - wanted).norm() / wanted.norm())


def inputs(block: Block) -> Tensor:
    return torch.randn(2, 11, block.sizes.hidden, generator=torch.Generator().manual_seed(1))


def weight(block: Block, key: str) -> Tensor:
    linear: Any = block.linears[key]
    found: Tensor = linear.weight
    return found


@pytest.mark.parametrize("heads", HEADS, ids=str)
def test_matrices_between_v_and_o_change_nothing(heads: tuple[int, int]) -> None:
    block = random_block(sizes(*heads))
    rng = torch.Generator().manual_seed(2)
    matrices = torch.randn(heads[1], 16, 16, generator=rng, dtype=torch.float64)
    mixed = copied(block)
    mix_values(mixed, matrices)
    assert difference(mixed, block, inputs(block)) < 1e-5
    start = block.sizes.q_width + block.sizes.kv_width
    assert torch.equal(weight(mixed, "qkv")[:start], weight(block, "qkv")[:start])
    assert not torch.allclose(weight(mixed, "qkv")[start:], weight(block, "qkv")[start:], atol=0.1)
    assert not torch.allclose(weight(mixed, "o"), weight(block, "o"), atol=0.1)


ROPES = [
    Rope(1e4, 16),
    Rope(1e4, 8),
    Rope(1e4, 16, Llama3(8.0, 1.0, 4.0, 32)),
    Rope(1e4, 16, Yarn(4.0, 32, attention_factor=1.2)),
]


@pytest.mark.parametrize("rope", ROPES, ids=["plain", "partial", "llama3", "yarn"])
@pytest.mark.parametrize("heads", HEADS, ids=str)
def test_rotated_and_scaled_pairs_commute_with_rope(heads: tuple[int, int], rope: Rope) -> None:
    block = random_block(dataclasses.replace(sizes(*heads), rope=rope))
    rng = torch.Generator().manual_seed(3)
    angles, logarithms = (torch.randn(heads[1], rope.dim // 2, generator=rng) for _ in range(2))
    turned = copied(block)
    turn_pairs(turned, angles, logarithms)
    assert difference(turned, block, inputs(block)) < 1e-5
    end = block.sizes.q_width + block.sizes.kv_width
    assert torch.equal(weight(turned, "qkv")[end:], weight(block, "qkv")[end:])
    assert not torch.allclose(weight(turned, "qkv")[:end], weight(block, "qkv")[:end], atol=0.1)


def test_a_matrix_at_q_and_k_that_is_no_rotation_of_pairs_is_seen() -> None:
    """The test above can fail: neighbours instead of halves, and scales that differ within a pair."""
    block = random_block(sizes(6, 2))
    own: Any = block.linears["qkv"]
    scales = torch.ones(own.weight.shape[0], 1)
    scales[:96:2], scales[96:128:2] = 0.5, 2.0
    paired, single = copied(block), copied(block)
    turn_pairs(paired, torch.zeros(2, 8), torch.tensor([0.0, 1.0]).repeat(2, 4))
    assert difference(paired, block, inputs(block)) < 1e-5
    scales[8:16], scales[104:112] = 1.0, 1.0
    single.linears["qkv"] = FloatLinear(own.weight * scales, own.bias * scales[:, 0])
    assert difference(single, block, inputs(block)) > 0.01


def test_scaled_pairs_alone_change_no_code() -> None:
    block = random_block(sizes(6, 2))
    scaled = copied(block)
    turn_pairs(scaled, torch.zeros(2, 8), torch.tensor([0.7, -2.1]).repeat(2, 4))
    chosen = Format(3, 16)
    codes = [chosen.encode(w, *chosen.ranges(w)).codes for w in (weight(block, "qkv"), weight(scaled, "qkv"))]
    assert float((codes[0] != codes[1]).float().mean()) < 0.01


def moved(mixing: Mixing, *, steps: int, size: float = 0.05) -> list[Tensor]:
    """Gradient signs of a steady pull, taken `steps` times."""
    taken = []
    for _ in range(steps):
        mixing.matrices().sum().backward()  # type: ignore[no-untyped-call]
        gradient = mixing.beside.grad
        assert gradient is not None
        taken.append(gradient.clone())
        mixing.beside.grad = None
        with torch.no_grad():
            mixing.beside += size * gradient.sign()
            mixing.project()
    return taken


def test_the_band_grows_from_beside_the_diagonal_to_everything() -> None:
    mixing = Mixing(2, 9, rate=0.1, stability=0.5, stages=4, steps=8)
    assert torch.equal(mixing.matrices().detach(), torch.eye(9, dtype=torch.float64).expand(2, 9, 9))
    distance = (torch.arange(9)[:, None] - torch.arange(9)).abs()
    reached = [2, 2, 4, 4, 6, 6, 8, 8]
    for gradient, reach in zip(moved(mixing, steps=8), reached, strict=True):
        expected = 0.5 * ((distance > 0) & (distance <= reach)).double()
        assert torch.equal(gradient, expected.expand(2, 9, 9))
    assert float(mixing.beside.detach().diagonal(dim1=1, dim2=2).abs().max()) == 0
    whole = mixing.matrices().detach().clone()
    mixing.groups()
    assert torch.equal(mixing.matrices().detach(), whole), "a training that begins anew changed the matrix"
    assert int((moved(mixing, steps=1)[0][0] != 0).sum()) < 9 * 8


@pytest.mark.parametrize("stages", [1, 3, 20])
def test_any_number_of_stages_ends_with_everything(stages: int) -> None:
    mixing = Mixing(1, 5, rate=0.1, stability=1.0, stages=stages, steps=max(stages, 7))
    assert int((moved(mixing, steps=max(stages, 7))[-1][0] != 0).sum()) == 20


def test_matrices_stay_diagonally_dominant_and_it_is_told() -> None:
    mixing = Mixing(2, 16, rate=0.1, stability=1.0, stages=1, steps=50)
    assert mixing.condition() == (1.0, 1.0)
    moved(mixing, steps=50)
    dominance, condition = mixing.condition()
    assert dominance == pytest.approx(0.1)
    assert 1.5 < condition < 40
    matrix = mixing.matrices()[0].detach()
    assert float((matrix.diagonal() - (matrix - torch.eye(16)).abs().sum(dim=1)).min()) == pytest.approx(0.1)
    assert "at least 0.100" in mixing.note("x")
    assert "times" in mixing.note("x")


@pytest.mark.parametrize("steps", [0, 30])
def test_learned_transforms_begin_as_nothing_and_stay_exact(steps: int) -> None:
    block = random_block(sizes(6, 2))
    mixing = Mixing(2, 16, rate=0.1, stability=1.0, stages=2, steps=30)
    pairs = PairTurning(block.sizes, rate=0.1)
    rng = torch.Generator().manual_seed(4)
    transforms: Sequence[Any] = [ValueMixing(mixing), pairs]
    with torch.no_grad():
        for _ in range(steps):
            for parameter in (mixing.beside, pairs.angles):
                parameter += 0.02 * torch.randn(parameter.shape, generator=rng, dtype=parameter.dtype)
            mixing.project()
        folded = copied(block)
        for transform in transforms:
            transform.fold(folded)
        assert difference(folded, block, inputs(block)) < 1e-5
        unchanged = torch.allclose(weight(folded, "qkv"), weight(block, "qkv"), atol=1e-6)
        assert unchanged == (steps == 0)
