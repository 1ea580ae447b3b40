"""The strict reader: what it takes from a config, and what it refuses by name."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from dibit.engine.errors import CheckpointError, ConfigError
from dibit.engine.models import resolve_arch
from dibit.engine.models.rope import Dynamic, Llama3, Rope
from dibit.engine.models.spec import Part, float_shapes, sites

LLAMA: dict[str, Any] = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "hidden_size": 48,
    "intermediate_size": 80,
    "num_hidden_layers": 2,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "vocab_size": 97,
}
MISTRAL = {**LLAMA, "architectures": ["MistralForCausalLM"], "model_type": "mistral"}

# The config of SmolLM2-135M-Instruct, with the notes that its training tools left in it.
SMOLLM2: dict[str, Any] = {
    "architectures": ["LlamaForCausalLM"],
    "attention_bias": False,
    "attention_dropout": 0.0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "hidden_act": "silu",
    "hidden_size": 576,
    "initializer_range": 0.041666666666666664,
    "intermediate_size": 1536,
    "is_llama_config": True,
    "max_position_embeddings": 8192,
    "mlp_bias": False,
    "model_type": "llama",
    "num_attention_heads": 9,
    "num_hidden_layers": 30,
    "num_key_value_heads": 3,
    "pad_token_id": 2,
    "pretraining_tp": 1,
    "rms_norm_eps": 1e-05,
    "rope_interleaved": False,
    "rope_scaling": None,
    "rope_theta": 100000,
    "tie_word_embeddings": True,
    "torch_dtype": "bfloat16",
    "transformers.js_config": {"kv_cache_dtype": {"q4f16": "float16", "fp16": "float16"}},
    "transformers_version": "4.42.3",
    "use_cache": True,
    "vocab_size": 49152,
}


def test_a_real_config() -> None:
    arch, sizes = resolve_arch(SMOLLM2)
    assert arch.name == "llama"
    assert (sizes.layers, sizes.hidden, sizes.heads, sizes.kv_heads, sizes.head_dim) == (30, 576, 9, 3, 64)
    assert sizes.max_positions == 8192
    assert sizes.tied_head
    assert sizes.rope == Rope(theta=100000.0, dim=64)


def test_what_a_config_leaves_out_is_what_the_family_means() -> None:
    _, sizes = resolve_arch({k: v for k, v in LLAMA.items() if k != "num_key_value_heads"})
    assert (sizes.kv_heads, sizes.max_positions, sizes.norm_eps, sizes.tied_head) == (6, 2048, 1e-6, False)
    assert sizes.rope.theta == 10000.0


@pytest.mark.parametrize(
    ("key", "value", "words"),
    [
        ("num_experts", 8, ("num_experts", "8", "Remove")),
        ("attention_sink", True, ("attention_sink", "True")),
        ("hidden_act", "gelu", ("hidden_act", "'gelu'", "'silu'")),
        ("pretraining_tp", 2, ("pretraining_tp", "2")),
        ("partial_rotary_factor", 0.5, ("partial_rotary_factor", "0.5")),
        ("sliding_window", 4096, ("sliding_window", "4096")),
        ("layer_types", ["full_attention", "sliding_attention"], ("layer_types", "sliding_attention")),
        ("rope_interleaved", True, ("rope_interleaved", "True")),
        ("attention_bias", "yes", ("attention_bias", "'yes'", "true or false")),
        ("num_key_value_heads", 4, ("num_attention_heads", "6", "4", "multiple")),
        ("num_attention_heads", 7, ("num_attention_heads", "7")),
        ("head_dim", 15, ("head_dim", "15", "even")),
        ("hidden_size", 0, ("hidden_size", "0", "at least 1")),
        ("hidden_size", "48", ("hidden_size", "'48'", "integer")),
        ("vocab_size", -3, ("vocab_size", "-3")),
        ("rms_norm_eps", 0, ("rms_norm_eps", "0", "above 0")),
        ("rms_norm_eps", float("nan"), ("rms_norm_eps", "nan")),
        ("max_position_embeddings", 12.5, ("max_position_embeddings", "12.5")),
        ("rope_theta", 0, ("rope_theta", "0")),
        ("rope_scaling", "linear", ("rope_scaling", "'linear'", "object")),
        ("rope_scaling", {"rope_type": "longrope", "factor": 2}, ("longrope", "llama3")),
        ("rope_scaling", {"rope_type": "linear"}, ("factor", "missing", "linear")),
        ("rope_scaling", {"rope_type": "linear", "factor": -1}, ("factor", "-1")),
        ("rope_scaling", {"rope_type": "linear", "factor": 2, "mrope_section": [1]}, ("mrope_section",)),
        ("rope_scaling", {"rope_type": "default", "factor": 2}, ("factor", "default")),
        ("rope_parameters", {"rope_type": "default", "partial_rotary_factor": 0.5}, ("partial_rotary_factor", "0.5")),
        (
            "rope_scaling",
            {"type": "llama3", "factor": 8, "low_freq_factor": 4, "high_freq_factor": 1},
            ("high_freq_factor", "low_freq_factor"),
        ),
    ],
)
def test_what_would_be_computed_wrongly_is_refused(key: str, value: Any, words: tuple[str, ...]) -> None:
    with pytest.raises(CheckpointError) as caught:
        resolve_arch({**LLAMA, key: value})
    for word in words:
        assert word in str(caught.value)


@pytest.mark.parametrize("key", ["hidden_size", "intermediate_size", "num_hidden_layers", "vocab_size"])
def test_a_size_that_is_missing_is_named(key: str) -> None:
    with pytest.raises(CheckpointError, match=f"{key} is missing"):
        resolve_arch({k: v for k, v in LLAMA.items() if k != key})


@pytest.mark.parametrize(
    "extra",
    [{"num_experts": None}, {"_anything": 3}, {"temperature": 0.6, "max_length": 4096}, {"quantization_config": {}}],
    ids=str,
)
def test_what_changes_nothing_is_accepted(extra: dict[str, Any]) -> None:
    assert resolve_arch({**LLAMA, **extra}) == resolve_arch(LLAMA)


@pytest.mark.parametrize("config", [{"architectures": ["GPT2LMHeadModel"]}, {"model_type": "gpt2"}, {}])
def test_unknown_architectures_are_refused_with_the_list(config: dict[str, Any]) -> None:
    with pytest.raises(CheckpointError, match="LlamaForCausalLM, MistralForCausalLM, Qwen2ForCausalLM"):
        resolve_arch(config)


def test_mistral_without_its_window_only() -> None:
    assert resolve_arch({**MISTRAL, "sliding_window": None})[0].name == "mistral"
    # A window that no sequence can outgrow is none.
    assert resolve_arch({**MISTRAL, "sliding_window": 512, "max_position_embeddings": 512})[0].name == "mistral"
    for window in ({"sliding_window": 4096}, {}):
        with pytest.raises(CheckpointError, match=r"sliding_window is 4096.*not supported"):
            resolve_arch({**MISTRAL, **window})
    with pytest.raises(CheckpointError, match="attention_bias"):
        resolve_arch({**MISTRAL, "sliding_window": None, "attention_bias": True})


@pytest.mark.parametrize("name", ["Qwen2ForCausalLM", "Qwen3ForCausalLM"])
def test_qwen_with_its_window_switched_off_only(name: str) -> None:
    config = {**LLAMA, "architectures": [name], "max_position_embeddings": 512, "max_window_layers": 1}
    # Written by the family's tools even where nothing uses it.
    off = {**config, "sliding_window": 64, "use_sliding_window": False, "layer_types": ["full_attention"] * 2}
    sizes = resolve_arch(off)[1]
    assert (sizes.qkv_bias, sizes.o_bias) == (name == "Qwen2ForCausalLM", False)
    assert resolve_arch({**config, "sliding_window": 512, "use_sliding_window": True})[1] == sizes
    with pytest.raises(CheckpointError, match=r"sliding_window is 64.*not supported"):
        resolve_arch({**off, "use_sliding_window": True})


def test_sites_list_every_linear_once() -> None:
    arch, sizes = resolve_arch({**LLAMA, "head_dim": 16, "attention_bias": True})
    qkv, o, gate_up, down = sites(arch, sizes, 1)
    at = "model.layers.1"
    assert qkv.parts == (
        Part(f"{at}.self_attn.q_proj", 96),
        Part(f"{at}.self_attn.k_proj", 32),
        Part(f"{at}.self_attn.v_proj", 32),
    )
    assert [(s.name, s.n, s.k, s.input, s.bias) for s in (qkv, o, gate_up, down)] == [
        ("layers.1.qkv", 160, 48, "layers.1.attn_in", True),
        ("layers.1.o", 48, 96, "layers.1.attn_out", True),
        ("layers.1.gate_up", 160, 48, "layers.1.mlp_in", False),
        ("layers.1.down", 48, 80, "layers.1.mlp_mid", False),
    ]
    assert [s.key for s in (qkv, o, gate_up, down)] == ["qkv", "o", "gate_up", "down"]


def test_float_shapes_are_those_of_transformers() -> None:
    from tiny_models import hf_model, weights_of

    for overrides in ({}, {"tie_word_embeddings": True}, {"attention_bias": True, "mlp_bias": True, "head_dim": 16}):
        weights = weights_of(hf_model(**overrides))
        expected = {name: tuple(tensor.shape) for name, tensor in weights.tensors.items()}
        assert float_shapes(*resolve_arch(weights.config)) == expected


def test_dynamic_rope_ends_where_it_would_start_to_stretch() -> None:
    _, sizes = resolve_arch({**LLAMA, "rope_scaling": {"type": "dynamic", "factor": 2.0}})
    assert sizes.rope.scaling == Dynamic(2.0, 2048)
    plain = Rope(theta=10000.0, dim=8)
    assert torch.equal(sizes.rope.tables(2048)[0], plain.tables(2048)[0])
    with pytest.raises(ConfigError, match="2049 positions with dynamic"):
        sizes.rope.tables(2049)


def test_tables_are_angles() -> None:
    cos, sin = Rope(theta=100.0, dim=4, scaling=None).tables(7)
    assert cos.shape == sin.shape == (7, 2)
    positions = torch.arange(7.0)
    torch.testing.assert_close(cos[:, 1], (positions / 10).cos())
    torch.testing.assert_close(sin[:, 0], positions.sin())


def test_llama3_keeps_fast_dimensions_and_divides_slow_ones() -> None:
    rope = Rope(theta=500000.0, dim=128, scaling=Llama3(8.0, 1.0, 4.0, 8192))
    ratio = rope.frequencies() / Rope(theta=500000.0, dim=128).frequencies()
    assert ratio[0] == 1
    assert ratio[-1] == 1 / 8
    assert bool((ratio.diff() <= 1e-6).all())


def test_linear_scaling_may_name_the_stretched_length() -> None:
    scaling = {"type": "linear", "factor": 4.0}
    assert resolve_arch({**LLAMA, "rope_scaling": scaling, "max_sequence_length": 8192})[1].max_positions == 8192
    assert resolve_arch({**LLAMA, "max_sequence_length": 8192})[1].max_positions == 2048
