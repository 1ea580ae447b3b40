"""The config.json that a GGUF file of Llama architecture stands for, and the Hugging Face names of its tensors.

A metadata key of the architecture that is not understood is refused: what it changes would be computed wrongly.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from dibit.engine.checkpoint.gguf_header import GgufTensor, GgufValue
from dibit.engine.errors import CheckpointError

ARCHITECTURE = "llama"
ROPE_FACTORS = "rope_freqs.weight"
_BLOCK = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
_TOP = {"token_embd": "model.embed_tokens", "output_norm": "model.norm", "output": "lm_head"}
_NAME = re.compile(r"(?:blk\.(\d+)\.)?([a-z_]+)\.(weight|bias)")
# Facts that change nothing in the arithmetic, or are read elsewhere.
_NO_EFFECT = {"vocab_size", "tensor_data_layout", "expert_used_count"}
_LLAMA3_DEFAULT = (1.0, 4.0, 8192)


def hf_name(name: str) -> str | None:
    """Hugging Face name of a GGUF tensor; None when there is none."""
    match = _NAME.fullmatch(name)
    if match is None:
        return None
    layer, stem, kind = match.groups()
    if layer is None:
        return f"{_TOP[stem]}.{kind}" if stem in _TOP else None
    return f"model.layers.{layer}.{_BLOCK[stem]}.{kind}" if stem in _BLOCK else None


def synthesise_config(
    fields: Mapping[str, GgufValue],
    tensors: Mapping[str, GgufTensor],
    *,
    rope_factors: Callable[[], np.ndarray[Any, Any]],
    source: str,
) -> dict[str, Any]:
    """config.json of the model.

    tensors       by Hugging Face name
    rope_factors  reads the tensor rope_freqs.weight; called when the file has one
    Raises CheckpointError on another architecture, or on a key that is missing, malformed or not understood.
    """
    reader = _Fields(fields, source)
    architecture = reader.general("general.architecture")
    if architecture != ARCHITECTURE:
        raise CheckpointError(
            f"{source} holds a model of architecture {architecture!r}; of GGUF files only {ARCHITECTURE!r} is "
            "supported. Use the model's safetensors instead"
        )
    heads = reader.integer("attention.head_count")
    hidden = reader.integer("embedding_length")
    if heads < 1 or hidden < 1:
        raise CheckpointError(f"{source} claims {heads} heads over {hidden} channels; the file is damaged")
    head_dim = reader.integer("attention.key_length", hidden // heads)
    for key, other in (("attention.value_length", head_dim), ("rope.dimension_count", head_dim)):
        if reader.integer(key, other) != head_dim:
            raise CheckpointError(
                f"{source} has {key} {reader.integer(key, other)} with heads of {head_dim}; they must be equal"
            )
    embedding = tensors.get("model.embed_tokens.weight")
    if embedding is None or len(embedding.shape) != 2:
        raise CheckpointError(f"{source} has no token embedding (token_embd.weight); it is not a whole model")
    theta = reader.real("rope.freq_base", 10000.0)
    biased = {part: _has_bias(tensors, parts, source) for part, parts in _BIASES.items()}
    config: dict[str, Any] = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_act": "silu",
        "vocab_size": embedding.shape[0],
        "hidden_size": hidden,
        "intermediate_size": reader.integer("feed_forward_length"),
        "num_hidden_layers": reader.integer("block_count"),
        "num_attention_heads": heads,
        "num_key_value_heads": reader.integer("attention.head_count_kv", heads),
        "head_dim": head_dim,
        "max_position_embeddings": reader.integer("context_length"),
        "rms_norm_eps": reader.real("attention.layer_norm_rms_epsilon", 1e-5),
        "rope_theta": theta,
        "rope_scaling": _rope_scaling(reader, theta, head_dim, rope_factors if ROPE_FACTORS in tensors else None),
        "attention_bias": biased["attention"],
        "mlp_bias": biased["mlp"],
        "tie_word_embeddings": "lm_head.weight" not in tensors,
        "torch_dtype": "float16",
    }
    window = reader.integer("attention.sliding_window", 0)
    if window:
        config["sliding_window"] = window
    for key, name in (("bos", "bos"), ("eos", "eos"), ("padding", "pad")):
        value = fields.get(f"tokenizer.ggml.{key}_token_id")
        if value is not None:
            config[f"{name}_token_id"] = value.value
    reader.refuse_rest()
    return config


_BIASES = {
    "attention": ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj"),
    "mlp": ("mlp.gate_proj", "mlp.up_proj", "mlp.down_proj"),
}


def _has_bias(tensors: Mapping[str, GgufTensor], parts: Sequence[str], source: str) -> bool:
    present = {part for part in parts if f"model.layers.0.{part}.bias" in tensors}
    if present and present != set(parts):
        raise CheckpointError(
            f"{source} has biases on {', '.join(sorted(present))} alone; "
            f"supported: on all of {', '.join(parts)}, or on none"
        )
    return bool(present)


def _rope_scaling(
    reader: _Fields, theta: float, head_dim: int, factors: Callable[[], np.ndarray[Any, Any]] | None
) -> dict[str, Any] | None:
    kind = reader.string("rope.scaling.type", "none")
    linear = reader.real("rope.scale_linear", 1.0)
    factor = reader.real("rope.scaling.factor", linear)
    original = reader.integer("rope.scaling.original_context_length", 0)
    reader.take("rope.scaling.finetuned", None)
    if linear != 1.0 and kind == "none":
        kind = "linear"
    if factors is not None:
        if kind != "none":
            raise CheckpointError(f"{reader.source} scales RoPE both by a table and by {kind!r}; only one is supported")
        return _llama3_scaling(factors(), theta, head_dim, original, reader.source)
    if kind == "none" or (kind == "linear" and factor == 1.0):
        return None
    if kind == "linear":
        return {"rope_type": "linear", "factor": factor}
    if kind != "yarn":
        raise CheckpointError(
            f"{reader.source} scales RoPE by {kind!r}; supported: none, linear, yarn, and Llama 3's table"
        )
    scaling: dict[str, Any] = {"rope_type": "yarn", "factor": factor}
    if original:
        scaling["original_max_position_embeddings"] = original
    for key, name in (
        ("rope.scaling.attn_factor", "attention_factor"),
        ("rope.scaling.yarn_attn_factor", "attention_factor"),
        ("rope.scaling.yarn_beta_fast", "beta_fast"),
        ("rope.scaling.yarn_beta_slow", "beta_slow"),
    ):
        value = reader.take(key, None)
        if value is not None:
            scaling[name] = _shortest(value)
    return scaling


def _llama3_scaling(
    factors: np.ndarray[Any, Any], theta: float, head_dim: int, original: int, source: str
) -> dict[str, Any] | None:
    """Llama 3's frequency scaling from the table of divisors it was turned into.

    The table fixes low_freq_factor, high_freq_factor and the original context only up to a common scale, so the
    published ones are tried and must reproduce it.
    """
    factors = factors.astype(np.float64).reshape(-1)
    if factors.size != head_dim // 2 or not np.isfinite(factors).all():
        raise CheckpointError(f"{source} has a RoPE table of {factors.size} entries for heads of {head_dim}")
    if np.allclose(factors, 1.0):
        return None
    low, high, context = _LLAMA3_DEFAULT
    context = original or context
    factor = float(factors.max())
    wavelength = 2 * math.pi * theta ** (np.arange(0, head_dim, 2) / head_dim)
    smooth = np.clip((context / wavelength - low) / (high - low), 0.0, 1.0)
    if not np.allclose(factors, 1.0 / ((1.0 - smooth) / factor + smooth), rtol=1e-3):
        raise CheckpointError(
            f"{source} has a RoPE table that is not Llama 3's (low {low:g}, high {high:g}, context {context}); "
            "use the model's safetensors instead"
        )
    return {
        "rope_type": "llama3",
        "factor": round(factor, 4),
        "low_freq_factor": low,
        "high_freq_factor": high,
        "original_max_position_embeddings": context,
    }


class _Fields:
    """Metadata of the architecture; remembers what was asked for, so that the rest can be refused."""

    def __init__(self, fields: Mapping[str, GgufValue], source: str) -> None:
        self.fields = fields
        self.source = source
        self.used: set[str] = set()

    def take(self, key: str, default: Any) -> Any:
        self.used.add(key)
        value = self.fields.get(f"{ARCHITECTURE}.{key}")
        return default if value is None else value.value

    def general(self, key: str) -> Any:
        value = self.fields.get(key)
        return None if value is None else value.value

    def integer(self, key: str, default: int | None = None) -> int:
        value = self.take(key, default)
        if isinstance(value, list) and value and all(v == value[0] for v in value):
            value = value[0]
        if type(value) is not int or value < 0:
            found = "is missing" if value is None else f"is {value!r:.60}"
            raise CheckpointError(f"{self.source}: {ARCHITECTURE}.{key} {found}; expected one whole number")
        return value

    def real(self, key: str, default: float) -> float:
        value = self.take(key, default)
        if not isinstance(value, int | float) or not math.isfinite(value) or value <= 0:
            raise CheckpointError(f"{self.source}: {ARCHITECTURE}.{key} is {value!r:.60}; expected a number above 0")
        return _shortest(value)

    def string(self, key: str, default: str) -> str:
        return str(self.take(key, default))

    def refuse_rest(self) -> None:
        experts = self.take("expert_count", 0)
        if experts:
            raise CheckpointError(f"{self.source} is a mixture of {experts} experts; dense models are supported")
        if self.take("attention.causal", True) is not True:
            raise CheckpointError(f"{self.source} does not attend causally; it is no text generator")
        prefix = f"{ARCHITECTURE}."
        found = {key.removeprefix(prefix) for key in self.fields if key.startswith(prefix)}
        rest = sorted(found - self.used - _NO_EFFECT)
        if rest:
            raise CheckpointError(
                f"{self.source} sets {', '.join(prefix + key for key in rest)}, which is not supported for "
                f"{ARCHITECTURE!r}; use the model's safetensors instead"
            )


def _shortest(value: float) -> float:
    """The decimal number that a float32 stands for: 1e-05, not 9.999999747378752e-06."""
    return float(str(np.float32(value)))
