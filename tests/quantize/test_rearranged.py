"""Permuted and rotated channels change nothing before rounding, under grouped queries, RoPE and biases."""

from __future__ import annotations

from contextlib import closing
from pathlib import Path
from typing import Any

import pytest
import torch
from random_blocks import random_block, run, sizes
from torch import Tensor
from transformers import LlamaForCausalLM

from dibit.engine.checkpoint import open_checkpoint
from dibit.engine.errors import ConfigError
from dibit.engine.models.decoder import Block
from dibit.kernels.formats import QTensor, dequantize
from dibit.quantize import quantize_checkpoint
from dibit.quantize.methods.gptq import GPTQ
from dibit.quantize.permute import by_importance, permute
from dibit.quantize.rotate import random_rotation, rotate_values

CHANGED = {
    "permute": {"v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"},
    "rotate": {"v_proj", "o_proj"},
}
HEADS = [(6, 2), (4, 4), (4, 1)]


def inputs(block: Block) -> Tensor:
    return torch.randn(2, 9, block.sizes.hidden, generator=torch.Generator().manual_seed(1))


def distance(a: Tensor, b: Tensor) -> float:
    return float((a - b).norm() / b.norm())


def shuffled(block: Block, seed: int) -> tuple[Tensor, Tensor]:
    rng, own = torch.Generator().manual_seed(seed), block.sizes
    values = torch.stack([torch.randperm(own.head_dim, generator=rng) for _ in range(own.kv_heads)])
    return torch.randperm(own.intermediate, generator=rng), values


@pytest.mark.parametrize("heads", HEADS, ids=str)
def test_a_permuted_block_computes_the_same(heads: tuple[int, int]) -> None:
    block = random_block(sizes(*heads))
    x, (mlp, values) = inputs(block), shuffled(block, 2)
    expected = run(block, x)
    changed = permute(block, mlp=mlp, values=values)
    assert distance(run(changed, x), expected) < 1e-5
    for key in ("qkv", "o", "gate_up", "down"):
        old, new = (any_block.linears[key] for any_block in (block, changed))
        assert not torch.equal(old.weight, new.weight)  # type: ignore[attr-defined]
        assert torch.equal(old.weight.flatten().sort()[0], new.weight.flatten().sort()[0])  # type: ignore[attr-defined]
    assert torch.equal(run(block, x), expected), "the original block was changed"


@pytest.mark.parametrize("heads", HEADS, ids=str)
def test_a_rotated_block_computes_the_same(heads: tuple[int, int]) -> None:
    block = random_block(sizes(*heads))
    x, own = inputs(block), block.sizes
    expected = run(block, x)
    rotations = torch.stack([random_rotation(own.head_dim, seed=i) for i in range(own.kv_heads)])
    changed = rotate_values(block, rotations)
    assert distance(run(changed, x), expected) < 1e-5
    for key in ("qkv", "o"):
        old: Any = block.linears[key]
        new: Any = changed.linears[key]
        assert distance(new.weight, old.weight) > 0.1
    assert torch.equal(run(block, x), expected), "the original block was changed"


def test_heads_that_share_their_values_must_agree() -> None:
    """One kv head's order used for another is noticed."""
    block = random_block(sizes(6, 2))
    x, (mlp, values) = inputs(block), shuffled(block, 3)
    whole = permute(block, mlp=mlp, values=values)
    other = permute(block, mlp=mlp, values=values.flip(0))
    whole.linears["o"] = other.linears["o"]
    assert distance(run(whole, x), run(block, x)) > 0.05


@pytest.mark.parametrize("n", [1, 2, 12, 16, 64])
def test_rotations_are_orthogonal_and_seeded(n: int) -> None:
    rotation = random_rotation(n, seed=7)
    torch.testing.assert_close(rotation @ rotation.T, torch.eye(n, dtype=torch.float64), atol=1e-12, rtol=0.0)
    assert torch.equal(rotation, random_rotation(n, seed=7))
    assert n < 12 or not torch.equal(rotation, random_rotation(n, seed=8))


def test_rearranged_models_are_the_float_model_in_many_bits(
    tiny: Path, text: Path, unseen: Tensor, tmp_path: Path
) -> None:
    """Biases of v and up come along, and a continued run reads them back."""
    reference: Any = LlamaForCausalLM.from_pretrained(tiny, dtype=torch.float32).eval()
    options: dict[str, Any] = {"bits": 8, "group_size": 16, "calibration": text, "samples": 8, "sequence_length": 40}

    def stop(done: int, total: int, note: str) -> None:
        if done == 2:
            raise KeyboardInterrupt

    for rearrange in ("permute", "rotate"):
        out, method = tmp_path / rearrange, GPTQ(rearrange=rearrange, asymmetric=True)
        with pytest.raises(KeyboardInterrupt):
            quantize_checkpoint(str(tiny), out, method=method, progress=stop, **options)
        report = quantize_checkpoint(str(tiny), out, method=method, **options)
        assert report.resumed_blocks == 2
        assert not report.fallbacks
        with closing(open_checkpoint(out)) as checkpoint, torch.no_grad():
            model: Any = LlamaForCausalLM.from_pretrained(tiny, dtype=torch.float32).eval()
            for name, module in model.named_modules():
                if name.endswith("_proj"):
                    linear = checkpoint.linear(name)
                    assert isinstance(linear, QTensor)
                    changed = float((dequantize(linear) - module.weight).norm() / module.weight.norm())
                    assert (changed > 0.1) == (name.rpartition(".")[2] in CHANGED[rearrange])
                    module.weight.copy_(dequantize(linear))
                    if module.bias is not None:
                        module.bias.copy_(checkpoint.tensor(f"{name}.bias"))
            assert distance(model(unseen).logits, reference(unseen).logits) < 0.03


def test_unknown_rearrangements_are_refused() -> None:
    with pytest.raises(ConfigError, match="rearrange is 'sort'; supported: none, permute, rotate"):
        GPTQ(rearrange="sort")


def test_important_channels_come_first_and_a_value_counts_by_all_its_readers() -> None:
    own = sizes(6, 2)
    o = torch.zeros(own.heads, own.head_dim)
    o[2, 5] = 3.0  # read from kv head 0
    o[4, 9], o[5, 9], o[3, 1] = 2.0, 2.0, 3.0  # kv head 1: channel 9 counts more in sum
    down = torch.arange(own.intermediate).float()
    mlp, values = by_importance(own, down, o.flatten())
    assert mlp.tolist() == list(range(own.intermediate))[::-1]
    assert values[0, 0] == 5
    assert values[1, :2].tolist() == [9, 1]
