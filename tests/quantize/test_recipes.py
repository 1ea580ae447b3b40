"""Recipes are settings under a name: they exist, they can be changed one by one, and a run says what they were."""

from __future__ import annotations

from pathlib import Path

import pytest

from dibit.engine.errors import ConfigError
from dibit.quantize import quantize_checkpoint
from dibit.quantize.methods import METHODS
from dibit.quantize.methods.gptq import GPTQ
from dibit.quantize.recipes import RECIPES, recipe


@pytest.mark.parametrize("name", RECIPES)
def test_a_recipe_stands_for_explicit_settings(name: str) -> None:
    found = recipe(name)
    settings = found.settings()
    assert isinstance(found.make({}), METHODS[found.method])
    assert settings["options"].items() >= dict(found.options).items()
    assert set(settings) == {"method", "options", "samples", "sequence_length"}
    assert found.summary


def test_options_of_a_recipe_can_be_changed() -> None:
    changed = recipe("fast").make({"damp": 0.05, "refit": False})
    assert changed == GPTQ(asymmetric=True, damp=0.05, refit=False)
    with pytest.raises(ConfigError, match="has no option steps"):
        recipe("fast").make({"steps": 3})
    with pytest.raises(ConfigError, match=r"recipe 'fastest' is not known; supported: fast, best"):
        recipe("fastest")


def test_the_report_has_the_settings(tiny: Path, text: Path, tmp_path: Path) -> None:
    fast = recipe("fast")
    options = {"bits": 2, "group_size": 16, "calibration": text, "samples": 8, "sequence_length": 40}
    report = quantize_checkpoint(str(tiny), tmp_path / "out", method=fast.make({}), **options)  # type: ignore[arg-type]
    assert report.method == fast.method
    assert dict(report.options) == fast.settings()["options"]
