"""What a person sees of a long command, on a terminal and in a log."""

from __future__ import annotations

import io

import pytest
from rich.console import Console

from dibit.server import progress
from dibit.server.progress import Pace, quantize_progress, window_progress


def test_a_log_gets_few_lines_and_the_last(capsys: pytest.CaptureFixture[str]) -> None:
    with quantize_progress() as update:
        for done in range(1, 31):
            update(done, 30, f"layers.{done - 1}")
    lines = capsys.readouterr().err.splitlines()
    assert lines == ["block 1/30 layers.0", "block 30/30 layers.29"]
    with window_progress("kl") as scored:
        scored(1, 1, 0.00123456)
    assert capsys.readouterr().err == "window 1/1 kl 0.001235\n"


def test_a_terminal_shows_note_time_and_memory() -> None:
    written = io.StringIO()
    console = Console(file=written, force_terminal=True, width=120, color_system=None)
    with progress._display("block", console) as update:
        update(0, 4, "layers.0, step 1 of 8")
        update(1, 4, "layers.1, step 2 of 8, [not markup]")
    shown = written.getvalue()
    assert "1/4" in shown
    assert "GiB in use" in shown
    assert "0:00:00 left" in shown
    assert "layers.1, step 2 of 8, [not markup]" in shown


def test_the_pace_is_that_of_the_last_steps() -> None:
    now = 0.0
    pace = Pace(clock=lambda: now)
    assert pace.left_s is None
    pace.update(10, 20)  # blocks of an earlier run
    assert pace.left_s is None
    now = 60.0
    pace.update(11, 20)
    assert pace.left_s == pytest.approx(9 * 60)
    now = 80.0
    pace.update(11, 20)  # another note, no new block
    assert pace.left_s == pytest.approx(9 * 60 - 20)
    now = 5000.0
    assert pace.left_s == 0
