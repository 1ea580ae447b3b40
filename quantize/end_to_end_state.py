"""Where an end-to-end training is, on disk: what a killed run continues from, to the same bits.

Tensors go into a file of their own; a small JSON file that names it is replaced after that, so there is always one
whole state. Floats in JSON keep all their digits. The order of the examples is not stored: it follows from the seed.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from dibit.engine.checkpoint.json_file import read_object
from dibit.engine.checkpoint.safetensors_file import SafetensorsFile
from dibit.engine.checkpoint.shard_file import write_shard, write_text

STATE_NAME = "end_to_end.json"


@dataclass(frozen=True)
class HeldOut:
    """How the model does on held-out text after `step` steps.

    loss       of the objective
    kl         mean divergence from the float model's predictions; None without one
    nll        mean negative log-likelihood of the next token
    agreement  share of tokens where the float model's first choice is this model's too; None without one
    """

    step: int
    loss: float
    kl: float | None
    nll: float
    agreement: float | None


@dataclass
class Course:
    """What has happened so far.

    step       steps made in this attempt, those skipped included
    pending    losses since the last entry of `losses`
    tokens, positions  tokens that counted, and all that went through the model
    skipped, skipped_now  steps whose loss or gradient was not finite, in all attempts and in this one
    """

    step: int = 0
    losses: list[tuple[int, float]] = field(default_factory=list)
    held_out: list[HeldOut] = field(default_factory=list)
    pending: list[float] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    best_step: int = 0
    skipped: int = 0
    skipped_now: int = 0
    restarts: int = 0
    updates: int = 0
    tokens: int = 0
    positions: int = 0
    training_s: float = 0.0

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Course:
        losses = [(step, loss) for step, loss in data["losses"]]
        return cls(**{**data, "losses": losses, "held_out": [HeldOut(**point) for point in data["held_out"]]})


@dataclass(frozen=True)
class State:
    """Where an attempt is: `values` with the running means of their gradients and of the squares of those, and the
    best values seen, all float32 [P]."""

    values: Tensor
    first: Tensor
    second: Tensor
    best: Tensor

    @classmethod
    def begin(cls, values: Tensor) -> State:
        return cls(values.clone(), torch.zeros_like(values), torch.zeros_like(values), values.clone())


def save_state(directory: Path, state: State, course: Course) -> None:
    """On disk when this returns."""
    named = {name: getattr(state, name) for name in State.__dataclass_fields__}
    number = course.restarts * 10_000_000 + course.step
    file = f"end_to_end-{number:09}.state"
    layout = {name: (tensor.dtype, tuple(tensor.shape)) for name, tensor in named.items()}
    write_shard(directory / file, layout, named.__getitem__)
    write_text(directory / STATE_NAME, json.dumps({"file": file, "course": asdict(course)}))
    for path in state_files(directory):
        if path.name not in (file, STATE_NAME):
            path.unlink()


def load_state(directory: Path) -> tuple[State, Course] | None:
    """What was saved last; None when nothing was."""
    if not (directory / STATE_NAME).exists():
        return None
    content = read_object(directory / STATE_NAME)
    file = SafetensorsFile(directory / content["file"])
    try:
        state = State(**{name: file.read(name) for name in State.__dataclass_fields__})
    finally:
        file.close()
    return state, Course.from_dict(content["course"])


def state_files(directory: Path) -> Sequence[Path]:
    """Files of the kind that `save_state` writes."""
    return [*directory.glob("end_to_end-*.state"), *directory.glob(STATE_NAME)]
