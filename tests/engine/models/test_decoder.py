"""One block, two ways to run it; gradients, pluggable linears, rows."""

from __future__ import annotations

import pytest
import torch
from tiny_models import Paged, hf_model, quantized, token_ids, weights_of
from torch import Tensor

from dibit.engine.config import EngineConfig
from dibit.engine.errors import CheckpointError
from dibit.engine.loader import load_decoder
from dibit.engine.models import resolve_arch
from dibit.engine.models.decoder import FloatLinear, SideBySide, load_embedding, load_float_block
from dibit.kernels.formats import Format


def test_dense_and_paged_are_one_block() -> None:
    weights = weights_of(hf_model(attention_bias=True, mlp_bias=True, num_hidden_layers=1))
    arch, sizes = resolve_arch(weights.config)
    block = load_float_block(weights, arch, sizes, 0)
    decoder = load_decoder(weights, config=EngineConfig(backend="reference"))
    ids = token_ids(29)
    paged = Paged(decoder)
    x = load_embedding(weights, arch, sizes)[torch.tensor([ids])]
    dense = block.dense(x, paged.cos, paged.sin)[0]
    decoder.final_norm = torch.ones_like(decoder.final_norm)
    seen: list[Tensor] = []
    decoder.head = lambda hidden: seen.append(hidden) or hidden  # type: ignore[func-returns-value]
    paged.logits((paged.request(ids), 0, 29))
    normalized = dense * torch.rsqrt(dense.pow(2).mean(-1, keepdim=True) + sizes.norm_eps)
    torch.testing.assert_close(seen[0], normalized, rtol=0, atol=2e-5)


def test_gradients_reach_every_weight_and_the_input() -> None:
    weights = weights_of(hf_model(attention_bias=True, mlp_bias=True))
    arch, sizes = resolve_arch(weights.config)
    block = load_float_block(weights, arch, sizes, 0)
    learned = [block.attn_norm, block.mlp_norm]
    for linear in block.linears.values():
        assert isinstance(linear, FloatLinear)
        assert linear.bias is not None
        learned += [linear.weight, linear.bias]
    for tensor in learned:
        tensor.requires_grad_()
    x = torch.randn(2, 17, sizes.hidden, requires_grad=True)
    cos, sin = sizes.rope.tables(17)
    block.dense(x, cos, sin).pow(2).mean().backward()
    for tensor in [*learned, x]:
        assert tensor.grad is not None
        assert bool(tensor.grad.isfinite().all())
        assert float(tensor.grad.abs().max()) > 0


def test_dense_is_causal_and_sequences_are_apart() -> None:
    weights = weights_of(hf_model())
    arch, sizes = resolve_arch(weights.config)
    block = load_float_block(weights, arch, sizes, 1)
    cos, sin = sizes.rope.tables(16)
    x = torch.randn(2, 16, sizes.hidden)
    other = x.clone()
    other[0, 9:] = 7.0
    before, after = block.dense(x, cos, sin), block.dense(other, cos, sin)
    torch.testing.assert_close(after[0, :9], before[0, :9])
    torch.testing.assert_close(after[1], before[1])
    assert not torch.allclose(after[0, 9:], before[0, 9:])


def test_any_callable_may_be_a_linear() -> None:
    weights = weights_of(hf_model())
    arch, sizes = resolve_arch(weights.config)
    block = load_float_block(weights, arch, sizes, 0)
    cos, sin = sizes.rope.tables(8)
    x = torch.randn(1, 8, sizes.hidden)
    expected = block.dense(x, cos, sin)
    shapes: dict[str, tuple[int, ...]] = {}

    def recording(key: str, inner: FloatLinear) -> FloatLinear:
        class Recorder(FloatLinear):
            def __call__(self, x: Tensor) -> Tensor:
                shapes[key] = tuple(x.shape)
                return inner(x)

        return Recorder(inner.weight, inner.bias)

    for key, linear in block.linears.items():
        assert isinstance(linear, FloatLinear)
        block.linears[key] = recording(key, linear)
    torch.testing.assert_close(block.dense(x, cos, sin), expected, rtol=0, atol=0)
    assert shapes == {"qkv": (1, 8, 48), "o": (1, 8, 48), "gate_up": (1, 8, 48), "down": (1, 8, 80)}


def test_a_block_of_a_quantized_checkpoint_is_its_dequantized_weights() -> None:
    from tiny_models import dequantized

    model = hf_model()
    low = quantized(weights_of(model), Format(3, 16))
    arch, sizes = resolve_arch(low.config)
    reference = load_float_block(weights_of(dequantized(low, model)), arch, sizes, 0)
    block = load_float_block(low, arch, sizes, 0)
    x = torch.randn(1, 5, sizes.hidden)
    cos, sin = sizes.rope.tables(5)
    assert torch.equal(block.dense(x, cos, sin), reference.dense(x, cos, sin))


def test_a_block_in_another_type() -> None:
    weights = weights_of(hf_model())
    arch, sizes = resolve_arch(weights.config)
    block = load_float_block(weights, arch, sizes, 0, dtype=torch.bfloat16)
    cos, sin = sizes.rope.tables(5)
    assert block.dense(torch.randn(1, 5, sizes.hidden).bfloat16(), cos, sin).dtype == torch.bfloat16


def test_serving_a_training_block_says_what_is_missing() -> None:
    weights = weights_of(hf_model())
    arch, sizes = resolve_arch(weights.config)
    paged = Paged(load_decoder(weights, config=EngineConfig(backend="reference")))
    paged.decoder.blocks = (load_float_block(weights, arch, sizes, 0),)
    with pytest.raises(TypeError, match="dense"):
        paged.logits((paged.request([3]), 0, 1))


def test_a_block_with_a_missing_tensor_is_refused() -> None:
    weights = weights_of(hf_model())
    arch, sizes = resolve_arch(weights.config)
    del weights.tensors["model.layers.0.mlp.up_proj.weight"]
    with pytest.raises(CheckpointError, match=r"0.mlp.up_proj.weight is missing; expected shape \[80, 48\]"):
        load_float_block(weights, arch, sizes, 0)


def test_side_by_side() -> None:
    x = torch.randn(3, 4)
    a, b = FloatLinear(torch.randn(2, 4)), FloatLinear(torch.randn(5, 4), torch.randn(5))
    assert torch.equal(SideBySide((a, b))(x), torch.cat([a(x), b(x)], dim=1))
