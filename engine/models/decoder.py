"""The one decoder. A `Block` is defined once and run two ways.

`dense` is for training and quantizing: whole sequences [B, T, hidden], plain causal attention, differentiable torch
ops. `paged` is for serving: a step's tokens [T, hidden] over the paged KV cache, through the kernels resolved at
load. What stands between norms and attention is pluggable: any callable [.., K] -> [.., N] may be a site's linear.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from dibit.engine.batch import Batch
from dibit.engine.kv_cache import KVCache
from dibit.engine.models.spec import Arch, Part, Sizes, head_norm_names, norm_names, sites
from dibit.engine.models.weights import Weights, read_bias, read_float_site, read_linear, read_tensor
from dibit.kernels.activation import silu_mul_reference
from dibit.kernels.concat import concat_reference
from dibit.kernels.dispatch import Backend, resolve
from dibit.kernels.formats import Format, QTensor, dequantize
from dibit.kernels.norm import rms_norm_reference
from dibit.kernels.rope import rotate

MLP_BYTES = 8 << 20
"""Of a prompt's activations inside an MLP at once on the CPU, gate and up; pieces have 128 tokens at least, so that
reading the weights once more for each costs nothing. The widest there are: 25 MB for 256 tokens of an 8192 wide one."""

# The last block's output and the residual stream that it is still to be added to; None: the output is all of it. What a
# block hands to the next one is theirs (fused_block.py).
Stream = tuple[Any, Tensor | None]


class Linear(Protocol):
    """x [.., K] -> [.., N]."""

    def __call__(self, x: Tensor, /) -> Tensor: ...


@dataclass(slots=True)
class FloatLinear:
    """weight [N, K], bias [N] or None."""

    weight: Tensor
    bias: Tensor | None = None

    def __call__(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight, self.bias)

    @property
    def nbytes(self) -> int:
        return self.weight.nbytes + (0 if self.bias is None else self.bias.nbytes)


@dataclass(slots=True)
class PackedLinear:
    """A quantized weight in the layout of the backend whose `run` computes with it; x [M, K] only.

    activation_bits  width to which x is rounded first, a token at a time; None: left to the backend
    """

    run: Callable[..., Tensor]
    weight: Any
    bias: Tensor | None
    nbytes: int
    activation_bits: int | None = None

    def __call__(self, x: Tensor) -> Tensor:
        if self.activation_bits is None:
            return self.run(x, self.weight, self.bias)
        return self.run(x, self.weight, self.bias, activation_bits=self.activation_bits)


@dataclass(slots=True)
class SideBySide:
    """A fused site whose parts have different formats: each segment computed by its own linear."""

    segments: tuple[Linear, ...]
    concat: Callable[[Sequence[Tensor]], Tensor] = concat_reference

    def __call__(self, x: Tensor) -> Tensor:
        return self.concat([segment(x) for segment in self.segments])


@dataclass(frozen=True, slots=True)
class Ops:
    """The bodies that the serving path runs on, resolved once."""

    rms_norm: Callable[[Tensor, Tensor, float], Tensor]
    add_rms_norm: Callable[[Tensor, Tensor, Tensor, float], tuple[Tensor, Tensor]]
    head_norm: Callable[[Tensor, Tensor, Tensor, int, float], Tensor]
    rope_kv_write: Callable[[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, int], Tensor]
    paged_attention: Callable[[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, float], Tensor]
    silu_mul: Callable[[Tensor], Tensor]
    concat: Callable[[Sequence[Tensor]], Tensor]
    argmax: Callable[[Tensor], tuple[Tensor, Tensor]]

    @classmethod
    def resolve(cls, *, device: str, backend: Backend = "auto") -> Ops:
        """Raises NoKernel when an explicit backend lacks one."""
        return cls(**{name: resolve(name, device=device, backend=backend).run for name in cls.__slots__})


class Block:
    """Attention and MLP, each behind a norm and added to the residual stream.

    linears    "qkv" (q, k, v side by side), "o", "gate_up" (gate, up), "down"
    attn_norm  [hidden], mlp_norm [hidden]
    head_norms  of every query and of every key [D], before the rotary positions, or none
    ops        needed by `paged` only
    """

    def __init__(
        self,
        sizes: Sizes,
        *,
        linears: dict[str, Linear],
        attn_norm: Tensor,
        mlp_norm: Tensor,
        head_norms: tuple[Tensor, ...] = (),
        ops: Ops | None = None,
    ) -> None:
        self.sizes = sizes
        self.linears = linears
        self.attn_norm = attn_norm
        self.mlp_norm = mlp_norm
        self.head_norms = head_norms
        self.ops = ops
        self.scale = sizes.head_dim**-0.5
        self._mlp_tokens = max(128, MLP_BYTES // (8 * sizes.intermediate))

    def with_linears(
        self, linears: dict[str, Linear], *, attn_norm: Tensor | None = None, mlp_norm: Tensor | None = None
    ) -> Block:
        """This block for `dense` with other linears, and other norms where they are given."""
        return Block(
            self.sizes,
            linears=linears,
            attn_norm=self.attn_norm if attn_norm is None else attn_norm,
            mlp_norm=self.mlp_norm if mlp_norm is None else mlp_norm,
            head_norms=self.head_norms,
        )

    def dense(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        """Whole sequences from position 0: x [B, T, hidden], cos and sin [>= T, D/2] -> [B, T, hidden]."""
        h = x + self.dense_attention(x, cos, sin)
        return h + self.dense_mlp(h)

    def dense_attention(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        """What attention adds to x, both [B, T, hidden]."""
        return self.linears["o"](self._attend(self.linears["qkv"](self._norm(x, self.attn_norm)), cos, sin))

    def dense_mlp(self, h: Tensor) -> Tensor:
        """What the MLP adds to h, both [.., hidden]."""
        return self.linears["down"](silu_mul_reference(self.linears["gate_up"](self._norm(h, self.mlp_norm))))

    def _norm(self, x: Tensor, weight: Tensor) -> Tensor:
        return rms_norm_reference(x, weight, self.sizes.norm_eps)

    def _attend(self, qkv: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        sizes = self.sizes
        b, t, _ = qkv.shape
        # [B, T, H or KH, D]
        q = qkv[..., : sizes.q_width].view(b, t, sizes.heads, sizes.head_dim)
        k, v = qkv[..., sizes.q_width :].view(b, t, 2 * sizes.kv_heads, sizes.head_dim).chunk(2, dim=2)
        if self.head_norms:
            q, k = (self._norm(x, norm) for x, norm in zip((q, k), self.head_norms, strict=True))
        q, k = rotate(q, cos[:t], sin[:t]), rotate(k, cos[:t], sin[:t])
        repeat = sizes.heads // sizes.kv_heads
        # [B, H, T, D]
        q, k, v = q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)
        k, v = k.repeat_interleave(repeat, dim=1), v.repeat_interleave(repeat, dim=1)
        attended = F.scaled_dot_product_attention(q, k, v, is_causal=True, scale=self.scale)
        return attended.transpose(1, 2).reshape(b, t, sizes.q_width)

    def paged(
        self,
        x: Tensor,
        residual: Tensor | None,
        batch: Batch,
        k_cache: Tensor,
        v_cache: Tensor,
        cos: Tensor,
        sin: Tensor,
        rows: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:
        """One step: x [T, hidden] (the last MLP's output) and residual [T, hidden] (None: x is the whole stream)
        -> the same pair, their sum still owed. `rows` [R] keeps those tokens only once the keys are written."""
        ops, eps, linears = self.ops, self.sizes.norm_eps, self.linears
        if ops is None:
            raise TypeError("this Block was built without serving ops; it can only run `dense`")
        if residual is None:
            h, residual = ops.rms_norm(x, self.attn_norm, eps), x
        else:
            h, residual = ops.add_rms_norm(x, residual, self.attn_norm, eps)
        qkv = linears["qkv"](h)
        if self.head_norms:
            q_norm, k_norm = self.head_norms
            qkv = ops.head_norm(qkv, q_norm, k_norm, self.sizes.heads, eps)
        q = ops.rope_kv_write(qkv, batch.positions, cos, sin, k_cache, v_cache, batch.slots, self.sizes.heads)
        attended = ops.paged_attention(
            q, k_cache, v_cache, batch.cu_seqlens, batch.seq_lens, batch.block_tables, self.scale
        )
        if rows is not None:
            attended, residual = attended[rows], residual[rows]
        h, residual = ops.add_rms_norm(linears["o"](attended), residual, self.mlp_norm, eps)

        def mlp(h: Tensor) -> Tensor:
            return linears["down"](ops.silu_mul(linears["gate_up"](h)))

        # Tokens do not meet here. A step of one token a sequence goes on a tape, which knows no torch.cat.
        if h.shape[0] <= self._mlp_tokens or h.shape[0] == batch.seq_lens.shape[0] or not h.is_cpu:
            return mlp(h), residual
        return torch.cat([mlp(piece) for piece in torch.split(h, self._mlp_tokens)]), residual


class Decoder:
    """Embedding, blocks, final norm, head, ready to serve.

    embedding   ids [T] -> [T, hidden] float32
    head        hidden states [R, hidden] -> logits [R, vocab]
    nbytes      bytes of all weights as held
    step_bytes  bytes of weights that a step reads whole: all but an embedding that is not the head too
    format      the format of most of the blocks' weights; None when they are floats
    """

    def __init__(
        self,
        arch: Arch,
        sizes: Sizes,
        *,
        embedding: Callable[[Tensor], Tensor],
        blocks: Sequence[Block],
        final_norm: Tensor,
        head: Linear,
        ops: Ops,
        nbytes: int,
        step_bytes: int,
        format: Format | None,
        device: torch.device,
    ) -> None:
        self.arch = arch
        self.sizes = sizes
        self.embedding = embedding
        self.blocks = tuple(blocks)
        self.final_norm = final_norm
        self.head = head
        self.ops = ops
        self.nbytes = nbytes
        self.step_bytes = step_bytes
        self.format = format
        self.device = device

    @property
    def quantized(self) -> bool:
        return self.format is not None

    def packed_weights(self) -> Iterator[Any]:
        """The quantized weights in their backend's layout, the head's included."""
        linears = [linear for block in self.blocks for linear in block.linears.values()]
        while linears:
            linear = linears.pop()
            if isinstance(linear, SideBySide):
                linears += linear.segments
            elif isinstance(linear, PackedLinear):
                yield linear.weight
        if isinstance(self.head, PackedLinear):
            yield self.head.weight

    def hidden(self, batch: Batch, cache: KVCache, cos: Tensor, sin: Tensor) -> Tensor:
        """Run a step, writing its keys and values: normalized final hidden states [R, hidden] of batch.rows."""
        return self.normed(self.through((self.embedding(batch.tokens), None), batch, cache, cos, sin))

    def through(
        self,
        stream: Stream,
        batch: Batch,
        cache: KVCache,
        cos: Tensor,
        sin: Tensor,
        *,
        first: int = 0,
        stop: int | None = None,
    ) -> Stream:
        """Run blocks [first, stop) of a step, the last block's output being that of batch.rows. What `stream` holds is
        overwritten."""
        x, residual = stream
        last = len(self.blocks) - 1
        for i in range(first, len(self.blocks) if stop is None else stop):
            rows = batch.rows if i == last else None
            x, residual = self.blocks[i].paged(x, residual, batch, cache.k[i], cache.v[i], cos, sin, rows)
        return x, residual

    def normed(self, stream: Stream) -> Tensor:
        """The final hidden states of what has been through all blocks."""
        x, residual = stream
        assert residual is not None  # a model has at least one layer
        return self.ops.add_rms_norm(x, residual, self.final_norm, self.sizes.norm_eps)[0]

    def logits(self, hidden: Tensor) -> Tensor:
        """[R, hidden] -> [R, vocab] float32."""
        return self.head(hidden)


def load_float_block(
    weights: Weights, arch: Arch, sizes: Sizes, layer: int, *, dtype: torch.dtype = torch.float32
) -> Block:
    """A block for `dense`, its weights as floats (those of a quantized checkpoint dequantized)."""
    attn_norm, mlp_norm = (read_tensor(weights, name, (sizes.hidden,), dtype) for name in norm_names(arch, layer))
    linears: dict[str, Linear] = {
        site.key: FloatLinear(read_float_site(weights, site, dtype), read_bias(weights, site, dtype))
        for site in sites(arch, sizes, layer)
    }
    heads = tuple(read_tensor(weights, name, (sizes.head_dim,), dtype) for name in head_norm_names(arch, layer))
    return Block(sizes, linears=linears, attn_norm=attn_norm, mlp_norm=mlp_norm, head_norms=heads)


def load_embedding(weights: Weights, arch: Arch, sizes: Sizes, *, dtype: torch.dtype = torch.float32) -> Tensor:
    """The token embedding [vocab, hidden]."""
    return read_tensor(weights, f"{arch.embedding}.weight", (sizes.vocab, sizes.hidden), dtype)


def load_head(weights: Weights, arch: Arch, sizes: Sizes) -> Tensor:
    """The head as floats, [vocab, hidden]; of a model that ties the two, the token embedding."""
    if sizes.tied_head:
        return load_embedding(weights, arch, sizes)
    found = read_linear(weights, Part(arch.head, sizes.vocab), sizes.hidden)
    return dequantize(found) if isinstance(found, QTensor) else found.float()
