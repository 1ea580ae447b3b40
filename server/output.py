"""How a command shows a frozen dataclass: aligned lines for a person, JSON for a program."""

from __future__ import annotations

import dataclasses
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from dibit.engine.errors import ConfigError


def emit(value: Any, target: str | None) -> None:
    """Print `value` for a person (its own `text()` where it has one), and as JSON to `target` when one is given."""
    if target != "-":
        print(value.text() if hasattr(value, "text") else "\n".join(_lines(value)))
    write_json(value, target)


def write_json(value: Any, target: str | None) -> None:
    """Write a dataclass, or a list of them, as JSON to a file or "-" (stdout); None writes nothing."""
    if target is None:
        return
    text = json.dumps(_plain(value), indent=2, default=str)
    if target == "-":
        sys.stdout.write(text + "\n")
        return
    path = Path(target)
    try:
        aside = path.with_name(path.name + ".partial")
        aside.write_text(text + "\n", encoding="utf-8")
        aside.replace(path)
    except OSError as error:
        raise ConfigError(f"cannot write {target}: {error}") from error


def _plain(value: Any) -> Any:
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return dataclasses.asdict(value)
    if isinstance(value, Sequence) and not isinstance(value, str):
        return [_plain(item) for item in value]
    return value


def _lines(value: Any, indent: str = "") -> list[str]:
    fields = dataclasses.fields(value)
    width = max(len(field.name) for field in fields)
    lines = []
    for field in fields:
        item = getattr(value, field.name)
        label = field.name.replace("_", " ").ljust(width)
        if isinstance(item, tuple | list) and len(item) > 8:
            item = f"{len(item)} values (--json lists them)"
        lines.append(f"{indent}{label}  {item}")
    return lines
