"""Named combinations of a method, its options and the amount of text: what was found to work best for its time.

A recipe is nothing but a list of settings that could be given one by one; the report of a run holds all of them.
docs/quantize.md has the figures of what is in one and of what was left out.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from dibit.engine.errors import ConfigError
from dibit.quantize.block import BlockMethod
from dibit.quantize.methods import make_method
from dibit.quantize.stats import Method


@dataclass(frozen=True)
class Recipe:
    """
    method   name in METHODS
    options  of the method, where they differ from its defaults
    samples, sequence_length  calibration sequences and their tokens
    summary  what it is, in a line
    """

    method: str
    options: Mapping[str, Any] = field(default_factory=dict)
    samples: int = 128
    sequence_length: int = 512
    summary: str = ""

    def make(self, changes: Mapping[str, Any]) -> Method | BlockMethod:
        """The method, with `changes` in place of options of the recipe. Raises ConfigError for an unknown one."""
        return make_method(self.method, {**self.options, **changes})

    def settings(self) -> dict[str, Any]:
        """Everything that it stands for, defaults included."""
        method: Any = self.make({})
        return {
            "method": self.method,
            "options": dataclasses.asdict(method),
            "samples": self.samples,
            "sequence_length": self.sequence_length,
        }


RECIPES: dict[str, Recipe] = {
    "fast": Recipe(
        "gptq",
        {"asymmetric": True},
        summary="GPTQ towards the float model's outputs: minutes",
    ),
    "best": Recipe(
        "efficientqat",
        # Rates for a hundred thousand tokens; the method's own are for millions.
        {"start": "gptq", "steps": 96, "weight_rate": 0.012, "scale_rate": 0.005, "zero_rate": 0.01, "end_steps": 56},
        samples=256,
        summary="from such codes block by block, then step sizes and norms of the whole model, against the float model",
    ),
}


def recipe(name: str) -> Recipe:
    """Raises ConfigError for an unknown name."""
    if name not in RECIPES:
        raise ConfigError(f"recipe {name!r} is not known; supported: {', '.join(RECIPES)}")
    return RECIPES[name]
