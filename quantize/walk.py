"""The two ways through a model: linear by linear without text, or block by block with the text's hidden states."""

from __future__ import annotations

import dataclasses
import functools
import time
import zlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import psutil
import torch
from torch import Tensor

from dibit.engine.checkpoint import Checkpoint, CheckpointWriter
from dibit.engine.models.decoder import load_embedding, load_float_block
from dibit.engine.models.spec import Arch, LinearSite, Sizes, float_shapes, norm_names
from dibit.engine.models.weights import read_float_site
from dibit.kernels.formats import Format, QTensor
from dibit.quantize.activations import rounded_inputs
from dibit.quantize.block import (
    BlockJob,
    BlockMethod,
    Changed,
    quantize_block,
    quantize_site,
    replace_weight,
    site_report,
)
from dibit.quantize.budget import Allocation
from dibit.quantize.calibration import Segments
from dibit.quantize.fisher import FISHER_NAME, stored_token_weights
from dibit.quantize.importance import Model, Text
from dibit.quantize.journal import FinishedBlock, Journal
from dibit.quantize.plan import Plan, part_formats
from dibit.quantize.ranges import recorded_inputs
from dibit.quantize.report import duration
from dibit.quantize.stats import Method, Stats
from dibit.quantize.streams import HiddenStates, StreamConfig, advance

Progress = Callable[[int, int, str], None]

# Tokens that go through a block at once: enough to keep every core busy, little beside the block's own weights.
BATCH_TOKENS = 2048


@dataclass(frozen=True)
class Task:
    """What is to be done, its input checked.

    name      of the method
    blocks    sites of every block
    plan      where the formats come from
    allocation  what the plan comes from, when that was a budget
    formats   by site name; by module name where the linears of a site differ
    segments  the calibration text; None when nothing looks at it
    seed      for anything random in the method
    activation_bits  width of the inputs of quantized linears in the served model; None: weights only
    """

    checkpoint: Checkpoint
    arch: Arch
    sizes: Sizes
    method: Method | BlockMethod
    name: str
    blocks: tuple[tuple[LinearSite, ...], ...]
    plan: Plan
    allocation: Allocation | None
    formats: Mapping[str, Format]
    segments: Segments | None
    streams: StreamConfig
    seed: int
    activation_bits: int | None = None


class Output:
    """The unfinished checkpoint and what is known about its blocks.

    resumed        blocks from the first on that an earlier run finished
    block_seconds, block_rss_bytes  of the blocks that this one computed: time, and memory at the end
    """

    def __init__(self, task: Task, writer: CheckpointWriter, journal: Journal, progress: Progress | None) -> None:
        self.writer, self.journal = writer, journal
        self._layers, self._progress = task.sizes.layers, progress
        self._blocks = task.blocks
        self._norm_names = [
            dict(zip(("attn_norm", "mlp_norm"), norm_names(task.arch, layer), strict=True))
            for layer in range(task.sizes.layers)
        ]
        self.block_seconds: list[float] = []
        self.block_rss_bytes: list[int] = []
        self.resumed = next(
            (layer for layer, block in enumerate(task.blocks) if not self._whole(layer, block)), self._layers
        )

    def _whole(self, layer: int, block: Sequence[LinearSite]) -> bool:
        parts = [part for site in block for part in site.parts]
        return (
            layer in self.journal.blocks
            and all(self.writer.has_module(part.module) for part in parts)
            and all(
                self.writer.has(name) and checksum(self.writer.tensor(name)) == crc
                for name, crc in self.journal.blocks[layer].floats.items()
            )
        )

    def add_floats(self, task: Task) -> None:
        """Everything that is not quantized: embedding, norms, head, biases."""
        packed = {f"{part.module}.weight" for block in task.blocks for site in block for part in site.parts}
        for name in float_shapes(task.arch, task.sizes):
            if name not in packed and not self.writer.has(name):
                self.writer.add_float(name, task.checkpoint.export(name))
        self.writer.flush()

    def add_site(self, site: LinearSite, parts: Sequence[QTensor]) -> None:
        for part, quantized in zip(site.parts, parts, strict=True):
            self.writer.add_quantized(part.module, quantized)

    def read_site(self, site: LinearSite) -> tuple[QTensor, ...]:
        """The parts of a site of a block that an earlier run finished."""
        return tuple(self.writer.module(part.module) for part in site.parts)

    def add_changed(self, layer: int, changed: Changed) -> dict[str, int]:
        """Write floats of a block in place of the source's: their names in the checkpoint, and checksums."""
        tensors = {self._norm_names[layer][name]: norm for name, norm in changed.norms.items()}
        for site in self._blocks[layer]:
            if site.name in changed.biases:
                rows = torch.split(changed.biases[site.name], [part.n for part in site.parts])
                tensors.update((f"{part.module}.bias", own) for part, own in zip(site.parts, rows, strict=True))
        for name, tensor in tensors.items():
            self.writer.add_float(name, tensor)
        return {name: checksum(tensor) for name, tensor in tensors.items()}

    def read_changed(self, layer: int) -> Changed:
        """Floats of a block that an earlier run finished and that differ from the source's."""
        found = self.journal.blocks[layer].floats
        norms = {key: self.writer.tensor(name) for key, name in self._norm_names[layer].items() if name in found}
        biases = {
            site.name: torch.cat([self.writer.tensor(f"{part.module}.bias") for part in site.parts])
            for site in self._blocks[layer]
            if f"{site.parts[0].module}.bias" in found
        }
        return Changed(norms, biases)

    def close_block(self, layer: int, done: FinishedBlock, *, begun: float) -> None:
        """The block is complete on disk when this returns."""
        self.journal.add(layer, done)
        self.writer.flush()
        self.block_seconds.append(time.monotonic() - begun)
        self.block_rss_bytes.append(psutil.Process().memory_info().rss)
        left_s = sum(self.block_seconds) / len(self.block_seconds) * (self._layers - layer - 1)
        if self._progress is not None:
            worst = max(done.sites, key=lambda site: site.weight_error)
            note = f"layers.{layer} in {duration(self.block_seconds[-1])}, weight error up to {worst.weight_error:.2e}"
            self._progress(layer + 1, self._layers, f"{note}, about {duration(left_s)} left" if left_s else note)

    def tell(self, layer: int, note: str) -> None:
        if self._progress is not None:
            self._progress(layer, self._layers, note)


def data_free(task: Task, output: Output, method: Method) -> None:
    """Site by site: the memory of the largest one."""
    for layer in range(output.resumed, task.sizes.layers):
        begun = time.monotonic()
        reports = []
        for site in task.blocks[layer]:
            output.tell(layer, site.name)
            started = time.monotonic()
            w = read_float_site(task.checkpoint, site)
            parts, fallback = quantize_site(w, site, part_formats(site, task.formats), (Stats(),), method)
            seconds = time.monotonic() - started
            used = task.name if fallback is None else "rtn"
            reports.append(site_report(site, parts, w, name=used, seconds=seconds, fallback=fallback))
            output.add_site(site, parts)
        output.close_block(layer, FinishedBlock(tuple(reports)), begun=begun)


def calibrated(task: Task, output: Output, segments: Segments, *, directory: Path) -> None:
    """Block by block; those that an earlier run finished only pass the hidden states on.

    directory  where streams go that are too large for memory
    """
    quantized = _embedded(task, segments, directory)
    float_stream, float_outputs = None, None
    if task.method.needs & {"float_stream", "cross", "relative"}:
        float_stream = _embedded(task, segments, directory)
        # A method that wants the float model's inputs alone lets them be advanced in place.
        if task.method.needs & {"float_stream", "relative"}:
            float_outputs = float_stream.empty_like()
    length = segments.tokens.shape[1]
    batch = max(1, BATCH_TOKENS // length)
    cos, sin = task.sizes.rope.tables(length)
    weights = None
    if "token_weights" in task.method.needs and output.resumed < task.sizes.layers:
        weights = stored_token_weights(
            directory / FISHER_NAME,
            Model(task.checkpoint, task.arch, task.sizes),
            Text(segments.tokens, task.streams, directory),
            seed=task.seed,
            tell=lambda layer: output.tell(0, f"gradients of layers.{layer}"),
        )
    for layer, sites in enumerate(task.blocks):
        begun = time.monotonic()
        block = load_float_block(task.checkpoint, task.arch, task.sizes, layer)
        floats = block.with_linears(dict(block.linears))
        if float_stream is not None and float_outputs is not None:
            output.tell(layer, f"layers.{layer}, float hidden states")
            advance(float_stream, floats, cos, sin, batch=batch, into=float_outputs)
        done = None
        if layer < output.resumed:
            output.tell(layer, f"layers.{layer}, finished before")
            for site in sites:
                replace_weight(block, site, output.read_site(site))
            output.read_changed(layer).put(block, sites)
        else:
            job = BlockJob(
                layer=layer,
                block=block,
                sites=sites,
                formats=task.formats,
                quantized=quantized,
                float_stream=float_stream,
                float_outputs=float_outputs,
                cos=cos,
                sin=sin,
                batch=batch,
                seed=task.seed,
                activation_bits=task.activation_bits,
                float_type=_float_type(task, sites, layer),
                tell=partial(output.tell, layer),
                token_weights=None if weights is None else weights.of_block(layer, sites),
            )
            results = quantize_block(job, task.method, name=task.name, progress=partial(output.tell, layer))
            for site, result in zip(sites, results.sites, strict=True):
                output.add_site(site, result.parts)
            changed = output.add_changed(layer, results.changed)
            done = FinishedBlock(tuple(result.report for result in results.sites), changed, results.training)
            del results, job
        last = layer + 1 == task.sizes.layers
        if float_stream is not None and float_outputs is None and not last:
            output.tell(layer, f"layers.{layer}, float hidden states")
            advance(float_stream, floats, cos, sin, batch=batch)
        elif float_outputs is not None:
            float_stream, float_outputs = float_outputs, float_stream
        if done is not None or not last:
            output.tell(layer, f"layers.{layer}, hidden states")
            low = rounded_inputs(block, task.activation_bits)
            with recorded_inputs(low, sites) as inputs:
                advance(quantized, low, cos, sin, batch=batch)
        if done is not None:
            found = tuple(dataclasses.replace(one, input=inputs[one.site].report()) for one in done.sites)
            output.close_block(layer, dataclasses.replace(done, sites=found), begun=begun)


def _float_type(task: Task, sites: Sequence[LinearSite], layer: int) -> torch.dtype:
    """The type in which the source's norms and biases of a block are exported, the wider one where they differ."""
    names = [*norm_names(task.arch, layer)]
    names += [f"{part.module}.bias" for site in sites if site.bias for part in site.parts]
    return functools.reduce(torch.promote_types, [task.checkpoint.export(name).dtype for name in names])


def _embedded(task: Task, segments: Segments, directory: Path) -> HiddenStates:
    samples, length = segments.tokens.shape
    stream = HiddenStates(samples, length, task.sizes.hidden, config=task.streams, directory=directory)
    stream.embed(load_embedding(task.checkpoint, task.arch, task.sizes), segments.tokens)
    return stream


def checksum(tensor: Tensor) -> int:
    """Of the bytes and the type."""
    return zlib.crc32(tensor.contiguous().view(torch.uint8).numpy().tobytes() + str(tensor.dtype).encode())
