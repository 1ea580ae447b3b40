"""What a model will need, from headers alone: weights as they will be held, KV cache, working memory.

The runner sizes its cache by the same functions, so a plan that says "fits" is what happens. Sizes of packed weights
are those of the backend's layout; a test holds them to what a load really makes.
"""

from __future__ import annotations

from contextlib import ExitStack, closing
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import psutil
import torch

from dibit.engine.config import EngineConfig
from dibit.engine.errors import ConfigError
from dibit.engine.kv_cache import Stored, block_bytes, kv_types
from dibit.engine.loader import body_format, head_format, resolve_device
from dibit.engine.models import resolve_arch
from dibit.engine.models.spec import Arch, LinearSite, Sizes, head_norm_names, sites
from dibit.engine.models.weights import Weights
from dibit.kernels.contract import ContractError
from dibit.kernels.dispatch import NoKernel, resolve
from dibit.kernels.formats import Format
from dibit.kernels.kv import INT4
from dibit.kernels.triton.layout import nbytes as triton_bytes
from dibit.kernels.triton.limits import SIDE_BY_SIDE_TOKENS, SPLIT_KEYS

if TYPE_CHECKING:
    from dibit.engine.checkpoint import Checkpoint

LOGIT_BYTES = 64 << 20
"""Most that the logits of one pass through the head may take; more rows go in slices."""

PANEL_ROWS = 16
CGROUP = Path("/sys/fs/cgroup")
_GB = 1e9


@dataclass(frozen=True)
class CacheSize:
    """The KV cache that an engine will have. `note` says why the context is shorter than the model's, if it is."""

    max_model_len: int
    num_blocks: int
    block_bytes: int
    stored: Stored
    note: str | None = None

    @property
    def nbytes(self) -> int:
        return self.num_blocks * self.block_bytes

    @classmethod
    def of(
        cls, sizes: Sizes, config: EngineConfig, *, quantized: bool, num_blocks: int, max_model_len: int
    ) -> CacheSize:
        """Of a cache whose number of blocks is decided already. Raises ConfigError."""
        stored = kv_types(config.kv_type, quantized=quantized)
        return cls(max_model_len, num_blocks, _block_bytes(sizes, config, stored), stored)


@dataclass(frozen=True)
class MemoryPlan:
    """Bytes that serving takes, against what is free, and what fits.

    weight_bytes        every weight as held; embedding_bytes (embedding and head) is part of it
    kv_bytes            the KV cache of max_model_len and num_blocks; 0 when nothing fits
    activation_bytes    working memory of a step at its largest, logits included
    largest_context     longest single sequence that fits, at most model_max_positions
    largest_batch       sequences of max_model_len that fit at once
    draft_bytes         weights and working memory of the draft model; its keys and values are part of kv_bytes
    activation_bits     width to which inputs of quantized linears are rounded, as the checkpoint asks, or None
    refusal             why the settings do not fit here, or None
    """

    weight_bytes: int
    embedding_bytes: int
    kv_bytes: int
    kv_bytes_per_token: int
    activation_bytes: int
    total_bytes: int
    free_bytes: int
    max_model_len: int
    model_max_positions: int
    num_blocks: int
    block_size: int
    max_num_seqs: int
    largest_context: int
    largest_batch: int
    note: str | None
    refusal: str | None
    activation_bits: int | None = None
    draft_bytes: int = 0

    @property
    def fits(self) -> bool:
        return self.refusal is None

    def batch_at(self, context: int) -> int:
        """Sequences of `context` tokens that fit at once."""
        blocks = -(-context // self.block_size)
        return self._affordable_blocks // blocks

    def text(self) -> str:
        ends = f"(embedding and head {self.embedding_bytes / _GB:.3f})"
        cache = f"{self.num_blocks} blocks of {self.block_size} tokens, {self.kv_bytes_per_token} bytes a token"
        lines = [
            f"weights          {self.weight_bytes / _GB:8.3f} GB   {ends}",
            f"KV cache         {self.kv_bytes / _GB:8.3f} GB   {cache}",
            f"working memory   {self.activation_bytes / _GB:8.3f} GB",
            f"total            {self.total_bytes / _GB:8.3f} GB   of {self.free_bytes / _GB:.3f} GB free",
            f"context          {self.max_model_len:8d} tokens, up to {self.max_num_seqs} sequences in a step",
            f"largest context  {self.largest_context:8d} tokens for one sequence (the model's limit is "
            f"{self.model_max_positions})",
            f"largest batch    {self.largest_batch:8d} sequences of {self.max_model_len} tokens",
        ]
        if self.draft_bytes:
            lines.insert(3, f"draft model      {self.draft_bytes / _GB:8.3f} GB   its KV cache is in the one above")
        if self.activation_bits is not None:
            lines.append(f"activations      {self.activation_bits:8d} bits in quantized linears, one scale per token")
        remarks = [f"note: {self.note}"] if self.note else []
        verdict = "fits" if self.fits else f"does not fit: {self.refusal}"
        return "\n".join([*lines, *remarks, verdict])

    @property
    def _affordable_blocks(self) -> int:
        left = self.free_bytes - self.weight_bytes - self.activation_bytes - self.draft_bytes
        return max(0, left) // (self.kv_bytes_per_token * self.block_size)


def free_memory(device: torch.device | None = None) -> int:
    """Bytes that this process may still take: what the system can give, within its control group's limit."""
    if device is not None and device.type == "cuda":
        return int(torch.cuda.mem_get_info(device)[0])
    free = int(psutil.virtual_memory().available)
    try:
        limit = (CGROUP / "memory.max").read_text().strip()
        used = int((CGROUP / "memory.current").read_text())
        statistics = dict(line.split() for line in (CGROUP / "memory.stat").read_text().splitlines())
    except (OSError, ValueError):
        return free
    if not limit.isdigit():
        return free
    # The page cache counts as used and is given back on demand.
    return max(0, min(free, int(limit) - used + int(statistics.get("inactive_file", 0))))


def size_cache(
    sizes: Sizes, config: EngineConfig, *, quantized: bool, free_bytes: int, draft_block_bytes: int = 0
) -> CacheSize:
    """How long a sequence and how many blocks, given what is free once the weights are held.

    draft_block_bytes  of a block in the cache of a draft model, which has as many; part of the result's block_bytes

    Raises ConfigError with the numbers when a setting cannot hold: a context beyond the model's, or a cache that has
    no room for one sequence of the length that was asked for.
    """
    stored = kv_types(config.kv_type, quantized=quantized)
    per_block = _block_bytes(sizes, config, stored) + draft_block_bytes
    longest = config.max_model_len or sizes.max_positions
    if longest > sizes.max_positions:
        raise ConfigError(
            f"max_model_len is {longest}; this model supports up to {sizes.max_positions} positions. Lower it"
        )
    if config.kv_bytes is not None and config.kv_bytes > free_bytes:
        raise ConfigError(
            f"kv_bytes is {config.kv_bytes}, and only {free_bytes} bytes are free; lower kv_bytes, or free some memory"
        )
    budget = int(free_bytes * config.kv_memory_share) if config.kv_bytes is None else config.kv_bytes
    affordable = max(0, budget) // per_block
    needed = -(-longest // config.block_size)
    note = None
    if affordable < needed:
        source = (
            "kv_bytes"
            if config.kv_bytes is not None
            else f"{config.kv_memory_share:.0%} of {free_bytes / _GB:.2f} GB free memory"
        )
        found = (
            f"one sequence of {longest} tokens needs {needed * per_block / _GB:.3f} GB of KV cache "
            f"({per_block // config.block_size} bytes a token), and {source} allows {max(0, budget) / _GB:.3f} GB"
        )
        if config.max_model_len is not None or affordable < 1:
            raise ConfigError(
                f"{found}: room for {affordable * config.block_size} tokens. Lower max_model_len, raise kv_bytes or "
                "kv_memory_share, or choose a smaller kv_type"
            )
        longest = affordable * config.block_size
        note = f"{found}; the context is limited to {longest} tokens"
    blocks = affordable if config.kv_bytes is not None else min(affordable, needed * config.max_num_seqs)
    return CacheSize(longest, blocks, per_block, stored, note)


def _block_bytes(sizes: Sizes, config: EngineConfig, stored: Stored) -> int:
    """Raises ConfigError where the model's heads, or the backend, have no such cache."""
    # There the float16 numbers behind the codes have to lie at even bytes.
    if INT4 in stored and sizes.head_dim % 4:
        attention = resolve("paged_attention", device=resolve_device(config).type, backend=config.backend)
        if attention.backend == "triton":
            raise ConfigError(
                f"kv_type is {config.kv_type!r}, for which the triton backend needs a head dim that is a multiple of "
                f"4, not {sizes.head_dim}; choose int8 or a float type"
            )
    try:
        return block_bytes(sizes, block_size=config.block_size, stored=stored)
    except ContractError as error:
        raise ConfigError(f"kv_type is {config.kv_type!r}: {error}") from error


def activation_bytes(sizes: Sizes, config: EngineConfig, *, max_model_len: int, gpu: bool = False) -> int:
    """Working memory of the largest step: hidden states in float32, logits with the sampler's copies, rope tables; on a
    `gpu` also what the graphs of decode steps keep."""
    logits = min(LOGIT_BYTES, 4 * sizes.vocab * max(config.max_num_seqs, config.max_batch_tokens))
    work = _token_bytes(sizes) * config.max_batch_tokens + 4 * logits + 4 * max_model_len * sizes.rope.dim
    return work + (_graph_bytes(sizes, config, max_model_len=max_model_len) if gpu and config.tape else 0)


def _token_bytes(sizes: Sizes) -> int:
    return 4 * (6 * sizes.hidden + 2 * sizes.q_width + 2 * sizes.kv_width + 3 * sizes.intermediate)


def _graph_bytes(sizes: Sizes, config: EngineConfig, *, max_model_len: int) -> int:
    """One decode step in the pool that CUDA graphs share, attention's partial sums included, its logits twice and the
    weights of its draws."""
    rows = config.max_num_seqs
    sums = 4 * (sizes.q_width + sizes.heads) * -(-max_model_len // SPLIT_KEYS) * min(rows, SIDE_BY_SIDE_TOKENS)
    return _token_bytes(sizes) * rows + sums + 3 * min(LOGIT_BYTES, 4 * sizes.vocab * rows)


def plan_memory(
    weights: Weights,
    *,
    config: EngineConfig | None = None,
    free_bytes: int | None = None,
    activation_bits: int | None = None,
    draft: Weights | None = None,
) -> MemoryPlan:
    """What serving this checkpoint with these settings takes. Reads headers only.

    free_bytes  memory to plan within (None: what is free now)
    activation_bits  `Quantization.activation_bits` of the checkpoint
    draft  the checkpoint of the draft model, if there is one
    Raises CheckpointError for a model that cannot be read, ConfigError for a backend or device that cannot run here;
    a model that does not fit is no error, `refusal` says it.
    """
    config = config or EngineConfig()
    arch, sizes = resolve_arch(weights.config)
    form = body_format(weights, arch, sizes)
    quantized = form is not None
    if form is not None and activation_bits is not None:
        _backend(form, config, activation_bits)
    device = resolve_device(config)
    free = free_memory(device) if free_bytes is None else free_bytes
    held, ends = _weight_bytes(weights, arch, sizes, config, quantized=quantized)
    longest = config.max_model_len or sizes.max_positions
    work = activation_bytes(sizes, config, max_model_len=longest, gpu=device.type == "cuda")
    beside, draft_block = (0, 0) if draft is None else _draft_bytes(draft, config)
    after = free - held - work - beside
    refusal = None
    per_block = _block_bytes(sizes, config, kv_types(config.kv_type, quantized=quantized)) + draft_block
    try:
        if after < 0:
            raise ConfigError(
                f"weights ({held / _GB:.2f} GB) and working memory ({(work + beside) / _GB:.2f} GB) exceed the "
                f"{free / _GB:.2f} GB that are free; use fewer bits, a smaller model, or a machine with more memory"
            )
        cache = size_cache(sizes, config, quantized=quantized, free_bytes=after, draft_block_bytes=draft_block)
        context, blocks, note = cache.max_model_len, cache.num_blocks, cache.note
    except ConfigError as error:
        context, blocks, note = config.max_model_len or sizes.max_positions, 0, None
        refusal = str(error)
    affordable = max(0, after) // per_block
    return MemoryPlan(
        weight_bytes=held,
        embedding_bytes=ends,
        kv_bytes=blocks * per_block,
        kv_bytes_per_token=per_block // config.block_size,
        activation_bytes=work,
        total_bytes=held + work + beside + blocks * per_block,
        free_bytes=free,
        max_model_len=context,
        model_max_positions=sizes.max_positions,
        num_blocks=blocks,
        block_size=config.block_size,
        max_num_seqs=config.max_num_seqs,
        largest_context=min(sizes.max_positions, affordable * config.block_size),
        largest_batch=affordable // -(-context // config.block_size),
        note=note,
        refusal=refusal,
        activation_bits=activation_bits,
        draft_bytes=beside,
    )


def plan_model(model: str, config: EngineConfig) -> MemoryPlan:
    """`plan_memory` of a model by name: a directory, a .gguf file, a Hub id or "demo"."""
    from dibit.engine.checkpoint import open_checkpoint, resolve_model

    with ExitStack() as opened:

        def open_one(name: str) -> Checkpoint:
            return opened.enter_context(closing(open_checkpoint(resolve_model(name), gptq_zero=config.gptq_zero)))

        checkpoint = open_one(model)
        draft = None if config.draft_model is None else open_one(config.draft_model)
        quantization = checkpoint.quantization
        activation_bits = None if quantization is None else quantization.activation_bits
        return plan_memory(checkpoint, config=config, activation_bits=activation_bits, draft=draft)


def packed_bytes(n: int, k: int, format: Format, *, config: EngineConfig) -> int:
    """Bytes of a quantized weight [n, k] as the backend that will run it holds it."""
    backend = _backend(format, config)
    groups = format.groups(k)
    if backend == "cpu":
        rows = -(-n // PANEL_ROWS) * PANEL_ROWS
        return rows * (-(-k * format.bits // 8) + 3 * groups)
    if backend == "triton":
        return triton_bytes(format, n, k)
    return n * (k + 3 * groups)


def _backend(format: Format, config: EngineConfig, activation_bits: int | None = None) -> str:
    device = resolve_device(config).type
    try:
        chosen = resolve(
            "qlinear", device=device, backend=config.backend, format=format, activation_bits=activation_bits
        )
    except NoKernel as error:
        raise ConfigError(f"{error}; choose another backend, or auto") from error
    return chosen.backend


def _weight_bytes(
    weights: Weights, arch: Arch, sizes: Sizes, config: EngineConfig, *, quantized: bool
) -> tuple[int, int]:
    """All weights as held, and of them embedding and head."""
    ends = _end_bytes(weights, arch, sizes, config, quantized=quantized)
    norms = 4 * sizes.hidden * (2 * sizes.layers + 1)
    norms += 4 * sizes.head_dim * sum(len(head_norm_names(arch, layer)) for layer in range(sizes.layers))
    linears = sum(
        _site_bytes(weights, site, config) for layer in range(sizes.layers) for site in sites(arch, sizes, layer)
    )
    return ends + norms + linears, ends


def _draft_bytes(weights: Weights, config: EngineConfig) -> tuple[int, int]:
    """Weights and working memory of a draft model, and a block of its cache."""
    arch, sizes = resolve_arch(weights.config)
    quantized = body_format(weights, arch, sizes) is not None
    held, _ = _weight_bytes(weights, arch, sizes, config, quantized=quantized)
    gpu = resolve_device(config).type == "cuda"
    work = activation_bytes(sizes, config, max_model_len=sizes.max_positions, gpu=gpu)
    return held + work, _block_bytes(sizes, config, kv_types(config.kv_type, quantized=quantized))


def _site_bytes(weights: Weights, site: LinearSite, config: EngineConfig) -> int:
    total = 4 * site.n if site.bias else 0
    for part in site.parts:
        packed = weights.linear_format(part.module)
        total += 4 * part.n * site.k if packed is None else packed_bytes(part.n, site.k, packed, config=config)
    return total


def _end_bytes(weights: Weights, arch: Arch, sizes: Sizes, config: EngineConfig, *, quantized: bool) -> int:
    """Embedding and head."""
    elements = sizes.vocab * sizes.hidden
    if quantized and config.head_bits < 16:
        one = packed_bytes(sizes.vocab, sizes.hidden, head_format(sizes.hidden, config.head_bits), config=config)
    else:
        one = 4 * elements
    if sizes.tied_head:
        return one
    head = weights.linear_format(arch.head)
    second = one if head is None else packed_bytes(sizes.vocab, sizes.hidden, head, config=config)
    if not (quantized and config.head_bits < 16):
        one = elements * weights.info(f"{arch.embedding}.weight").dtype.itemsize
    return one + second
