"""Checkpoints of real shapes with random weights: speed does not depend on what the weights are.

Low-bit linears are random words, written as they are; no floats are quantized, so a model of a billion weights takes
seconds. The GGUF twin for llama.cpp is a float16 file for its own quantizer. Both have the same structure: Llama,
with a tied head.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import torch
from safetensors.torch import save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from torch import Tensor

from dibit.engine.checkpoint.words import pack_dense

# Values of float weights are taken from a pool this large, again and again: drawing them would be most of the time.
_POOL = 1 << 24


@dataclass(frozen=True)
class Shape:
    """Sizes of a Llama."""

    hidden: int
    layers: int
    inter: int
    heads: int
    kv_heads: int
    vocab: int
    context: int = 4096
    rope_theta: float = 500000.0
    norm_eps: float = 1e-5

    @property
    def head_dim(self) -> int:
        return self.hidden // self.heads

    def linears(self) -> Iterator[tuple[str, str, int, int]]:
        """(name within the block here, in GGUF, outputs, inputs)."""
        kv = self.kv_heads * self.head_dim
        yield "self_attn.q_proj", "attn_q", self.hidden, self.hidden
        yield "self_attn.k_proj", "attn_k", kv, self.hidden
        yield "self_attn.v_proj", "attn_v", kv, self.hidden
        yield "self_attn.o_proj", "attn_output", self.hidden, self.hidden
        yield "mlp.gate_proj", "ffn_gate", self.inter, self.hidden
        yield "mlp.up_proj", "ffn_up", self.inter, self.hidden
        yield "mlp.down_proj", "ffn_down", self.hidden, self.inter

    def config(self) -> dict[str, Any]:
        return {
            "architectures": ["LlamaForCausalLM"],
            "model_type": "llama",
            "hidden_size": self.hidden,
            "intermediate_size": self.inter,
            "num_hidden_layers": self.layers,
            "num_attention_heads": self.heads,
            "num_key_value_heads": self.kv_heads,
            "head_dim": self.head_dim,
            "vocab_size": self.vocab,
            "max_position_embeddings": self.context,
            "rope_theta": self.rope_theta,
            "rms_norm_eps": self.norm_eps,
            "hidden_act": "silu",
            "tie_word_embeddings": True,
            "torch_dtype": "float16",
        }


LLAMA_1B = Shape(hidden=2048, layers=16, inter=8192, heads=32, kv_heads=8, vocab=128256)
SMOLLM2_135M = Shape(
    hidden=576, layers=30, inter=1536, heads=9, kv_heads=3, vocab=49152, context=8192, rope_theta=100000.0
)


def write_low_bit(out: Path, shape: Shape, *, bits: int, group_size: int = 64, seed: int = 0) -> None:
    """A GPTQ v2 checkpoint with random codes; the embedding, which is the head, in float16."""
    draw = torch.Generator().manual_seed(seed)
    tensors: dict[str, Tensor] = {}
    for layer in range(shape.layers):
        for name, _, n, k in shape.linears():
            module = f"model.layers.{layer}.{name}"
            packed = _random_linear(n, k, bits=bits, group_size=group_size, draw=draw)
            tensors |= {f"{module}.{part}": tensor for part, tensor in packed.items()}
        for norm in ("input_layernorm", "post_attention_layernorm"):
            tensors[f"model.layers.{layer}.{norm}.weight"] = torch.ones(shape.hidden, dtype=torch.float16)
    tensors["model.norm.weight"] = torch.ones(shape.hidden, dtype=torch.float16)
    pool = torch.randn(min(_POOL, shape.vocab * shape.hidden), generator=draw).half()
    repeats = -(-shape.vocab * shape.hidden // len(pool))
    embedding = pool.repeat(repeats)[: shape.vocab * shape.hidden].reshape(shape.vocab, shape.hidden)
    tensors["model.embed_tokens.weight"] = embedding.contiguous()
    quantization = {"quant_method": "gptq", "checkpoint_format": "gptq_v2", "bits": bits, "group_size": group_size}
    config = shape.config() | {"quantization_config": {**quantization, "sym": True, "desc_act": False}}
    aside = out.with_name(out.name + ".partial")
    aside.mkdir(parents=True, exist_ok=True)
    (aside / "config.json").write_text(json.dumps(config, indent=2))
    write_tokenizer(aside, shape.vocab)
    save_file(tensors, aside / "model.safetensors", metadata={"format": "pt"})
    aside.rename(out)


def write_gguf(out: Path, shape: Shape, *, seed: int = 0) -> None:
    """The float16 twin, without a vocabulary."""
    pool = np.random.default_rng(seed).standard_normal(_POOL, dtype=np.float32).astype(np.float16)
    aside = out.with_name(out.name + ".partial")
    writer = gguf.GGUFWriter(aside, "llama")
    writer.add_context_length(shape.context)
    writer.add_embedding_length(shape.hidden)
    writer.add_block_count(shape.layers)
    writer.add_feed_forward_length(shape.inter)
    writer.add_head_count(shape.heads)
    writer.add_head_count_kv(shape.kv_heads)
    writer.add_layer_norm_rms_eps(shape.norm_eps)
    writer.add_rope_freq_base(shape.rope_theta)
    writer.add_rope_dimension_count(shape.head_dim)
    writer.add_vocab_size(shape.vocab)
    writer.add_file_type(gguf.LlamaFileType.MOSTLY_F16)
    writer.add_tokenizer_model("no_vocab")

    def add(name: str, n: int, k: int, scale: float) -> None:
        values = np.resize(pool, n * k).reshape(n, k)
        writer.add_tensor(f"{name}.weight", values * np.float16(scale))

    add("token_embd", shape.vocab, shape.hidden, 1.0)
    ones = np.ones(shape.hidden, dtype=np.float32)
    for layer in range(shape.layers):
        for _, name, n, k in shape.linears():
            add(f"blk.{layer}.{name}", n, k, k**-0.5)
        for norm in ("attn_norm", "ffn_norm"):
            writer.add_tensor(f"blk.{layer}.{norm}.weight", ones)
    writer.add_tensor("output_norm.weight", ones)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    aside.rename(out)


def _random_linear(n: int, k: int, *, bits: int, group_size: int, draw: torch.Generator) -> dict[str, Tensor]:
    """Codes are every bit pattern; zero points in the middle, scales such that outputs stay as large as inputs."""
    groups = k // group_size
    middle = torch.full((groups, n), 1 << (bits - 1), dtype=torch.uint8)
    step = k**-0.5 * 12**0.5 / (1 << bits)
    low, high = torch.iinfo(torch.int32).min, torch.iinfo(torch.int32).max
    return {
        "qweight": torch.randint(low, high, (k * bits // 32, n), dtype=torch.int32, generator=draw),
        "qzeros": pack_dense(middle, bits),
        "scales": torch.full((groups, n), step, dtype=torch.float16),
        "g_idx": (torch.arange(k) // group_size).to(torch.int32),
    }


def write_tokenizer(directory: Path, vocab: int) -> None:
    """The 256 bytes, and words that no text is made of."""
    entries = {letter: i for i, letter in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    for i in range(len(entries), vocab):
        entries[f"word{i}"] = i
    tokenizer = Tokenizer(models.BPE(vocab=entries, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.save(str(directory / "tokenizer.json"))
    (directory / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "PreTrainedTokenizerFast"}))
