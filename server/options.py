"""Arguments that several commands share, and options made from the fields of a settings dataclass, so that a default
and its help are written once.

The help of a field is its line in the dataclass's docstring (`name  text`, continued on indented lines).
"""

from __future__ import annotations

import dataclasses
import functools
import inspect
import re
import typing
from collections.abc import Callable, Iterable
from typing import Annotated, Any, Literal

import typer

from dibit.engine.config import EngineConfig
from dibit.engine.errors import ConfigError

MODEL_HELP = "a directory, a .gguf file, a Hub id, or `demo` (SmolLM2-135M-Instruct)"
Model = Annotated[str, typer.Argument(help=MODEL_HELP, metavar="MODEL")]
Json = Annotated[
    str | None, typer.Option("--json", help="write the figures as JSON to FILE, or - for stdout", metavar="FILE|-")
]

_UNITS = {"": 1, "k": 10**3, "m": 10**6, "g": 10**9, "t": 10**12, "ki": 2**10, "mi": 2**20, "gi": 2**30, "ti": 2**40}


def parse_bytes(text: str) -> int:
    """A size such as "512MB", "1.5GiB" or "1000000" in bytes. Raises ConfigError."""
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([kmgt]?i?)b?\s*", text.lower())
    if match is None or match[2] not in _UNITS:
        raise ConfigError(f"{text!r} is not a size; write for example 512MB, 1.5GiB or 1000000")
    return int(float(match[1]) * _UNITS[match[2]])


def parse_integers(text: str) -> list[int]:
    """A list such as "1,8,32". Raises ConfigError."""
    try:
        return [int(part) for part in text.split(",")]
    except ValueError as error:
        raise ConfigError(f"{text!r} is not a list of whole numbers; write for example 1,8,32") from error


def engine_options(command: Callable[..., None]) -> Callable[..., None]:
    """Gives `command(..., *, config: EngineConfig)` one option per field of EngineConfig in place of `config`."""
    fields = dataclasses.fields(EngineConfig)
    types = typing.get_type_hints(EngineConfig)
    helps = {name: text.replace("None:", "left out:") for name, text in field_helps(EngineConfig).items()}

    @functools.wraps(command)
    def run(**values: Any) -> None:
        chosen = {field.name: values.pop(field.name) for field in fields}
        if isinstance(chosen["kv_bytes"], str):
            chosen["kv_bytes"] = parse_bytes(chosen["kv_bytes"])
        for field in fields:
            # A choice of numbers reaches here as the text that was typed.
            if typing.get_origin(types[field.name]) is Literal and isinstance(field.default, int):
                chosen[field.name] = int(chosen[field.name])
        command(**values, config=EngineConfig(**chosen))

    own = [p for p in inspect.signature(command, eval_str=True).parameters.values() if p.name != "config"]
    extra = [
        inspect.Parameter(
            field.name,
            inspect.Parameter.KEYWORD_ONLY,
            default=str(field.default) if _is_number_choice(types[field.name]) else field.default,
            annotation=_annotation(field.name, types[field.name], helps[field.name]),
        )
        for field in fields
    ]
    run.__signature__ = inspect.Signature(own + extra)  # type: ignore[attr-defined]
    run.__annotations__ = {p.name: p.annotation for p in own + extra}
    return run


def field_helps(settings: type) -> dict[str, str]:
    """The docstring's line for each field. Raises KeyError for a field that has none."""
    lines = inspect.getdoc(settings) or ""
    found: dict[str, str] = {}
    current = ""
    for line in lines.splitlines():
        match = re.match(r"(\w+)  +(\S.*)", line)
        if match:
            current = match[1]
            found[current] = match[2]
        elif line.startswith("  ") and current:
            found[current] += " " + line.strip()
        else:
            current = ""
    return {field.name: found[field.name] for field in dataclasses.fields(settings)}


def parse_assignments(settings: type, assignments: Iterable[str]) -> dict[str, Any]:
    """`name=value` texts as keyword arguments of a settings dataclass. Raises ConfigError naming what it has."""
    types = typing.get_type_hints(settings)
    fields = {field.name: types[field.name] for field in dataclasses.fields(settings)}
    values: dict[str, Any] = {}
    for assignment in assignments:
        name, equals, text = assignment.partition("=")
        if not equals or name not in fields:
            known = ", ".join(fields) or "none"
            raise ConfigError(f"{assignment!r} is not an option of {settings.__name__}; it has: {known} (NAME=VALUE)")
        try:
            values[name] = _PARSERS[fields[name]](text)
        except (KeyError, ValueError) as error:
            kind = getattr(fields[name], "__name__", str(fields[name]))
            raise ConfigError(f"{name}={text!r}: a value of type {kind} is needed") from error
    return values


_PARSERS: dict[Any, Callable[[str], Any]] = {
    int: int,
    float: float,
    str: str,
    bool: lambda text: {"true": True, "1": True, "false": False, "0": False}[text.lower()],
}


def _is_number_choice(kind: Any) -> bool:
    return typing.get_origin(kind) is Literal and isinstance(typing.get_args(kind)[0], int)


def _annotation(name: str, kind: Any, help: str) -> Any:
    if _is_number_choice(kind):
        kind = Literal[tuple(str(choice) for choice in typing.get_args(kind))]
    if name == "kv_bytes":
        return Annotated[str | None, typer.Option("--kv-bytes", help=f"{help}; for example 2GiB", metavar="SIZE")]
    flag = f"--{name.replace('_', '-')}"
    if kind is bool:
        flag = f"{flag}/--no-{flag[2:]}"
    return Annotated[kind, typer.Option(flag, help=help)]
