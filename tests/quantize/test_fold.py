"""Folded scales change nothing before rounding, under grouped queries, RoPE and biases."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from random_blocks import KEYS, random_block, run, sizes

from dibit.engine.models.decoder import FloatLinear
from dibit.quantize.fold import copied, expand, fold, input_width


@pytest.mark.parametrize("heads", [(6, 2), (4, 4), (4, 1)], ids=str)
@pytest.mark.parametrize("keys", [(key,) for key in KEYS] + [KEYS], ids="+".join)
def test_the_block_computes_the_same(heads: tuple[int, int], keys: tuple[str, ...]) -> None:
    own = sizes(*heads)
    block = random_block(own)
    x = torch.randn(2, 9, own.hidden, generator=torch.Generator().manual_seed(1))
    expected = run(block, x)
    folded = copied(block)
    for i, key in enumerate(keys):
        rng = torch.Generator().manual_seed(10 + i)
        fold(folded, key, torch.exp(torch.randn(input_width(own, key), generator=rng) * 1.5))
    changed = [key for key in KEYS if folded.linears[key] is not block.linears[key]]
    assert set(keys) <= set(changed)
    error = float((run(folded, x) - expected).norm() / expected.norm())
    assert error < 1e-5
    assert torch.equal(run(block, x), expected), "the original block was changed"


def test_scales_are_shared_by_the_query_heads_of_a_kv_head() -> None:
    own = sizes(6, 2)
    scales = torch.arange(1, 33).float()
    wide = expand(own, "o", scales).view(6, 16)
    for head in range(6):
        assert torch.equal(wide[head], scales.view(2, 16)[head // 3])
    block = random_block(own)
    x = torch.randn(1, 5, own.hidden)
    untied = copied(block)
    fold(untied, "o", scales)
    linear: Any = untied.linears["o"]
    untied.linears["o"] = FloatLinear(linear.weight / expand(own, "o", scales) * scales.repeat(3), linear.bias)
    assert float((run(untied, x) - run(block, x)).norm() / run(block, x).norm()) > 0.1


@pytest.mark.parametrize("stored", [torch.float16, torch.bfloat16])
def test_nothing_is_lost_when_norms_are_stored_in_few_bits(stored: torch.dtype) -> None:
    own = sizes(6, 2)
    block = random_block(own)
    block.attn_norm = block.attn_norm.to(stored).float()
    block.attn_norm[7] = 0
    x = torch.randn(1, 5, own.hidden)
    folded = copied(block)
    scales = torch.exp(torch.randn(own.hidden))
    scales[3], scales[4] = 1e-12, 1e12
    fold(folded, "qkv", scales, stored=stored)
    assert torch.equal(folded.attn_norm.to(stored).float(), folded.attn_norm)
    assert bool(folded.attn_norm.isfinite().all())
    error = float((run(folded, x) - run(block, x)).norm() / run(block, x).norm())
    assert error < 1e-5


@pytest.mark.parametrize("key", ["qkv", "gate_up"])
def test_gradients_of_scales_pass_the_rounding_of_the_norm(key: str) -> None:
    """The block computes with the rounded norm and learns as if it were not; a norm of zero teaches nothing."""
    own = sizes(6, 2)
    block = random_block(own)
    name = "attn_norm" if key == "qkv" else "mlp_norm"
    norm: torch.Tensor = getattr(block, name).clone()
    norm[3] = 0.0
    setattr(block, name, norm)
    rng = torch.Generator().manual_seed(5)
    begun = torch.exp(torch.randn(input_width(own, key), generator=rng) * 0.3)
    toward = torch.randn(norm.shape, generator=rng)

    def gradient(stored: torch.dtype) -> torch.Tensor:
        scales = begun.clone().requires_grad_()
        folded = copied(block)
        fold(folded, key, scales, stored=stored)
        found = getattr(folded, name)
        assert torch.equal(found.detach(), found.detach().to(stored).float())
        linear: Any = folded.linears[key]
        ((found * toward).sum() + (linear.weight.square().mean() * 0)).backward()
        assert scales.grad is not None
        return scales.grad

    exact = -(norm / begun.square()) * toward
    for stored in (torch.float32, torch.bfloat16):
        found = gradient(stored)
        assert bool(found.isfinite().all()), "a norm of zero made the gradient NaN"
        assert float(found[3]) == 0.0
        torch.testing.assert_close(found, exact, rtol=1e-5, atol=1e-6)
