"""Block-wise training, then end to end, as one command.

The first phase makes a whole checkpoint, OUT.blocks; the second trains it into OUT, and it is deleted. Both are
resumable by themselves, so all there is to do here is to know which of them an interrupted run was in, and that the
call which continues it asks for the same: OUT.phases.json holds what was asked.
"""

from __future__ import annotations

import dataclasses
import json
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from dibit.engine.checkpoint.shard_file import write_text
from dibit.engine.checkpoint.writer import check_out
from dibit.engine.errors import ConfigError
from dibit.quantize.end_to_end import EndToEndReport, Progress
from dibit.quantize.finetune import train_end_to_end
from dibit.quantize.journal import check_same
from dibit.quantize.methods.block_ap import BlockAP
from dibit.quantize.methods.efficientqat import EfficientQAT
from dibit.quantize.report import QuantizeReport, StageReport, peak_rss_bytes
from dibit.quantize.report_html import write_html
from dibit.quantize.streams import StreamConfig


def in_two_phases(
    method: EfficientQAT,
    model: str,
    out: Path,
    *,
    first: Callable[[Path, BlockAP], QuantizeReport],
    asked: Mapping[str, Any],
    calibration: Path,
    samples: int,
    sequence_length: int,
    seed: int,
    streams: StreamConfig | None,
    overwrite: bool,
    revision: str | None,
    progress: Progress | None,
) -> QuantizeReport:
    """
    first   runs the first phase into a directory, or continues it
    asked   all that the first phase depends on
    Raises what the phases raise; after TrainingFailure the checkpoint of the first one is left.
    """
    check_out(out, overwrite=overwrite)
    blocks, note = out.with_name(out.name + ".blocks"), out.with_name(out.name + ".phases.json")
    settings = json.loads(json.dumps({**asked, "options": dataclasses.asdict(method.blocks())}, default=str))
    if note.exists():
        check_same(json.loads(note.read_text(encoding="utf-8")), settings, blocks)
    elif blocks.exists():
        raise ConfigError(f"{blocks} is in the way; it is where the first phase would go: delete it, or choose another")
    else:
        out.absolute().parent.mkdir(parents=True, exist_ok=True)
        write_text(note, json.dumps(settings))
    if not blocks.exists():
        first(blocks, method.blocks())

    def tell(done: int, total: int, text: str) -> None:
        if progress is not None:
            progress(done, total, f"end to end, step {done} of {total} {text}".rstrip())

    written: list[QuantizeReport] = []

    def describe(found: EndToEndReport, directory: Path) -> None:
        written.append(_described(QuantizeReport.read(blocks), method, found, out))
        written[0].write(directory)
        write_html(written[0], directory)

    train_end_to_end(
        str(blocks),
        out,
        settings=method.end_to_end(),
        text=calibration,
        samples=samples,
        sequence_length=sequence_length,
        seed=seed,
        teacher=model if method.objective == "kl" else None,
        revision=revision,
        streams=streams,
        overwrite=overwrite,
        method="efficientqat",
        describe=describe,
        progress=tell,
    )
    shutil.rmtree(blocks)
    note.unlink()
    return written[0]


def _described(first: QuantizeReport, method: EfficientQAT, found: EndToEndReport, out: Path) -> QuantizeReport:
    """The report of both phases."""
    last = StageReport("end to end", found.seconds, peak_rss_bytes())
    return dataclasses.replace(
        first,
        out=str(out),
        method="efficientqat",
        options=dataclasses.asdict(method),
        seconds=first.seconds + found.seconds,
        peak_rss_bytes=max(first.peak_rss_bytes, peak_rss_bytes()),
        stages=(*first.stages, last),
        notes=(*first.notes, *found.held_out_summary()),
    )
