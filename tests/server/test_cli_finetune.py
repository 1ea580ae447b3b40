"""`dibit finetune`: how its mistakes end, and that each option reaches the training."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from dibit.quantize import finetune as training
from dibit.quantize.end_to_end import EndToEnd, EndToEndReport
from dibit.quantize.end_to_end_state import HeldOut
from dibit.server.cli import main


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Callable[..., tuple[int, str, str]]:
    monkeypatch.setenv("OMP_WAIT_POLICY", "PASSIVE")

    def call(*words: object) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["dibit", "finetune", *map(str, words)])
        with pytest.raises(SystemExit) as left:
            main()
        printed = capsys.readouterr()
        return int(left.value.code or 0), printed.out, printed.err

    return call


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["model"], "--out"),
        (["model", "--out", "x"], "--text"),
        (["model", "--out", "x", "--text", "a", "--instructions", "b"], "either"),
        (["model", "--out", "x", "--text", "a"], "no such file or directory"),
        (["model", "--out", "x", "--text", "a", "--objective", "mse"], "supported: kl, ce"),
        (["model", "--out", "x", "--text", "a", "--steps", "0"], "steps is 0"),
        (["model", "--out", "x", "--text", "a", "-O", "speed=3"], "scale_rate"),
    ],
)
def test_mistakes_end_in_one_message_and_status_2(
    run: Callable[..., tuple[int, str, str]],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    words: list[str],
    message: str,
) -> None:
    monkeypatch.chdir(tmp_path)
    status, _, err = run(*words)
    assert status == 2
    assert message in err
    assert "Traceback" not in err
    assert list(tmp_path.iterdir()) == []


def test_every_option_reaches_the_training(
    run: Callable[..., tuple[int, str, str]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: dict[str, Any] = {}

    def train(checkpoint: str, out: Path, *, settings: EndToEnd, **rest: Any) -> EndToEndReport:
        rest.pop("progress")(1, 2, "note")
        asked.update(rest, checkpoint=checkpoint, out=out, settings=settings)
        points = tuple(HeldOut(step, 2.0, None, 2.0, None) for step in (0, 7))
        return EndToEndReport(settings, "m", "o", None, {}, 5, 6, (), points, 7, 0, 0, (), 1.0, 6.0, 0.5)

    monkeypatch.setattr(training, "train_end_to_end", train)
    options = "--objective ce --steps 7 --batch 2 --samples 9 --sequence-length 33 --seed 4 --teacher t --revision r"
    words = ["m", "--out", "o", "--instructions", "f", *options.split(), "-O", "clip=0.5", "--overwrite"]
    status, out, err = run(*words, "--json", tmp_path / "found.json")
    assert (status, err) == (0, "step 1/2 note\n")
    assert "step 7 of 7 kept" in out
    assert json.loads((tmp_path / "found.json").read_text())["best_step"] == 7
    assert asked == {
        "checkpoint": "m",
        "out": Path("o"),
        "settings": EndToEnd(objective="ce", steps=7, batch=2, clip=0.5),
        "text": None,
        "instructions": Path("f"),
        "samples": 9,
        "sequence_length": 33,
        "seed": 4,
        "teacher": "t",
        "revision": "r",
        "overwrite": True,
    }
