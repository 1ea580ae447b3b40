"""The bench of transports, on little."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from dibit.bench import transports


def test_both_transports_are_measured(tmp_path: Path) -> None:
    out = tmp_path / "out.json"
    assert transports.main(["--streams", "1,3", "--tokens", "40", "--repeats", "1", "--json", str(out)]) == 0
    costs = json.loads(out.read_text())["costs"]
    assert {(cost["transport"], cost["streams"]) for cost in costs} == {
        (name, count) for name in ("thread", "process") for count in (1, 3)
    }
    assert all(cost["wall_us"] > 0 for cost in costs)


def test_what_cannot_be_measured(capsys: pytest.CaptureFixture[str]) -> None:
    assert transports.main(["--tokens", "0"]) == 2
    assert "at least 1" in capsys.readouterr().err
