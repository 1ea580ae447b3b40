"""Progress of long commands: a live line on a terminal, plain lines now and then in a log."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

LOG_EVERY_S = 15.0


@contextmanager
def _bar(unit: str) -> Iterator[Callable[[int, int, str], None]]:
    """Yields update(done, total, note)."""
    if not sys.stderr.isatty():
        last = -LOG_EVERY_S

        def log(done: int, total: int, note: str) -> None:
            nonlocal last
            now = time.monotonic()
            if done == total or now - last >= LOG_EVERY_S:
                last = now
                print(f"{unit} {done}/{total} {note}".rstrip(), file=sys.stderr, flush=True)

        yield log
        return
    columns = (
        TextColumn(unit),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TextColumn("left"),
        TimeRemainingColumn(),
        TextColumn("{task.fields[note]}"),
    )
    with Progress(*columns, console=Console(stderr=True)) as progress:
        task = progress.add_task(unit, total=None, note="")
        yield lambda done, total, note: progress.update(task, completed=done, total=total, note=note)


@contextmanager
def window_progress() -> Iterator[Callable[[int, int, float], None]]:
    """For perplexity: progress(done, windows, ppl so far)."""
    with _bar("window") as update:
        yield lambda done, total, ppl: update(done, total, f"ppl {ppl:.3f}")


@contextmanager
def quantize_progress() -> Iterator[Callable[[int, int, str], None]]:
    """For quantize: progress(blocks done, blocks, note)."""
    with _bar("block") as update:
        yield update
