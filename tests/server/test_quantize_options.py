"""What the options of `dibit quantize` say together."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest

from dibit.engine.errors import ConfigError
from dibit.server.cli import main
from dibit.server.quantize_options import budget_settings, read_plan

NONE: dict[str, Any] = {
    "plan": None,
    "bits_budget": None,
    "target_size": None,
    "bits_choices": None,
    "importance": None,
    "importance_samples": None,
    "reverse": False,
    "per_linear": False,
}


def test_no_option_no_budget() -> None:
    assert budget_settings(**NONE) is None
    assert budget_settings(**{**NONE, "plan": Path("plan.json")}) is None


def test_options_become_fields_of_the_budget() -> None:
    plain = {"reverse": False, "per_site": False}
    found = budget_settings(**{**NONE, "target_size": "60MB", "bits_choices": "2,4", "importance": "zd"})
    assert found == {"total_bytes": 60_000_000, "choices": (2, 4), "importance": "zd", **plain}
    found = budget_settings(**{**NONE, "bits_budget": 2.85, "importance_samples": 4, "reverse": True})
    assert found == {**plain, "mean_bits": 2.85, "samples": 4, "reverse": True}
    found = budget_settings(**{**NONE, "bits_budget": 2.5, "per_linear": True})
    assert found == {**plain, "mean_bits": 2.5, "importance": "fisher", "per_site": True}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"bits_budget": 3.0, "target_size": "60MB"}, "--bits-budget and --target-size exclude each other"),
        ({"bits_budget": 3.0, "plan": Path("p")}, "--plan and --bits-budget exclude each other"),
        ({"importance": "lim", "reverse": True}, "--importance, --reverse goes with --bits-budget or"),
        ({"per_linear": True}, "--per-linear goes with --bits-budget or"),
        ({"plan": Path("p"), "bits_choices": "2,4"}, "--bits-choices goes with"),
        ({"target_size": "small"}, "not a size"),
        ({"bits_budget": 3.0, "bits_choices": "two"}, "list of whole numbers"),
    ],
)
def test_options_that_do_not_go_together(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        budget_settings(**{**NONE, **changes})


def test_a_plan_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="cannot read the plan"):
        read_plan(tmp_path / "plan.json")


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--recipe", "fast", "--method", "gptq"], "chooses the method; leave out --method gptq"),
        (["--recipe", "slow"], "recipe 'slow' is not known; supported: fast, best"),
        (["--recipe", "fast", "-O", "steps=3"], "'steps=3' is not an option of GPTQ"),
        (["--recipe", "fast"], "method gptq learns from text"),
        (["--bits-budget", "3", "--importance", "magic"], "importance 'magic' is not known; supported: lim, zd"),
        (["--bits-budget", "3", "--bits", "4"], "the bits come from a budget"),
        (["--bits-budget", "3"], "--calibration"),
        (["--plan", "no/plan.json"], "cannot read the plan no/plan.json"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_mistakes_end_in_one_message(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path, words: list[str], message: str
) -> None:
    monkeypatch.setenv("OMP_WAIT_POLICY", "PASSIVE")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["dibit", "quantize", "nowhere", "--out", "x", *words])
    with pytest.raises(SystemExit) as left:
        main()
    assert left.value.code == 2
    assert message in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []
