"""Our logits are transformers' logits, whatever the shape of the model and however the tokens are cut into steps.

Bound: every value comes from float32 sums of at most 128 products, whose worst relative error is 128 * 2^-24 = 8e-6 of
the sum of magnitudes; errors of a few such sums add up along two layers. 5e-5 of the largest logit leaves room for the
orders of summation to differ and none for a wrong term.
"""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_models import (
    BACKENDS,
    Paged,
    dequantized,
    hf_model,
    oracle_logits,
    quantized,
    saved_weights,
    token_ids,
    weights_of,
)
from torch import Tensor

from dibit.engine.config import EngineConfig
from dibit.engine.loader import load_decoder
from dibit.engine.models import decoder as decoder_module
from dibit.engine.models import resolve_arch
from dibit.engine.models.decoder import load_embedding, load_float_block
from dibit.kernels import native
from dibit.kernels.formats import Format
from dibit.kernels.norm import rms_norm_reference

BOUND = 5e-5
LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 10000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}
YARN = {"rope_type": "yarn", "rope_theta": 10000.0, "factor": 4.0, "original_max_position_embeddings": 32}

FAMILIES: dict[str, tuple[str, dict[str, Any]]] = {
    "gqa": ("llama", {}),
    "mha": ("llama", {"num_key_value_heads": 6}),
    "mqa": ("llama", {"num_key_value_heads": 1}),
    "one-layer": ("llama", {"num_hidden_layers": 1}),
    "head-dim": ("llama", {"head_dim": 16}),
    "tied": ("llama", {"tie_word_embeddings": True}),
    "attention-bias": ("llama", {"attention_bias": True}),
    "mlp-bias": ("llama", {"mlp_bias": True, "rms_norm_eps": 1e-3}),
    "theta": ("llama", {"rope_parameters": {"rope_type": "default", "rope_theta": 500000.0}}),
    "linear": ("llama", {"rope_parameters": {"rope_type": "linear", "rope_theta": 10000.0, "factor": 4.0}}),
    "dynamic": ("llama", {"rope_parameters": {"rope_type": "dynamic", "rope_theta": 10000.0, "factor": 4.0}}),
    "llama3": ("llama", {"rope_parameters": LLAMA3, "head_dim": 32}),
    "yarn": ("llama", {"rope_parameters": YARN, "head_dim": 32}),
    "yarn-gain": ("llama", {"rope_parameters": {**YARN, "attention_factor": 0.9, "beta_fast": 16, "truncate": False}}),
    "yarn-mscale": ("llama", {"rope_parameters": {**YARN, "mscale": 0.7, "mscale_all_dim": 1.3}}),
    "mistral": ("mistral", {"sliding_window": None}),
    "qwen2": ("qwen2", {}),
    "qwen2-tied": ("qwen2", {"tie_word_embeddings": True, "num_key_value_heads": 1}),
    "qwen3": ("qwen3", {"head_dim": 16}),
    "qwen3-bias": ("qwen3", {"head_dim": 24, "attention_bias": True, "num_key_value_heads": 3}),
}


def assert_close(found: Tensor, expected: Tensor, bound: float = BOUND) -> None:
    error = float((found - expected).abs().max() / expected.abs().max())
    assert error <= bound, f"relative error {error:.2g}, at most {bound:.2g} allowed"


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("family", FAMILIES)
def test_serving_equals_transformers(family: str, backend: Any, tmp_path: Path) -> None:
    kind, overrides = FAMILIES[family]
    model = hf_model(kind, **overrides)
    model.save_pretrained(tmp_path)
    decoder = load_decoder(saved_weights(tmp_path), config=EngineConfig(backend=backend))
    first, second = token_ids(61), token_ids(23, seed=1)
    expected = oracle_logits(model, first)

    runs = Paged(decoder)
    a = runs.request(first)
    assert_close(runs.logits((a, 0, 61)), expected)

    chunked = Paged(decoder)
    a = chunked.request(first)
    cuts = [0, 1, 14, 15, 40, 61]
    pieces = [chunked.logits((a, start, stop)) for start, stop in pairwise(cuts)]
    assert_close(torch.cat(pieces), expected)

    mixed = Paged(decoder)
    a, b = mixed.request(first), mixed.request(second)
    mixed.logits((a, 0, 38))
    rows = [mixed.logits((a, 38 + i, 39 + i), (b, i, i + 1)) for i in range(23)]
    assert_close(torch.stack([row[0] for row in rows]), expected[38:61])
    assert_close(torch.stack([row[1] for row in rows]), oracle_logits(model, second))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(("kv_type", "bound"), [("fp8", 0.15), ("int8", 0.02), ("k8v4", 0.15), ("int4", 0.3)])
def test_a_cache_of_low_bits(kv_type: Any, bound: float, backend: Any) -> None:
    """Codes are off by half a step: of 254 in the largest of 32 columns, or of 15 in their range; e4m3 by up
    to a 16th of each element."""
    model = hf_model(head_dim=16)
    decoder = load_decoder(weights_of(model), config=EngineConfig(backend=backend))
    ids = token_ids(61)
    whole = Paged(decoder, kv_type=kv_type)
    a = whole.request(ids)
    logits = whole.logits((a, 0, 61))
    assert_close(logits, oracle_logits(model, ids), bound)
    with pytest.raises(AssertionError):
        assert_close(logits, oracle_logits(model, ids), bound / 100)
    chunked = Paged(decoder, kv_type=kv_type)
    a = chunked.request(ids)
    pieces = [chunked.logits((a, start, stop)) for start, stop in pairwise([0, 1, 14, 15, 40, 61])]
    # What is stored for a token does not depend on the step that stores it.
    assert_close(torch.cat(pieces), logits)


@pytest.mark.parametrize("family", FAMILIES)
def test_dense_blocks_equal_transformers(family: str) -> None:
    kind, overrides = FAMILIES[family]
    model = hf_model(kind, **overrides)
    weights = weights_of(model)
    arch, sizes = resolve_arch(weights.config)
    batch = torch.tensor([token_ids(41), token_ids(41, seed=5)])
    cos, sin = sizes.rope.tables(64)
    with torch.no_grad():
        x = load_embedding(weights, arch, sizes)[batch]
        for layer in range(sizes.layers):
            x = load_float_block(weights, arch, sizes, layer).dense(x, cos, sin)
        hidden = rms_norm_reference(x, weights.tensors["model.norm.weight"], sizes.norm_eps)
        logits = hidden @ weights.tensors.get("lm_head.weight", weights.tensors["model.embed_tokens.weight"]).T
        assert_close(logits, model(batch).logits)


def test_the_old_spelling_of_rope_means_the_same() -> None:
    config = weights_of(hf_model(rope_parameters=LLAMA3)).config
    old = {key: value for key, value in config.items() if key != "rope_parameters"}
    law = {key: value for key, value in LLAMA3.items() if key != "rope_theta"}
    old |= {"rope_theta": 10000.0, "rope_scaling": law}
    assert resolve_arch(old) == resolve_arch(config)
    older = {**old, "rope_scaling": {**{k: v for k, v in law.items() if k != "rope_type"}, "type": "llama3"}}
    assert resolve_arch(older) == resolve_arch(config)


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
def test_a_quantized_model_is_its_dequantized_weights(bits: int, *, tied: bool) -> None:
    model = hf_model(tie_word_embeddings=tied, attention_bias=True)
    low = quantized(weights_of(model), Format(bits, 16))
    ids = token_ids(37)
    expected = oracle_logits(dequantized(low, model), ids)
    paged = Paged(load_decoder(low, config=EngineConfig(backend="reference", head_bits=16)))
    assert_close(paged.logits((paged.request(ids), 0, 37)), expected)


MIXES = {
    "v-at-8": {"q_proj": Format(4, 16), "k_proj": Format(4, 16), "v_proj": Format(8, 16)},
    "all-differ": {"q_proj": Format(2, 16), "k_proj": Format(3, 16), "v_proj": Format(4, -1), "up_proj": Format(8, 16)},
    "float-amid": {"q_proj": Format(8, 16), "v_proj": Format(8, 16), "down_proj": Format(4, 16)},
}


@pytest.mark.parametrize("mix", MIXES)
@pytest.mark.parametrize("backend", BACKENDS)
def test_mixed_formats_in_a_fused_site(mix: str, backend: Any) -> None:
    model = hf_model(attention_bias=True)
    low = quantized(weights_of(model), MIXES[mix])
    ids = token_ids(37)
    expected = oracle_logits(dequantized(low, model), ids)
    paged = Paged(load_decoder(low, config=EngineConfig(backend=backend, head_bits=16)))
    found = paged.logits((paged.request(ids), 0, 37))
    if backend == "reference":
        assert_close(found, expected)
    else:
        assert relative_rms(found, expected) <= INT8_ACTIVATIONS


# An activation rounded to int8 per block of at most 64 columns is off by up to max|x| / 254, uniformly: for normal x,
# whose maximum over such a block is about 2.4 sigma, 2.4 / 254 / sqrt(3) = 0.5 % of its size. A product of K of them
# is off by the same share, independent of the weights. Two blocks have eight such products in a row, sqrt(8) * 0.5 %
# when they add like noise; twice that is allowed.
INT8_ACTIVATIONS = 0.03


def relative_rms(found: Tensor, expected: Tensor) -> float:
    return float((found - expected).pow(2).mean().sqrt() / expected.pow(2).mean().sqrt())


@pytest.mark.skipif(native.unavailable() is not None, reason="C++ kernels not built")
@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize("group", [16, -1])
def test_a_quantized_model_on_the_cpu_backend(bits: int, group: int) -> None:
    model = hf_model()
    low = quantized(weights_of(model), Format(bits, group))
    ids = token_ids(37)
    expected = oracle_logits(dequantized(low, model), ids)
    paged = Paged(load_decoder(low, config=EngineConfig(backend="cpu", head_bits=16)))
    assert relative_rms(paged.logits((paged.request(ids), 0, 37)), expected) <= INT8_ACTIVATIONS


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_long_prompt_goes_through_the_mlp_in_pieces(backend: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of 128 tokens, the last one shorter, and one sequence's beside another's."""
    model = hf_model(max_position_embeddings=384)
    monkeypatch.setattr(decoder_module, "MLP_BYTES", 0)
    runs = Paged(load_decoder(weights_of(model), config=EngineConfig(backend=backend)), block_size=8)
    first, second = token_ids(290), token_ids(70, seed=1)
    a, b = runs.request(first), runs.request(second)
    found = runs.logits((a, 0, 290), (b, 0, 70))
    assert_close(found, torch.cat([oracle_logits(model, first), oracle_logits(model, second)]))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
def test_head_and_embedding_at_8_bits_change_little(backend: Any, *, tied: bool) -> None:
    model = hf_model(tie_word_embeddings=tied)
    low = quantized(weights_of(model), Format(8, 16))
    ids = token_ids(37)
    expected = oracle_logits(dequantized(low, model), ids)
    paged = Paged(load_decoder(low, config=EngineConfig(backend=backend)))
    found = paged.logits((paged.request(ids), 0, 37))
    assert 0 < relative_rms(found, expected) <= INT8_ACTIVATIONS
