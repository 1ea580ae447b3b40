"""config.json -> Sizes, strictly: every key is read, known to be harmless, or refused by name.

Harmless means that the value cannot change the logits: token ids, sampling defaults, training settings, notes of the
tool that wrote the file. NEUTRAL lists keys that would change them, with the one value under which they do not.
null switches any key off.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from dibit.engine.errors import CheckpointError
from dibit.engine.models.rope import Dynamic, Linear, Llama3, Rope, Scaling, Yarn, yarn_attention_factor
from dibit.engine.models.spec import Arch, Sizes

_HARMLESS = """
  architectures model_type auto_map transformers_version torch_dtype dtype use_cache use_bfloat16 torchscript
  transformers.js_config tokenizer_class model_max_length max_sequence_length vocab_file pretraining_dtype
  bos_token_id eos_token_id pad_token_id unk_token_id sep_token_id cls_token_id mask_token_id prefix
  decoder_start_token_id forced_bos_token_id forced_eos_token_id suppress_tokens begin_suppress_tokens
  attention_dropout hidden_dropout resid_dropout embd_dropout embd_pdrop resid_pdrop attn_pdrop dropout
  initializer_range gradient_checkpointing neftune_noise_alpha router_aux_loss_coef z_loss
  output_attentions output_hidden_states return_dict return_dict_in_generate output_scores
  id2label label2id num_labels problem_type finetuning_task task_specific_params tie_encoder_decoder
  max_length min_length do_sample early_stopping num_beams num_beam_groups diversity_penalty temperature top_k top_p
  typical_p repetition_penalty length_penalty no_repeat_ngram_size encoder_no_repeat_ngram_size bad_words_ids
  num_return_sequences exponential_decay_length_penalty remove_invalid_values
  quantization_config compression_config unsloth_fixed unsloth_version is_llama_config max_window_layers
  attn_implementation flash_attention base_model tf_legacy_loss finetuned
"""
HARMLESS = frozenset(_HARMLESS.split())
NEUTRAL: dict[str, tuple[Any, ...]] = {
    "hidden_act": ("silu", "swish"),
    "attention_bias": (False,),
    "mlp_bias": (False,),
    "pretraining_tp": (0, 1),
    "chunk_size_feed_forward": (0,),
    "is_decoder": (True, False),
    "is_encoder_decoder": (False,),
    "add_cross_attention": (False,),
    "pruned_heads": ({},),
    "rope_interleaved": (False,),
    "partial_rotary_factor": (1, 1.0),
    "use_sliding_window": (False,),
    "qk_norm": (False,),
    "use_qk_norm": (False,),
    "use_mup": (False,),
    "embedding_multiplier": (1, 1.0),
    "residual_multiplier": (1, 1.0),
    "logits_scaling": (1, 1.0),
    "logit_scale": (1, 1.0),
}
ROPE_KEYS = {
    "default": (),
    "linear": ("factor",),
    "dynamic": ("factor", "original_max_position_embeddings"),
    "llama3": ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings"),
    "yarn": (
        "factor",
        "original_max_position_embeddings",
        "attention_factor",
        "beta_fast",
        "beta_slow",
        "mscale",
        "mscale_all_dim",
        "truncate",
    ),
}


def read_sizes(arch: Arch, config: Mapping[str, Any]) -> Sizes:
    """The sizes that a config states. Raises CheckpointError for a key or value that would be computed wrongly."""
    keys = _Keys(arch, config)
    hidden, heads = keys.positive("hidden_size"), keys.positive("num_attention_heads")
    kv_heads = keys.positive("num_key_value_heads", heads)
    if heads % kv_heads:
        raise CheckpointError(
            f"num_attention_heads is {heads} and num_key_value_heads {kv_heads}; the first must be a multiple of the "
            "second, so config.json is broken"
        )
    head_dim = keys.positive("head_dim", hidden // heads)
    if head_dim * heads != hidden and keys.take("head_dim") is None:
        raise CheckpointError(
            f"hidden_size is {hidden} and num_attention_heads {heads}; without head_dim the first must be a multiple "
            "of the second, so config.json is broken"
        )
    if head_dim % 2:
        raise CheckpointError(f"head_dim is {head_dim}; rotary positions need an even one, so config.json is broken")
    max_positions = keys.positive("max_position_embeddings")
    rope = _rope(keys, head_dim=head_dim, max_positions=max_positions)
    if isinstance(rope.scaling, Linear):
        # Vicuna's 16k models name the stretched length here and leave the original one above.
        max_positions = max(max_positions, keys.positive("max_sequence_length", max_positions))
    sized = arch.biases == "config"
    attention_bias = sized and keys.flag("attention_bias")
    mlp_bias = sized and keys.flag("mlp_bias")
    if arch.window == "refuse" or (arch.window == "switch" and keys.flag("use_sliding_window")):
        _refuse_window(keys, max_positions)
    elif arch.window == "switch":
        # Written even where it is switched off.
        keys.take("sliding_window")
    sizes = Sizes(
        layers=keys.positive("num_hidden_layers"),
        hidden=hidden,
        intermediate=keys.positive("intermediate_size"),
        heads=heads,
        kv_heads=kv_heads,
        head_dim=head_dim,
        vocab=keys.positive("vocab_size"),
        max_positions=max_positions,
        norm_eps=keys.number("rms_norm_eps", 1e-6),
        tied_head=keys.flag("tie_word_embeddings"),
        rope=rope,
        qkv_bias=attention_bias or arch.biases == "qkv",
        o_bias=attention_bias,
        mlp_bias=mlp_bias,
    )
    keys.finish()
    return sizes


class _Keys:
    """A config of which every key must be taken."""

    def __init__(self, arch: Arch, config: Mapping[str, Any], where: str = "config.json") -> None:
        self.arch = arch
        self.config = config
        self.where = where
        self.taken: set[str] = set()

    def take(self, key: str, default: Any = None) -> Any:
        self.taken.add(key)
        value = self.config.get(key)
        return self.arch.defaults.get(key, default) if value is None and key not in self.config else value

    def positive(self, key: str, default: int | None = None) -> int:
        value = self.take(key, default)
        if value is None:
            value = default
        if value is None:
            raise self.wrong(key, "is missing", "an integer of at least 1")
        # A width written as 4096.0 is a width.
        if isinstance(value, float) and value.is_integer():
            value = int(value)
        if isinstance(value, bool) or not isinstance(value, int) or value < 1:
            raise self.wrong(key, f"is {value!r}", "an integer of at least 1")
        return value

    def number(self, key: str, default: float | None = None, *, low: float = 0.0) -> float:
        value = self.take(key, default)
        if value is None:
            value = default
        if value is None:
            raise self.wrong(key, "is missing", f"a number above {low:g}")
        if isinstance(value, bool) or not isinstance(value, int | float) or not low < value < math.inf:
            raise self.wrong(key, f"is {value!r}", f"a finite number above {low:g}")
        return float(value)

    def flag(self, key: str, *, default: bool = False) -> bool:
        value = self.take(key, default)
        if value is None:
            return default
        if not isinstance(value, bool):
            raise self.wrong(key, f"is {value!r}", "true or false")
        return value

    def wrong(self, key: str, found: str, supported: str) -> CheckpointError:
        return CheckpointError(
            f"{key} {found} in {self.where}; supported: {supported}. Correct the file, if it is yours"
        )

    def finish(self) -> None:
        for key, value in self.config.items():
            if value is None or key in self.taken or key in HARMLESS or key.startswith("_"):
                continue
            if key == "layer_types" and isinstance(value, list) and set(value) <= {"full_attention"}:
                continue
            if key not in NEUTRAL:
                raise CheckpointError(
                    f"{key} is {value!r} in {self.where}, and {self.arch.name} models have no such key: it may change "
                    "what the model computes, so the model is refused. Remove the key if it changes nothing"
                )
            if value not in NEUTRAL[key]:
                allowed = " or ".join(repr(v) for v in NEUTRAL[key])
                raise CheckpointError(
                    f"{key} is {value!r} in {self.where}; supported: {allowed}. The model would be computed wrongly; "
                    "choose a checkpoint without it"
                )


def _refuse_window(keys: _Keys, max_positions: int) -> None:
    window = keys.take("sliding_window")
    if window is not None and window < max_positions:
        raise CheckpointError(
            f"sliding_window is {window!r} (context {max_positions}); sliding-window attention is not supported yet. "
            "Choose a checkpoint with sliding_window null (Mistral 0.2 and later have none)"
        )


def _rope(keys: _Keys, *, head_dim: int, max_positions: int) -> Rope:
    """Both spellings: rope_theta beside rope_scaling, or rope_parameters that holds both."""
    theta, scaling = keys.take("rope_theta"), keys.take("rope_scaling")
    parameters = keys.take("rope_parameters")
    original = keys.take("original_max_position_embeddings")
    for name, value in (("rope_scaling", scaling), ("rope_parameters", parameters)):
        if value is not None and not isinstance(value, Mapping):
            raise keys.wrong(name, f"is {value!r}", "an object or null")
    given: dict[str, Any] = {"rope_theta": 10000.0 if theta is None else theta}
    if original is not None:
        given["original_max_position_embeddings"] = original
    given.update({k: v for k, v in {**(scaling or {}), **(parameters or {})}.items() if v is not None})
    kind = given.pop("rope_type", given.get("type", "default"))
    given.pop("type", None)
    if kind not in ROPE_KEYS:
        raise CheckpointError(
            f"rope scaling of type {kind!r} in config.json; supported: {', '.join(ROPE_KEYS)}. Choose another model"
        )
    law = _Keys(keys.arch, given, where=f"the {kind} rope scaling of config.json")
    base = law.number("rope_theta")
    rotary = law.number("partial_rotary_factor", 1.0)
    if rotary != 1.0:
        raise law.wrong("partial_rotary_factor", f"is {rotary!r}", "1.0")
    for key in ROPE_KEYS[kind]:
        law.take(key)
    # Older tools leave the length here whatever the law.
    law.take("original_max_position_embeddings")
    rope = Rope(theta=base, dim=head_dim, scaling=_scaling(kind, law, max_positions=max_positions))
    law.finish()
    return rope


def _scaling(kind: str, law: _Keys, *, max_positions: int) -> Scaling | None:
    if kind == "default":
        return None
    factor = law.number("factor")
    original = law.positive("original_max_position_embeddings", max_positions)
    if kind == "linear":
        return Linear(factor)
    if kind == "dynamic":
        return Dynamic(factor, max_positions)
    if kind == "llama3":
        low, high = law.number("low_freq_factor"), law.number("high_freq_factor")
        if high <= low:
            raise law.wrong("high_freq_factor", f"is {high:g}", f"a number above low_freq_factor ({low:g})")
        return Llama3(factor, low, high, original)
    mscale = law.number("mscale", 0.0, low=-1.0), law.number("mscale_all_dim", 0.0, low=-1.0)
    attention_factor = law.number("attention_factor", yarn_attention_factor(factor, *mscale))
    fast, slow = law.number("beta_fast", 32.0), law.number("beta_slow", 1.0)
    return Yarn(factor, original, attention_factor, fast, slow, law.flag("truncate", default=True))
