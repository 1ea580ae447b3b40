"""From a float model to a GPTQ v2 checkpoint, one block at a time.

A method that needs no statistics reads and writes the linears one by one. Any other sees the calibration text: its
hidden states go through the model once, block by block, and each block is quantized from the states that the
quantized blocks before it produce. Memory holds one block and the streams, never the model.

Every block is on disk before the next one begins. A run that was interrupted, however hard, is continued by the same
call: finished blocks are read back, the streams are sent through them again, and the rest is computed, with the same
result to the bit (on the same machine with the same number of threads). Until the run is complete, `out` does not
exist.
"""

from __future__ import annotations

import dataclasses
import logging
import platform
from collections.abc import Sequence
from contextlib import closing
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any, cast

import torch

from dibit.engine.checkpoint import Checkpoint, CheckpointWriter, open_checkpoint, resolve_model
from dibit.engine.checkpoint.dispatch import export_for
from dibit.engine.checkpoint.writer import check_out, partial_directory
from dibit.engine.errors import CheckpointError, ConfigError
from dibit.engine.models import resolve_arch
from dibit.engine.models.spec import LinearSite, Sizes, sites
from dibit.engine.models.weights import check_names
from dibit.engine.tokenizer import load_tokenizer
from dibit.kernels.formats import Format, FormatError, ZeroGrid
from dibit.kernels.qlinear import ACTIVATION_BITS
from dibit.quantize.block import BlockMethod
from dibit.quantize.budget import Allocation, Budget
from dibit.quantize.calibration import Calibration, Segments, load_segments
from dibit.quantize.choose import choose_bits
from dibit.quantize.fisher import FISHER_NAME
from dibit.quantize.importance import NEED_TEXT, Model, Text
from dibit.quantize.journal import JOURNAL_NAME, Journal, stored_settings
from dibit.quantize.methods import METHODS, make_method
from dibit.quantize.methods.efficientqat import EfficientQAT
from dibit.quantize.plan import Plan, bits_per_weight, on_zero_grid
from dibit.quantize.report import QuantizeReport, StageClock, peak_rss_bytes
from dibit.quantize.report_html import write_html
from dibit.quantize.rotate_residual import RotatedCheckpoint
from dibit.quantize.stats import Method
from dibit.quantize.streams import StreamConfig
from dibit.quantize.two_phases import in_two_phases
from dibit.quantize.walk import Output, Progress, Task, calibrated, data_free

logger = logging.getLogger(__name__)

DEFAULT_GROUP_SIZE = 64


def quantize_checkpoint(
    model: str,
    out: Path,
    *,
    method: str | Method | BlockMethod = "rtn",
    bits: int | None = None,
    group_size: int | None = None,
    symmetric: bool = False,
    zero_grid: ZeroGrid = "integer",
    activation_bits: int | None = None,
    rotate_residual: bool = False,
    calibration: Path | None = None,
    samples: int = 128,
    sequence_length: int = 512,
    seed: int = 0,
    plan: Plan | Budget | None = None,
    save_plan: Path | None = None,
    streams: StreamConfig | None = None,
    overwrite: bool = False,
    revision: str | None = None,
    progress: Progress | None = None,
) -> QuantizeReport:
    """Quantize the linears of `model` and write the result to the new directory `out`.

    model        directory, .gguf file, Hub id (at `revision`) or "demo"; a float model
    method       a name in METHODS, or an instance of one of its classes with the options that it should have
    bits, group_size  format of every linear, 4 and 64 if left out
    plan         the formats instead of `bits` and `group_size`; or a budget, from which `group_size` and the blocks'
                 importance make a plan
    save_plan    file for the plan, written as soon as it is known
    symmetric    zero points in the middle of the code range
    zero_grid    "fractional": the linears of 2 and 3 bits get zero points that are fractions (kernels/formats.py), in
                 a checkpoint that only dibit reads
    activation_bits  4, 6 or 8: the served model rounds the inputs of its quantized linears too, a token at a time, and
                 methods that see text take that into account; None: weights only
    rotate_residual  turn the residual stream by a random rotation first (rotate_residual.py); the head is then untied
    calibration  plain UTF-8 text of which `samples` pieces of `sequence_length` tokens are drawn; needed by every
                 method but rtn, and by some kinds of importance
    progress     called with (finished blocks, blocks, note)

    Raises ConfigError or CheckpointError, all that can be known beforehand before anything is computed. After
    KeyboardInterrupt, or any other end, the same call continues where it was.
    """
    clock = StageClock()
    chosen = make_method(method, {}) if isinstance(method, str) else method
    if symmetric and not chosen.symmetric:
        chosen = dataclasses.replace(chosen, symmetric=True)  # type: ignore[type-var]
    wanted = _wanted(plan, bits, group_size)
    if activation_bits is not None and activation_bits not in ACTIVATION_BITS:
        raise ConfigError(
            f"activations of {activation_bits} bits; supported: {', '.join(map(str, ACTIVATION_BITS))}, or none at all"
        )
    looks = isinstance(plan, Budget) and plan.importance in NEED_TEXT
    if calibration is None and (chosen.needs or looks):
        what = f"method {_name(chosen)}" if chosen.needs else f"importance {cast(Budget, plan).importance}"
        other = "rtn, which needs none" if chosen.needs else "zd, which needs none"
        raise ConfigError(
            f"{what} learns from text: give a plain text file as calibration (--calibration FILE), or use {other}"
        )
    if calibration is not None and not chosen.needs and not looks:
        raise ConfigError(f"method {_name(chosen)} does not look at any text; leave the calibration out")
    rotated = {"rotate_residual": True} if rotate_residual else {}
    if isinstance(chosen, EfficientQAT) and calibration is not None:
        asked = {
            "model": [model, revision],
            "bits": bits,
            "group_size": group_size,
            "zero_grid": zero_grid,
            "activation_bits": activation_bits,
            **rotated,
            "plan": None if plan is None else dataclasses.asdict(plan),
            "calibration": [calibration.absolute(), samples, sequence_length, seed],
        }
        again = partial(
            quantize_checkpoint,
            model,
            bits=bits,
            group_size=group_size,
            zero_grid=zero_grid,
            activation_bits=activation_bits,
            rotate_residual=rotate_residual,
            calibration=calibration,
            samples=samples,
            sequence_length=sequence_length,
            seed=seed,
            plan=plan,
            save_plan=save_plan,
            streams=streams,
            revision=revision,
            progress=progress,
        )
        return in_two_phases(
            chosen,
            model,
            Path(out),
            first=lambda blocks, method: again(blocks, method=method),
            asked=asked,
            calibration=calibration,
            samples=samples,
            sequence_length=sequence_length,
            seed=seed,
            streams=streams,
            overwrite=overwrite,
            revision=revision,
            progress=progress,
        )
    check_out(Path(out), overwrite=overwrite)
    text = None if calibration is None else Calibration(calibration, samples, sequence_length, seed)
    with closing(open_checkpoint(resolve_model(model, revision=revision))) as source:
        checkpoint = RotatedCheckpoint(source, seed=seed) if rotate_residual else source
        task = _task(
            checkpoint,
            chosen,
            wanted,
            text,
            group_size=DEFAULT_GROUP_SIZE if group_size is None else group_size,
            seed=seed,
            streams=streams or StreamConfig(),
            out=Path(out),
            progress=progress,
            zero_grid=zero_grid,
            activation_bits=activation_bits,
        )
        if save_plan is not None:
            _save(task.plan, save_plan)
        settings = {**_settings(task, text), **rotated}
        clock.end("input" if task.allocation is None else "input and importance")
        export = export_for(task.formats.values())
        with closing(CheckpointWriter(Path(out), checkpoint, export=export, overwrite=overwrite)) as writer:
            output = Output(task, writer, Journal(writer.directory, settings), progress)
            try:
                _walk(task, output, clock, directory=writer.directory)
            except KeyboardInterrupt:
                logger.warning(
                    "stopped; finished blocks are kept in %s, and the same command continues after them",
                    writer.directory,
                )
                raise
            layers = range(task.sizes.layers)
            trains = any(block.training is not None for block in output.journal.blocks.values())
            report = QuantizeReport(
                model=model,
                source=str(checkpoint.path),
                out=str(out),
                method=task.name,
                options={**settings["options"], **rotated},
                plan=settings["plan"],
                allocation=settings["allocation"],
                bits_per_weight=bits_per_weight([site for block in task.blocks for site in block], task.formats),
                calibration=None if text is None else {"text": str(text.text), **settings["calibration"]},
                seed=seed,
                threads=torch.get_num_threads(),
                sites=tuple(site for layer in layers for site in output.journal.blocks[layer].sites),
                training=tuple(output.journal.blocks[layer].training for layer in layers if trains),
                resumed_blocks=output.resumed,
                seconds=clock.seconds,
                block_seconds=tuple(output.block_seconds),
                peak_rss_bytes=peak_rss_bytes(),
                versions={"dibit": version("dibit"), "torch": torch.__version__, "python": platform.python_version()},
                stages=clock.stages,
                block_rss_bytes=tuple(output.block_rss_bytes),
                activation_bits=activation_bits,
            )
            report.write(writer.directory)
            write_html(report, writer.directory)
            writer.finish(
                method=task.name,
                facts={**settings["options"], **rotated},
                activation_bits=activation_bits,
                scratch=[JOURNAL_NAME, FISHER_NAME],
            )
    return report


def _wanted(plan: Plan | Budget | None, bits: int | None, group_size: int | None) -> Plan | Budget:
    if plan is not None and bits is not None:
        raise ConfigError(
            f"the bits come from {'a plan' if isinstance(plan, Plan) else 'a budget'}; leave out --bits {bits}"
        )
    if isinstance(plan, Plan) and group_size is not None:
        raise ConfigError(f"the group sizes come from a plan; leave out --group-size {group_size}")
    try:
        uniform = Format(4 if bits is None else bits, DEFAULT_GROUP_SIZE if group_size is None else group_size)
    except FormatError as error:
        raise ConfigError(str(error)) from error
    return Plan.uniform(uniform) if plan is None else plan


def _save(plan: Plan, path: Path) -> None:
    aside = path.with_name(path.name + ".new")
    try:
        aside.write_text(plan.to_json() + "\n", encoding="utf-8")
        aside.replace(path)
    except OSError as error:
        raise ConfigError(f"cannot write the plan to {path}: {error.strerror or error}") from error


def _task(
    checkpoint: Checkpoint,
    method: Method | BlockMethod,
    wanted: Plan | Budget,
    text: Calibration | None,
    *,
    group_size: int,
    seed: int,
    streams: StreamConfig,
    out: Path,
    progress: Progress | None,
    zero_grid: ZeroGrid,
    activation_bits: int | None,
) -> Task:
    """Everything that can be checked before anything is written."""
    if checkpoint.quantization is not None:
        raise CheckpointError(
            f"{checkpoint.name} is quantized already ({checkpoint.quantization.method}, "
            f"{checkpoint.quantization.bits} bits); only float models can be quantized: start from the original one"
        )
    arch, sizes = resolve_arch(checkpoint.config)
    check_names(checkpoint, arch, sizes)
    blocks = tuple(sites(arch, sizes, layer) for layer in range(sizes.layers))
    listed = [site for block in blocks for site in block]
    if isinstance(wanted, Plan):
        # Before the text, which may take a while to read.
        _formats(wanted, listed, method, zero_grid)
    if text is not None and progress is not None:
        progress(0, sizes.layers, "reading the calibration text")
    segments = None if text is None else _segments(checkpoint, sizes, text)
    allocation = None
    if isinstance(wanted, Budget):
        allocation = _earlier_allocation(out, wanted) or choose_bits(
            wanted,
            Model(checkpoint, arch, sizes),
            group_size=group_size,
            symmetric=method.symmetric,
            text=None if segments is None else Text(segments.tokens, streams, _existing(out)),
            seed=seed,
            zero_grid=zero_grid,
            progress=lambda layer: None if progress is None else progress(0, sizes.layers, f"importance of {layer}"),
        )
        wanted = allocation.plan(group_size)
    return Task(
        checkpoint=checkpoint,
        arch=arch,
        sizes=sizes,
        method=method,
        name=_name(method),
        blocks=blocks,
        plan=wanted,
        allocation=allocation,
        formats=_formats(wanted, listed, method, zero_grid),
        segments=segments,
        streams=streams,
        seed=seed,
        activation_bits=activation_bits,
    )


def _formats(
    plan: Plan, sites: Sequence[LinearSite], method: Method | BlockMethod, zero_grid: ZeroGrid
) -> dict[str, Format]:
    formats = plan.resolve(sites)
    divided = [site.name for site in sites if site.name not in formats]
    if divided and isinstance(method, BlockMethod):
        raise ConfigError(
            f"method {_name(method)} needs one format for all linears of a site, and the plan gives those of "
            f"{divided[0]} different ones; use rtn or gptq, or one format for each site"
        )
    return on_zero_grid(formats, zero_grid, symmetric=method.symmetric)


def _earlier_allocation(out: Path, budget: Budget) -> Allocation | None:
    """What an interrupted run chose for this budget: other threads may score a little differently. All else that it
    depends on is compared when the run is continued."""
    found = stored_settings(partial_directory(out)).get("allocation")
    earlier = Allocation.from_dict(found) if found else None
    return earlier if earlier is not None and earlier.budget == budget else None


def _existing(path: Path) -> Path:
    return next(parent for parent in path.absolute().parents if parent.is_dir())


def _segments(checkpoint: Checkpoint, sizes: Sizes, text: Calibration) -> Segments:
    if text.sequence_length > sizes.max_positions:
        raise ConfigError(
            f"calibration sequences of {text.sequence_length} tokens are longer than the model's "
            f"{sizes.max_positions} positions; choose at most that"
        )
    segments = load_segments(text, load_tokenizer(checkpoint).encode)
    highest = int(segments.tokens.max())
    if highest >= sizes.vocab:
        raise CheckpointError(
            f"the tokenizer gives token {highest}, and the model has {sizes.vocab}; "
            "the tokenizer files belong to another model"
        )
    return segments


def _walk(task: Task, output: Output, clock: StageClock, *, directory: Path) -> None:
    output.add_floats(task)
    clock.end("embedding, norms and head")
    if task.segments is not None and task.method.needs:
        calibrated(task, output, task.segments, directory=directory)
    elif isinstance(task.method, BlockMethod):
        raise TypeError(f"{task.name} works on blocks and names no needs")
    else:
        data_free(task, output, task.method)
    clock.end("blocks")


def _settings(task: Task, text: Calibration | None) -> dict[str, Any]:
    """All that the quantized weights depend on; what a continued run must have in common with the interrupted one."""
    path = task.checkpoint.path
    files = sorted(path.glob("*.safetensors")) if path.is_dir() else [path]
    calibration: dict[str, Any] | None = None
    if text is not None and task.segments is not None:
        calibration = {
            "sha256": task.segments.text_sha256,
            "tokens": task.segments.text_tokens,
            "samples": text.samples,
            "sequence_length": text.sequence_length,
            "stream_type": task.streams.stream_type,
        }
    return {
        "source": [[str(file.resolve()), file.stat().st_size, file.stat().st_mtime_ns] for file in files],
        "method": task.name,
        "options": dataclasses.asdict(cast(Any, task.method)),
        "plan": task.plan.to_dict(),
        "allocation": None if task.allocation is None else task.allocation.to_dict(),
        "calibration": calibration,
        "seed": task.seed,
        "formats": {name: form.name for name, form in task.formats.items() if form.zero_grid != "integer"},
        "activation_bits": task.activation_bits,
        "version": version("dibit"),
    }


def _name(method: Method | BlockMethod) -> str:
    return next((name for name, kind in METHODS.items() if kind is type(method)), type(method).__name__.lower())
