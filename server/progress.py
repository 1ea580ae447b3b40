"""Progress of long commands: a live display on a terminal, plain lines now and then in a log."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import psutil
from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.text import Text

LOG_EVERY_S = 15.0
# The time left is told by the pace of the last few steps: those that an earlier run finished pass at once.
PACE_STEPS = 6

Update = Callable[[int, int, str], None]


class Pace:
    """How long the rest will take, from when steps were finished."""

    def __init__(self, *, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._ends: list[float] = []
        self._done = self._total = -1

    def update(self, done: int, total: int) -> None:
        self._total = total
        if done != self._done:
            self._done = done
            self._ends = [*self._ends[-PACE_STEPS:], self._clock()]

    @property
    def left_s(self) -> float | None:
        """Seconds; None while no step was finished."""
        if len(self._ends) < 2:
            return None
        each = (self._ends[-1] - self._ends[0]) / (len(self._ends) - 1)
        return max(0.0, each * (self._total - self._done) - (self._clock() - self._ends[-1]))


@contextmanager
def window_progress(measure: str = "ppl") -> Iterator[Callable[[int, int, float], None]]:
    """For measurements over windows of a text: progress(done, windows, `measure` so far)."""
    with _shown("window") as update:
        yield lambda done, total, value: update(done, total, f"{measure} {value:.4g}")


@contextmanager
def request_progress() -> Iterator[Callable[[int, int], None]]:
    """For tasks: progress(answered, asked)."""
    with _shown("request") as update:
        yield lambda done, total: update(done, total, "")


@contextmanager
def quantize_progress() -> Iterator[Update]:
    """For quantize: progress(blocks done, blocks, what is being done and how it goes)."""
    with _shown("block") as update:
        yield update


@contextmanager
def convert_progress() -> Iterator[Update]:
    """For convert: progress(linears done, linears, the one in work)."""
    with _shown("linear") as update:
        yield update


@contextmanager
def finetune_progress() -> Iterator[Update]:
    """For finetune: progress(steps made, steps, note)."""
    with _shown("step") as update:
        yield update


@contextmanager
def _shown(unit: str) -> Iterator[Update]:
    if sys.stderr.isatty():
        with _display(unit, Console(stderr=True)) as update:
            yield update
    else:
        yield _log(unit)


def _log(unit: str) -> Update:
    """A line at most every LOG_EVERY_S, and the last one."""
    last = -LOG_EVERY_S

    def log(done: int, total: int, note: str) -> None:
        nonlocal last
        now = time.monotonic()
        if done == total or now - last >= LOG_EVERY_S:
            last = now
            print(f"{unit} {done}/{total} {note}".rstrip(), file=sys.stderr, flush=True)

    return log


@contextmanager
def _display(unit: str, console: Console) -> Iterator[Update]:
    """A bar with the time left and the memory in use, and under it what is being done."""
    bar = Progress(
        TextColumn(unit),
        BarColumn(bar_width=30),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TextColumn("{task.fields[rest]}"),
        console=console,
    )
    task = bar.add_task(unit, total=None, rest="")
    pace, process, note = Pace(), psutil.Process(), ""

    def rendered() -> RenderableType:
        left_s = pace.left_s
        left = "" if left_s is None else f"{_clock_time(left_s)} left, "
        bar.update(task, rest=f"{left}{process.memory_info().rss / 2**30:.2f} GiB in use")
        return Group(bar, Text(note, style="dim", overflow="ellipsis", no_wrap=True))

    def update(done: int, total: int, text: str) -> None:
        nonlocal note
        note = text
        pace.update(done, total)
        bar.update(task, completed=done, total=total)

    with Live(get_renderable=rendered, console=console, refresh_per_second=4):
        yield update


def _clock_time(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}"
