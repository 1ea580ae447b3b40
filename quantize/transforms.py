"""Affine changes of a block's inner coordinates that merge into its weights: the block computes the same.

    values   a matrix A [D, D] for every kv head between v and o: v' = v A⁻¹, and o's columns meet A of their kv head.
             Attention is linear in v, and the query heads that read a kv head share its matrix
    pairs    a rotation (and a scale) for every pair of dimensions (j, j + D/2) of k, and of the q that reads it. RoPE
             rotates the same pairs, and rotations of a plane commute: this is all of the affine group that RoPE leaves
             to q and k

Both mix rows of the weights, which clipping and scales cannot do. `ValueMixing` and `PairTurning` learn them.

A matrix is I + α (mask ∘ B), with B zero at first and on the diagonal (scales are learned elsewhere, fold.py). The
mask is a band that grows from the diagonal to the whole matrix, and α, the stability factor, makes B's steps small
(Ma, Li, Zheng, Ling, Xiao, Wang, Wen, Chao and Ji, "AffineQuant", ICLR 2024). Their theorem needs strict diagonal
dominance, which steps of Adam do not respect; here the off-diagonal weight of every row is kept below 1, so that the
matrix can always be inverted. It is solved with in float64.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Protocol, cast

import torch
from torch import Tensor

from dibit.engine.models.decoder import Block, FloatLinear
from dibit.engine.models.spec import Sizes
from dibit.quantize.trainer import Group

# The sum of magnitudes beside the diagonal that a row may have, where the diagonal is 1: the inverse is then bounded
# by 1 / (1 - 0.9) in the largest row sum.
MOST_BESIDE = 0.9


class Transform(Protocol):
    """A learned change of coordinates."""

    def groups(self) -> Sequence[Group]: ...

    def fold(self, block: Block) -> None:
        """Put it into the weights of `block`, a copy; differentiable."""
        ...

    def project(self) -> None:
        """After a step."""
        ...

    def notes(self) -> Sequence[str]:
        """What is to be known about the learned state."""
        ...


def mix_values(block: Block, matrices: Tensor) -> None:
    """v' = v A⁻¹ and W_o' = W_o Aᵀ for `matrices` A float64 [KH, D, D], of the rows of v and the columns of o."""
    sizes = block.sizes
    start = sizes.q_width + sizes.kv_width

    def solved(rows: Tensor) -> Tensor:
        per_head = rows[start:].double().view(sizes.kv_heads, sizes.head_dim, -1)
        mixed = torch.linalg.solve(matrices.mT, per_head).reshape(rows.shape[0] - start, *rows.shape[1:])
        return torch.cat([rows[:start], mixed.to(rows.dtype)])

    qkv, o = (cast(FloatLinear, block.linears[key]) for key in ("qkv", "o"))
    block.linears["qkv"] = FloatLinear(solved(qkv.weight), None if qkv.bias is None else solved(qkv.bias))
    heads = o.weight.double().view(o.weight.shape[0], sizes.kv_heads, -1, sizes.head_dim)
    mixed = (heads @ matrices.mT).reshape(o.weight.shape)
    block.linears["o"] = FloatLinear(mixed.to(o.weight.dtype), o.bias)


def turn_pairs(block: Block, angles: Tensor, logarithms: Tensor | None = None) -> None:
    """Rotate every pair of dimensions of k by `angles` [KH, R/2] and scale it by exp(`logarithms`) [KH, R/2]; rotate
    those of q alike and scale them by the inverse. R is the number of dimensions that RoPE rotates."""
    sizes = block.sizes
    half = sizes.rope.dim // 2
    size = torch.zeros_like(angles) if logarithms is None else logarithms
    repeat = sizes.heads // sizes.kv_heads
    # Of the heads in the order of their rows: query heads, then key heads.
    turn = torch.cat([angles.repeat_interleave(repeat, dim=0), angles]).double()
    gain = torch.cat([-size.repeat_interleave(repeat, dim=0), size]).double().exp()
    end = sizes.q_width + sizes.kv_width

    def turned(rows: Tensor) -> Tensor:
        heads = rows[:end].view(sizes.heads + sizes.kv_heads, sizes.head_dim, -1)
        a, b = heads[:, :half], heads[:, half : 2 * half]
        c, s = ((gain * own).to(rows.dtype)[..., None] for own in (turn.cos(), turn.sin()))
        moved = torch.cat([a * c - b * s, b * c + a * s, heads[:, 2 * half :]], dim=1)
        return torch.cat([moved.reshape(end, *rows.shape[1:]), rows[end:]])

    qkv = cast(FloatLinear, block.linears["qkv"])
    block.linears["qkv"] = FloatLinear(turned(qkv.weight), None if qkv.bias is None else turned(qkv.bias))


class Mixing:
    """Matrices I + stability * (band ∘ B) [count, width, width], float64.

    stages  how many times the band grows in the course of `steps`
    """

    def __init__(self, count: int, width: int, *, rate: float, stability: float, stages: int, steps: int) -> None:
        self.beside = torch.zeros(count, width, width, dtype=torch.float64, requires_grad=True)
        self._rate, self._stability = rate, stability
        self._stages, self._steps = stages, steps
        self._distance = (torch.arange(width)[:, None] - torch.arange(width)).abs()
        self._done = self.limited = 0

    def groups(self) -> Sequence[Group]:
        """The trainer asks when training begins, or begins anew: the band does too."""
        self._done = 0
        return [Group([self.beside], self._rate)]

    def matrices(self) -> Tensor:
        width = self._distance.shape[0]
        stage = min(self._done * self._stages // self._steps, self._stages - 1) + 1
        reach = math.ceil((width - 1) * stage / self._stages)
        # The mask holds back gradients only: outside the band B is still zero, or as an earlier training left it.
        grown = torch.where(self._distance <= reach, self.beside, self.beside.detach())
        return torch.eye(width, dtype=torch.float64) + self._stability * (self._distance > 0) * grown

    def project(self) -> None:
        self._done += 1
        weight = self._weight()
        self.limited += int((weight > MOST_BESIDE).sum())
        self.beside.mul_((MOST_BESIDE / weight.clamp_min(MOST_BESIDE))[..., None])

    @torch.no_grad()
    def condition(self) -> tuple[float, float]:
        """Least diagonal dominance of a row, 1 - Σ |beside the diagonal|, and largest condition number, of what is
        learned."""
        width = self._distance.shape[0]
        whole = torch.eye(width, dtype=torch.float64) + self._stability * (self._distance > 0) * self.beside
        return 1 - float(self._weight().max()), float(torch.linalg.cond(whole).max())

    def note(self, name: str) -> str:
        dominance, condition = self.condition()
        limited = f", rows held at {1 - MOST_BESIDE:.2g} {self.limited} times" if self.limited else ""
        return f"{name}: diagonal dominance at least {dominance:.3f}, condition number up to {condition:.3g}{limited}"

    @torch.no_grad()
    def _weight(self) -> Tensor:
        """Of every row, what stands beside the diagonal."""
        return self._stability * (self.beside * (self._distance > 0)).abs().sum(dim=-1)


class ValueMixing:
    """A matrix for every kv head between v and o."""

    def __init__(self, mixing: Mixing) -> None:
        self.mixing = mixing

    def groups(self) -> Sequence[Group]:
        return self.mixing.groups()

    def fold(self, block: Block) -> None:
        mix_values(block, self.mixing.matrices())

    def project(self) -> None:
        self.mixing.project()

    def notes(self) -> Sequence[str]:
        return [self.mixing.note("matrices between v and o")]


class PairTurning:
    """An angle for every pair of dimensions of a kv head's keys. Their scale is not learned: every row has scales of
    its own, so it changes no code."""

    def __init__(self, sizes: Sizes, *, rate: float) -> None:
        self.angles = torch.zeros(sizes.kv_heads, sizes.rope.dim // 2, requires_grad=True)
        self._rate = rate

    def groups(self) -> Sequence[Group]:
        return [Group([self.angles], self._rate)]

    def fold(self, block: Block) -> None:
        turn_pairs(block, self.angles)

    def project(self) -> None:
        pass

    def notes(self) -> Sequence[str]:
        turned = float(self.angles.detach().abs().max()) * 180 / math.pi
        return [f"pairs of q and k: turned by up to {turned:.1f}°"]
