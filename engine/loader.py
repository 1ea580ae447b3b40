"""A checkpoint becomes a Decoder: tensor by tensor, packed for the backend, the source let go at once.

At no time is there more than the packed model so far, the parts of one fused site, and what its packing needs. The
embedding, the largest tensor, comes first, while little else is held. What a PackedCache has is neither read nor
packed.

A checkpoint may say to which width the inputs of its quantized linears are rounded: those of the blocks, never the
head, whose input decides between tokens.

Unquantized checkpoints are computed in float32. Under low-bit weights the token embedding and the head are held at 8
bits (RTN, asymmetric, groups of 64 columns or a divisor), once if they are tied; head_bits=4 holds them at 4, and
16 keeps their floats.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import groupby
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from dibit.engine.config import EngineConfig
from dibit.engine.errors import CheckpointError, ConfigError
from dibit.engine.models import resolve_arch
from dibit.engine.models.decoder import Block, Decoder, FloatLinear, Linear, Ops, PackedLinear, SideBySide
from dibit.engine.models.spec import Arch, LinearSite, Part, Sizes, head_norm_names, norm_names, sites
from dibit.engine.models.weights import Weights, check_names, read_bias, read_float_site, read_linear, read_tensor
from dibit.engine.packed_cache import PackedCache
from dibit.kernels.dispatch import NoKernel, Resolved, resolve
from dibit.kernels.formats import PER_CHANNEL, Format, FormatError, QTensor
from dibit.kernels.triton.availability import unavailable as gpu_kernels_unavailable

HEAD_GROUPS = (64, 32, 16)
CHUNK_ELEMENTS = 1 << 20


@dataclass(frozen=True, slots=True)
class FloatEmbedding:
    """Rows of `weight` [vocab, hidden], in its stored type, as float32."""

    weight: Tensor

    def __call__(self, ids: Tensor) -> Tensor:
        return F.embedding(ids, self.weight).float()


@dataclass(frozen=True, slots=True)
class PackedEmbedding:
    """Rows of a quantized table in the layout of the backend's qlinear."""

    run: Callable[[Tensor, Any], Tensor]
    weight: Any

    def __call__(self, ids: Tensor) -> Tensor:
        rows: Tensor = self.run(ids, self.weight)
        return rows


def resolve_device(config: EngineConfig) -> torch.device:
    """The device to serve on; "auto" is the GPU where it has fast kernels, else the CPU. ConfigError without a GPU."""
    if config.device == "cuda" and not torch.cuda.is_available():
        raise ConfigError("device is cuda, and torch finds no NVIDIA GPU; use device cpu, or install a CUDA build")
    kernels = config.backend in ("auto", "triton") and gpu_kernels_unavailable() is None
    return torch.device("cuda" if config.device == "cuda" or (config.device == "auto" and kernels) else "cpu")


def load_decoder(
    weights: Weights,
    *,
    config: EngineConfig | None = None,
    activation_bits: int | None = None,
    cache: PackedCache | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> Decoder:
    """Read, check and pack a model. `progress(done, layers)` is called after each block.

    activation_bits  `Quantization.activation_bits` of the checkpoint: for the quantized linears of its blocks
    cache            where packed weights of the cpu backend are kept between starts

    Raises CheckpointError for tensors that are missing, unknown or of the wrong shape, ConfigError for a backend that
    cannot run here.
    """
    config = config or EngineConfig()
    arch, sizes = resolve_arch(weights.config)
    check_names(weights, arch, sizes)
    try:
        with _one_torch_thread():
            decoder = _Loader(weights, arch, sizes, config, activation_bits, cache).decoder(progress)
        if cache is not None:
            cache.finish()
        return decoder
    except NoKernel as error:
        raise ConfigError(f"{error}; choose another backend, or auto") from error
    except FormatError as error:
        raise CheckpointError(str(error)) from error
    finally:
        if cache is not None:
            cache.abandon()


def body_format(weights: Weights, arch: Arch, sizes: Sizes) -> Format | None:
    """The format of most of the blocks' weights, of those that are quantized; None when none is (headers only)."""
    counts: Counter[Format] = Counter()
    for layer in range(sizes.layers):
        for site in sites(arch, sizes, layer):
            for part in site.parts:
                packed = weights.linear_format(part.module)
                if packed is not None:
                    counts[packed] += part.n * site.k
    return counts.most_common(1)[0][0] if counts else None


def head_format(hidden: int, bits: int) -> Format:
    """Format of an embedding or head held at 8 or 4 bits."""
    return Format(bits, next((g for g in HEAD_GROUPS if hidden % g == 0), PER_CHANNEL))


def round_to_nearest(w: Tensor, format: Format) -> QTensor:
    """RTN of `w` [N, K] float, a slice of rows at a time, so that no float32 copy of the whole ever exists."""
    n, k = w.shape
    groups = format.groups(k)
    codes = torch.empty(n, k, dtype=torch.uint8)
    zeros = torch.empty(n, groups, dtype=torch.uint8)
    scales = torch.empty(n, groups, dtype=torch.float16)
    rows = max(1, CHUNK_ELEMENTS // k)
    for start in range(0, n, rows):
        chunk = w[start : start + rows].float()
        chunk_scales, chunk_zeros = format.ranges(chunk)
        part = format.encode(chunk, chunk_scales, chunk_zeros)
        codes[start : start + rows] = part.codes
        zeros[start : start + rows] = part.zeros
        scales[start : start + rows] = part.scales
    return QTensor(codes, zeros, scales, format)


@contextmanager
def _one_torch_thread() -> Iterator[None]:
    """Unpacking is thousands of short ops. On two cores, one of them busy, torch's threads waiting for each other made
    a load of 135 million weights take 17 s; one thread takes 1.3 s."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


class _Loader:
    def __init__(
        self,
        weights: Weights,
        arch: Arch,
        sizes: Sizes,
        config: EngineConfig,
        activation_bits: int | None,
        cache: PackedCache | None,
    ) -> None:
        self.activation_bits = activation_bits
        self.cache = cache
        self.weights = weights
        self.arch = arch
        self.sizes = sizes
        self.config = config
        self.device = resolve_device(config)
        self.format = body_format(weights, arch, sizes)
        self.ops = Ops.resolve(device=self.device.type, backend=config.backend)
        self.nbytes = 0
        self.table_bytes = 0

    def decoder(self, progress: Callable[[int, int], None] | None) -> Decoder:
        embedding, head = self._ends()
        blocks = []
        for layer in range(self.sizes.layers):
            blocks.append(self._block(layer))
            if progress is not None:
                progress(layer + 1, self.sizes.layers)
        return Decoder(
            self.arch,
            self.sizes,
            embedding=embedding,
            blocks=self._fused_ops(blocks),
            final_norm=self._norm(f"{self.arch.final_norm}.weight"),
            head=head,
            ops=self.ops,
            nbytes=self.nbytes,
            step_bytes=self.nbytes - self.table_bytes,
            format=self.format,
            device=self.device,
        )

    def _ends(self) -> tuple[Callable[[Tensor], Tensor], Linear]:
        sizes, low_bit = self.sizes, self.format is not None and self.config.head_bits < 16
        name, shape = f"{self.arch.embedding}.weight", (sizes.vocab, sizes.hidden)
        if not low_bit:
            dtype = torch.float32 if sizes.tied_head else self.weights.info(name).dtype
            table = self._held(read_tensor(self.weights, name, shape, dtype))
            if sizes.tied_head:
                return FloatEmbedding(table), FloatLinear(table)
            self.table_bytes = table.nbytes
            return FloatEmbedding(table), self._head()
        held = head_format(sizes.hidden, self.config.head_bits)
        packed = self._pack(name, shape, held, lambda: round_to_nearest(self._stored(name, shape), held))
        rows = self._resolve("embedding", held)
        embedding = PackedEmbedding(rows.run, packed.weight)
        if sizes.tied_head:
            return embedding, packed
        self.table_bytes = packed.nbytes
        return embedding, self._head()

    def _head(self) -> Linear:
        part, shape = Part(self.arch.head, self.sizes.vocab), (self.sizes.vocab, self.sizes.hidden)
        stored = self.weights.linear_format(part.module)
        if stored is not None:
            return self._pack(part.module, shape, stored, lambda: self._quantized(part, self.sizes.hidden, stored))
        if self.format is not None and self.config.head_bits < 16:
            held = head_format(self.sizes.hidden, self.config.head_bits)
            return self._pack(part.module, shape, held, lambda: round_to_nearest(self._float_head(part), held))
        return FloatLinear(self._held(self._float_head(part).float()))

    def _float_head(self, part: Part) -> Tensor:
        found = read_linear(self.weights, part, self.sizes.hidden)
        if isinstance(found, QTensor):
            raise CheckpointError(f"{part.module} is not float as the checkpoint's headers say; it is broken")
        return found

    def _block(self, layer: int) -> Block:
        attn_norm, mlp_norm = (self._norm(name) for name in norm_names(self.arch, layer))
        linears = {site.key: self._site(site) for site in sites(self.arch, self.sizes, layer)}
        heads = (read_tensor(self.weights, name, (self.sizes.head_dim,)) for name in head_norm_names(self.arch, layer))
        return Block(
            self.sizes,
            linears=linears,
            attn_norm=attn_norm,
            mlp_norm=mlp_norm,
            head_norms=tuple(self._held(norm) for norm in heads),
            ops=self.ops,
        )

    def _fused_ops(self, blocks: list[Block]) -> list[Block]:
        """On the triton backend, blocks with as few launches as their weights allow."""
        if resolve("add_rms_norm", device=self.device.type, backend=self.config.backend).backend != "triton":
            return blocks
        from dibit.engine.models.fused_block import fuse

        return fuse(blocks)

    def _site(self, site: LinearSite) -> Linear:
        """Neighbouring parts of one format become one weight; a site of several formats, several side by side."""
        segments: list[Linear] = []
        for packed, parts in groupby(site.parts, key=lambda part: self.weights.linear_format(part.module)):
            run = tuple(parts)
            segment = LinearSite(site.name, run, sum(part.n for part in run), site.k, site.input, site.bias)
            bias = read_bias(self.weights, segment)
            bias = None if bias is None else self._held(bias)
            if packed is None:
                segments.append(FloatLinear(self._held(read_float_site(self.weights, segment)), bias))
            else:
                segments.append(self._packed_site(segment, packed, bias))
        return segments[0] if len(segments) == 1 else SideBySide(tuple(segments), self.ops.concat)

    def _packed_site(self, site: LinearSite, format: Format, bias: Tensor | None) -> Linear:
        return self._pack(
            "+".join(part.module for part in site.parts),
            (site.n, site.k),
            format,
            lambda: self._fused(site, format),
            bias,
            activation_bits=self.activation_bits,
        )

    def _fused(self, site: LinearSite, format: Format) -> QTensor:
        if len(site.parts) == 1:
            return self._quantized(site.parts[0], site.k, format)
        codes = torch.empty(site.n, site.k, dtype=torch.uint8)
        zeros, scales, start = [], [], 0
        for part in site.parts:
            found = self._quantized(part, site.k, format)
            codes[start : start + part.n] = found.codes
            zeros.append(found.zeros)
            scales.append(found.scales)
            start += part.n
        return QTensor(codes, torch.cat(zeros), torch.cat(scales), format)

    def _quantized(self, part: Part, k: int, format: Format) -> QTensor:
        found = read_linear(self.weights, part, k)
        if not isinstance(found, QTensor) or found.format != format:
            raise CheckpointError(f"{part.module} is not {format.name} as the checkpoint's headers say; it is broken")
        return found

    def _pack(
        self,
        name: str,
        shape: tuple[int, int],
        format: Format,
        make: Callable[[], QTensor],
        bias: Tensor | None = None,
        *,
        activation_bits: int | None = None,
    ) -> PackedLinear:
        """The linear of the weight that `make` makes, or of the one that the cache has packed under this name."""
        chosen = self._resolve("qlinear", format, activation_bits)
        cache = self.cache if chosen.backend == "cpu" else None
        weight: Any = None if cache is None else cache.get(name, shape, format)
        if weight is None:
            w = make()
            if self.device.type != "cpu":
                w = QTensor(w.codes.to(self.device), w.zeros.to(self.device), w.scales.to(self.device), w.format)
            weight = w if chosen.pack is None else chosen.pack(w)
            if cache is not None:
                cache.put(name, weight)
        nbytes = sum(tensor.nbytes for tensor in (weight.codes, weight.zeros, weight.scales))
        self.nbytes += nbytes
        return PackedLinear(chosen.run, weight, bias, nbytes, activation_bits)

    def _resolve(self, op: str, format: Format, activation_bits: int | None = None) -> Resolved:
        return resolve(
            op,
            device=self.device.type,
            backend=self.config.backend,
            format=format,
            activation_bits=activation_bits,
        )

    def _stored(self, name: str, shape: tuple[int, ...]) -> Tensor:
        return read_tensor(self.weights, name, shape, self.weights.info(name).dtype)

    def _norm(self, name: str) -> Tensor:
        return self._held(read_tensor(self.weights, name, (self.sizes.hidden,)))

    def _held(self, tensor: Tensor) -> Tensor:
        kept = tensor.to(self.device).contiguous()
        self.nbytes += kept.nbytes
        return kept
