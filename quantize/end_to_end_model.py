"""A whole low-bit model whose step sizes and norms are trained, in the memory of one block of floats.

Codes and zero points stay packed and are dequantized block by block, once for the forward pass and once more when the
block is computed again for its gradients, from the hidden states kept at its entrance (Chen, Xu, Zhang and Guestrin,
"Training Deep Nets with Sublinear Memory Cost", 2016). So memory holds the packed model, one block as floats with what
its backward pass keeps, and the hidden states between blocks.

All that is trained lies in one vector, `values`, in units of its own: a step size in a power of two near the mean of
its site, a norm in one near its mean size. Dividing by a power of two loses nothing, so training starts exactly at the
checkpoint; and one rate means the same everywhere. The model computes with values rounded as a checkpoint stores
them; gradients pass the rounding unchanged.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from dibit.engine.checkpoint import Checkpoint
from dibit.engine.errors import CheckpointError
from dibit.engine.models.decoder import Block, FloatLinear, Linear, load_embedding, load_head
from dibit.engine.models.spec import Arch, LinearSite, Sizes, head_norm_names, norm_names, sites
from dibit.engine.models.weights import read_bias, read_linear, read_tensor
from dibit.kernels.formats import (
    Format,
    QTensor,
    pack_stream,
    round_scales,
    unpack_stream,
    zero_points,
)
from dibit.kernels.norm import rms_norm_reference
from dibit.quantize.activations import rounded_inputs
from dibit.quantize.fake_quantize import straight

# Stands for the width of float weights, where a norm scales nothing else.
FLOAT_BITS = 8.0
# A step size may shrink to this share of where it began.
LEAST_SCALE = 0.05


@dataclass(frozen=True)
class Slot:
    """A trained tensor: `values[start:stop]`, reshaped and multiplied by `unit`.

    scales  step sizes, else a norm
    bits    of the codes that it scales; of a norm's, the mean over the linears of its block, or of the model
    """

    name: str
    shape: tuple[int, ...]
    start: int
    unit: float
    scales: bool
    bits: float

    @property
    def stop(self) -> int:
        return self.start + math.prod(self.shape)


@dataclass(frozen=True)
class _Packed:
    """Codes [N, K] as words, zero points float32 [N, K/G]."""

    words: Tensor
    zeros: Tensor
    format: Format

    def codes(self) -> Tensor:
        """uint8 [N, K/G, G]."""
        return unpack_stream(self.words, self.format.bits).view(*self.zeros.shape, -1)


@dataclass(frozen=True)
class _Part:
    """One linear: packed with the slot of its step sizes, or a fixed float weight."""

    packed: _Packed | None
    slot: Slot | None
    weight: Tensor | None


@dataclass(frozen=True)
class _Site:
    key: str
    parts: tuple[_Part, ...]
    bias: Tensor | None


@dataclass(frozen=True)
class _Layer:
    sites: tuple[_Site, ...]
    norms: tuple[Tensor, Tensor]
    head_norms: tuple[Tensor, ...]
    slots: Mapping[str, Slot]


class _Dequantize(torch.autograd.Function):
    """Step sizes [N, K/G], rounded as they are stored, times the levels of a packed weight: float32 [N, K]."""

    @staticmethod
    def forward(ctx: Any, scales: Tensor, packed: _Packed) -> Tensor:
        codes = packed.codes()
        ctx.save_for_backward(codes, packed.zeros)
        levels = codes.float().sub_(packed.zeros[..., None])
        return levels.mul_(round_scales(scales)[..., None]).view(scales.shape[0], -1)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        codes, zeros = ctx.saved_tensors
        levels = codes.float().sub_(zeros[..., None])
        return levels.mul_(grads[0].reshape(levels.shape)).sum(dim=-1), None


class LowBitModel:
    """The checkpoint `source`, its step sizes (and with `norms` its norms) in `values`.

    values, grad   float32 [P]
    least          float32 [P], the smallest allowed value of each
    embedding, head  float32 [vocab, hidden]; one tensor where they are tied
    activation_bits  to which inputs of linears are rounded, as the checkpoint says

    Raises CheckpointError when no linear of it is packed, or one has step sizes that are not positive.
    """

    def __init__(self, source: Checkpoint, arch: Arch, sizes: Sizes, *, norms: bool) -> None:
        self.arch, self.sizes = arch, sizes
        self._source, self._norms = source, norms
        self.activation_bits = None if source.quantization is None else source.quantization.activation_bits
        self._slots: list[Slot] = []
        self._begin: list[Tensor] = []
        self.cos, self.sin = sizes.rope.tables(sizes.max_positions)
        self.embedding = load_embedding(source, arch, sizes)
        self.head = self.embedding if sizes.tied_head else load_head(source, arch, sizes)
        self._layers = tuple(self._layer(layer) for layer in range(sizes.layers))
        if not self._slots:
            raise CheckpointError(
                f"{source.name} has no packed linears, so there are no step sizes to train; give a checkpoint that "
                "`dibit quantize` or another tool has quantized"
            )
        name = f"{arch.final_norm}.weight"
        self._final_norm = read_tensor(source, name, (sizes.hidden,))
        self._final_slot = self._slot(name, self._final_norm, bits=_mean_bits(self._slots)) if norms else None
        self.values = torch.cat([value.reshape(-1) for value in self._begin])
        self.least = torch.full_like(self.values, -math.inf)
        for slot in self._slots:
            if slot.scales:
                self.least[slot.start : slot.stop] = self.values[slot.start : slot.stop] * LEAST_SCALE
        self._begin.clear()
        self.grad = torch.zeros_like(self.values)

    @property
    def weights(self) -> int:
        """How many weights the linears of the blocks have."""
        return sum(
            site.n * site.k for layer in range(self.sizes.layers) for site in sites(self.arch, self.sizes, layer)
        )

    @property
    def slots(self) -> Sequence[Slot]:
        return self._slots

    @torch.no_grad()
    def hidden(self, tokens: Tensor, *, keep: list[Tensor] | None = None) -> Tensor:
        """What leaves the last block, [B, T, hidden], for tokens [B, T]. `keep` takes what enters each block."""
        x = self.embedding[tokens]
        for layer in range(self.sizes.layers):
            if keep is not None:
                keep.append(x)
            x = self._block(layer, self._leaves(layer, trained=False)).dense(x, self.cos, self.sin)
        return x

    def backward(self, kept: list[Tensor], grad: Tensor) -> None:
        """Gradients of all step sizes and norms of the blocks into `self.grad`.

        kept  from `hidden`, emptied on the way
        grad  [B, T, hidden], of what left the last block
        """
        for layer in reversed(range(self.sizes.layers)):
            leaves = self._leaves(layer, trained=True)
            x = kept.pop().requires_grad_(layer > 0)
            with torch.enable_grad():
                y = self._block(layer, leaves).dense(x, self.cos, self.sin)
            wanted = [*leaves.values(), *([x] if layer > 0 else [])]
            found = torch.autograd.grad(y, wanted, grad)
            for name, own in zip(leaves, found, strict=False):
                slot = self._layers[layer].slots[name]
                self.grad[slot.start : slot.stop] = own.reshape(-1)
            grad = found[-1]

    def normed(self, x: Tensor) -> Tensor:
        """Final norm of x [R, hidden], without gradients."""
        with torch.no_grad():
            return rms_norm_reference(x, self._final(trained=False)[0], self.sizes.norm_eps)

    def normed_backward(self, x: Tensor, grad: Tensor) -> Tensor:
        """From the gradient of `normed(x)` that of x; that of the final norm goes into `self.grad`."""
        x = x.detach().requires_grad_()
        norm, leaf = self._final(trained=True)
        with torch.enable_grad():
            y = rms_norm_reference(x, norm, self.sizes.norm_eps)
        found = torch.autograd.grad(y, [x] if leaf is None else [x, leaf], grad)
        if self._final_slot is not None:
            self.grad[self._final_slot.start : self._final_slot.stop] = found[1]
        return found[0]

    def project(self) -> None:
        """Step sizes stay above the smallest allowed."""
        torch.maximum(self.values, self.least, out=self.values)

    def packed(self) -> Sequence[str]:
        """Modules that are packed."""
        return [slot.name for slot in self._slots if slot.scales]

    def quantized(self, module: str) -> QTensor:
        """A packed module as it is now: the codes and zero points of the checkpoint, the step sizes of `values`."""
        slot = next(slot for slot in self._slots if slot.name == module)
        found = self._source.linear(module)
        assert isinstance(found, QTensor)
        scales = round_scales(self._value(slot)).half()
        return QTensor(found.codes, found.zeros, scales, found.format)

    def norms(self) -> dict[str, Tensor]:
        """The trained norms by tensor name, in the type in which the checkpoint stores them."""
        own = [slot for slot in self._slots if not slot.scales]
        return {slot.name: self._value(slot).to(self._stored_type(slot.name)) for slot in own}

    def _value(self, slot: Slot) -> Tensor:
        return self.values[slot.start : slot.stop].view(slot.shape) * slot.unit

    def _stored_type(self, name: str) -> torch.dtype:
        return self._source.export(name).dtype

    def _layer(self, layer: int) -> _Layer:
        first = len(self._slots)
        own = tuple(self._site(site) for site in sites(self.arch, self.sizes, layer))
        names = norm_names(self.arch, layer)
        attn, mlp = (read_tensor(self._source, name, (self.sizes.hidden,)) for name in names)
        if self._norms:
            bits = _mean_bits(self._slots[first:])
            for name, norm in zip(names, (attn, mlp), strict=True):
                self._slot(name, norm, bits=bits)
        heads = head_norm_names(self.arch, layer)
        fixed = tuple(read_tensor(self._source, name, (self.sizes.head_dim,)) for name in heads)
        return _Layer(own, (attn, mlp), fixed, {slot.name: slot for slot in self._slots[first:]})

    def _site(self, site: LinearSite) -> _Site:
        parts = []
        for part in site.parts:
            found = read_linear(self._source, part, site.k)
            if not isinstance(found, QTensor):
                parts.append(_Part(None, None, found.float()))
                continue
            if not bool((found.scales > 0).all()):
                raise CheckpointError(
                    f"{part.module} has step sizes that are not positive, which cannot be trained; quantize the float "
                    "model again with `dibit quantize`"
                )
            words = pack_stream(found.codes, found.format.bits)
            scales = round_scales(found.scales.float())
            slot = self._slot(part.module, scales, bits=found.format.bits, scales=True)
            parts.append(_Part(_Packed(words, zero_points(found.zeros, found.format), found.format), slot, None))
        return _Site(site.key, tuple(parts), read_bias(self._source, site))

    def _slot(self, name: str, value: Tensor, *, bits: float, scales: bool = False) -> Slot:
        mean = float(value.abs().mean())
        unit = 2.0 ** round(math.log2(mean)) if mean > 0 else 1.0
        start = self._slots[-1].stop if self._slots else 0
        slot = Slot(name, tuple(value.shape), start, unit, scales, bits)
        self._slots.append(slot)
        self._begin.append(value / unit)
        return slot

    def _leaves(self, layer: int, *, trained: bool) -> dict[str, Tensor]:
        slots = self._layers[layer].slots.values()
        return {s.name: self.values[s.start : s.stop].view(s.shape).requires_grad_(trained) for s in slots}

    def _block(self, layer: int, leaves: Mapping[str, Tensor]) -> Block:
        own = self._layers[layer]
        linears: dict[str, Linear] = {}
        for site in own.sites:
            weights = [_weight(part, leaves) for part in site.parts]
            linears[site.key] = FloatLinear(weights[0] if len(weights) == 1 else torch.cat(weights), site.bias)
        norms = [
            self._norm(own.slots[name], leaves[name]) if self._norms else norm
            for name, norm in zip(norm_names(self.arch, layer), own.norms, strict=True)
        ]
        block = Block(self.sizes, linears=linears, attn_norm=norms[0], mlp_norm=norms[1], head_norms=own.head_norms)
        return rounded_inputs(block, self.activation_bits)

    def _final(self, *, trained: bool) -> tuple[Tensor, Tensor | None]:
        slot = self._final_slot
        if slot is None:
            return self._final_norm, None
        leaf = self.values[slot.start : slot.stop].view(slot.shape).requires_grad_(trained)
        return self._norm(slot, leaf), leaf

    def _norm(self, slot: Slot, leaf: Tensor) -> Tensor:
        value = leaf * slot.unit
        return straight(value, value.detach().to(self._stored_type(slot.name)).float())


def _mean_bits(slots: Sequence[Slot]) -> float:
    """Of the step sizes among them."""
    bits = [slot.bits for slot in slots if slot.scales]
    return sum(bits) / len(bits) if bits else FLOAT_BITS


def _weight(part: _Part, leaves: Mapping[str, Tensor]) -> Tensor:
    if part.packed is None or part.slot is None:
        assert part.weight is not None
        return part.weight
    weight: Tensor = _Dequantize.apply(leaves[part.slot.name] * part.slot.unit, part.packed)  # type: ignore[no-untyped-call]
    return weight
