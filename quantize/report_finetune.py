"""The end-to-end phase on the report page, from the `finetune_report.json` beside it (end_to_end.py writes it)."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from dibit.engine.errors import CheckpointError
from dibit.quantize.report import FINETUNE_REPORT_NAME, duration
from dibit.quantize.report_svg import Series, escape, line_chart, number

_MEASURES = {
    "loss": "loss",
    "nll": "negative log-likelihood",
    "kl": "KL from the float model",
    "agreement": "same first choice",
}


def end_to_end_section(directory: Path) -> str:
    """The section's content; "" without such a report. Raises CheckpointError when it cannot be read."""
    path = directory / FINETUNE_REPORT_NAME
    if not path.is_file():
        return ""
    try:
        return _section(json.loads(path.read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError, KeyError, IndexError, StopIteration) as error:
        raise CheckpointError(
            f"{path} is not a report of this version ({type(error).__name__}: {error}); finetune again to have one"
        ) from error


def _section(data: Mapping[str, Any]) -> str:
    points = data["held_out"]
    first, best = points[0], next(point for point in points if point["step"] == data["best_step"])
    curves = [
        Series("training batches", [(step, _value(loss)) for step, loss in data["losses"]], "s0"),
        Series("held-out examples", [(point["step"], _value(point["loss"])) for point in points], "s1"),
    ]
    rows = "".join(
        f"<tr><td>{name}</td><td>{number(_value(first[key]))}</td><td>{number(_value(best[key]))}</td></tr>"
        for key, name in _MEASURES.items()
        if first[key] is not None or best[key] is not None
    )
    notes = "".join(f"<p>{escape(note)}</p>" for note in data["notes"])
    return (
        f"<p>{int(data['trained'])} numbers trained on {int(data['tokens'])} tokens in {duration(data['seconds'])}, "
        f"{number(data['tokens_per_s'])} tokens per second; kept: step {int(data['best_step'])}.</p>"
        f"{line_chart(curves, x_label='step', y_label='loss', log=True)}"
        "<table><tr><th>on the held-out examples</th><th>before</th><th>after</th></tr>"
        f"{rows}</table>{notes}"
    )


def _value(found: float | None) -> float:
    return math.nan if found is None else float(found)
