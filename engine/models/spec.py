"""What a decoder is, as data: structure per family (`Arch`), sizes per checkpoint (`Sizes`), linears as `LinearSite`s.

Everything that reads weights goes by this listing: serving fuses the parts of a site, quantization groups sites by
the hidden state that feeds them, and neither has code per family. The reader of config.json is strict: a key that
changes the computation is understood or refused (config.py), so that a model never runs as something it is not.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

from dibit.engine.models.rope import Rope


@dataclass(frozen=True)
class Arch:
    """The structure that all checkpoints of a family share; names are Hugging Face module paths.

    biases       "config": attention_bias and mlp_bias say so; "qkv": q, k and v always have one, others never; "none":
                 there never are any
    window       sliding windows, which are not supported: "refuse": the family has them; "switch": use_sliding_window
                 turns them on; "none": it has no such key
    defaults     values that the family gives to keys which a config leaves out
    q_norm, k_norm  norms of every head's query and key before the rotary positions; empty: there are none
    """

    name: str
    hf_names: tuple[str, ...]
    biases: Literal["config", "qkv", "none"] = "none"
    window: Literal["refuse", "switch", "none"] = "none"
    defaults: Mapping[str, int | float | None] = field(default_factory=dict)

    layer: str = "model.layers.{layer}"
    attn_norm: str = "input_layernorm"
    q: str = "self_attn.q_proj"
    k: str = "self_attn.k_proj"
    v: str = "self_attn.v_proj"
    q_norm: str = ""
    k_norm: str = ""
    o: str = "self_attn.o_proj"
    mlp_norm: str = "post_attention_layernorm"
    gate: str = "mlp.gate_proj"
    up: str = "mlp.up_proj"
    down: str = "mlp.down_proj"
    embedding: str = "model.embed_tokens"
    final_norm: str = "model.norm"
    head: str = "lm_head"

    def module(self, layer: int, name: str) -> str:
        """Full path of a block's module, e.g. "model.layers.3.self_attn.q_proj"."""
        return f"{self.layer.format(layer=layer)}.{name}"


@dataclass(frozen=True)
class Sizes:
    """The numbers of one checkpoint. `max_positions` is the longest sequence the model is meant for."""

    layers: int
    hidden: int
    intermediate: int
    heads: int
    kv_heads: int
    head_dim: int
    vocab: int
    max_positions: int
    norm_eps: float
    tied_head: bool
    rope: Rope
    qkv_bias: bool = False
    o_bias: bool = False
    mlp_bias: bool = False

    @property
    def q_width(self) -> int:
        return self.heads * self.head_dim

    @property
    def kv_width(self) -> int:
        return self.kv_heads * self.head_dim


@dataclass(frozen=True)
class Part:
    """One linear of the checkpoint: its module path and its number of outputs."""

    module: str
    n: int


@dataclass(frozen=True)
class LinearSite:
    """One product of a block, [.., k] -> [.., n]: the outputs of its parts side by side.

    name   "layers.3.qkv"; the last word is its key in Block.linears
    input  the hidden state that feeds it ("layers.3.attn_in"); sites with one input share statistics
    bias   every part has a bias
    """

    name: str
    parts: tuple[Part, ...]
    n: int
    k: int
    input: str
    bias: bool

    @property
    def key(self) -> str:
        return self.name.rpartition(".")[2]


def sites(arch: Arch, sizes: Sizes, layer: int) -> tuple[LinearSite, ...]:
    """The linears of a block in the order of computation: qkv, o, gate_up, down."""

    def site(key: str, parts: tuple[tuple[str, int], ...], k: int, source: str, *, bias: bool) -> LinearSite:
        listed = tuple(Part(arch.module(layer, name), n) for name, n in parts)
        total = sum(part.n for part in listed)
        return LinearSite(f"layers.{layer}.{key}", listed, total, k, f"layers.{layer}.{source}", bias)

    q, kv, hidden, mlp = sizes.q_width, sizes.kv_width, sizes.hidden, sizes.intermediate
    return (
        site("qkv", ((arch.q, q), (arch.k, kv), (arch.v, kv)), hidden, "attn_in", bias=sizes.qkv_bias),
        site("o", ((arch.o, hidden),), q, "attn_out", bias=sizes.o_bias),
        site("gate_up", ((arch.gate, mlp), (arch.up, mlp)), hidden, "mlp_in", bias=sizes.mlp_bias),
        site("down", ((arch.down, hidden),), mlp, "mlp_mid", bias=sizes.mlp_bias),
    )


def norm_names(arch: Arch, layer: int) -> tuple[str, str]:
    """Tensor names of a block's two norm weights: before attention, before the MLP."""
    return f"{arch.module(layer, arch.attn_norm)}.weight", f"{arch.module(layer, arch.mlp_norm)}.weight"


def head_norm_names(arch: Arch, layer: int) -> tuple[str, ...]:
    """Tensor names of a block's norms [head_dim] of queries and keys; none for families without."""
    return tuple(f"{arch.module(layer, name)}.weight" for name in (arch.q_norm, arch.k_norm) if name)


def float_shapes(arch: Arch, sizes: Sizes) -> dict[str, tuple[int, ...]]:
    """Every tensor that a float checkpoint of this model holds, with its shape.

    In a quantized checkpoint the ".weight" of some modules is replaced by the tensors of its packed form.
    """
    shapes: dict[str, tuple[int, ...]] = {
        f"{arch.embedding}.weight": (sizes.vocab, sizes.hidden),
        f"{arch.final_norm}.weight": (sizes.hidden,),
    }
    if not sizes.tied_head:
        shapes[f"{arch.head}.weight"] = (sizes.vocab, sizes.hidden)
    for layer in range(sizes.layers):
        shapes.update((name, (sizes.hidden,)) for name in norm_names(arch, layer))
        shapes.update((name, (sizes.head_dim,)) for name in head_norm_names(arch, layer))
        for site in sites(arch, sizes, layer):
            for part in site.parts:
                shapes[f"{part.module}.weight"] = (part.n, site.k)
                if site.bias:
                    shapes[f"{part.module}.bias"] = (part.n,)
    return shapes
