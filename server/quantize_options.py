"""The options of `dibit quantize`, and what they say together that none of them says alone."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from dibit.engine.errors import ConfigError
from dibit.server.options import parse_bytes, parse_integers

Out = Annotated[Path, typer.Option(help="directory to write; it must not exist yet", metavar="DIR")]
Bits = Annotated[int | None, typer.Option(help="bits per weight: 2, 3, 4 or 8; left out: 4")]
GroupSize = Annotated[
    int | None, typer.Option(help="columns that share a scale: 16, 32, 64, 128, or -1 for a whole row; left out: 64")
]
Symmetric = Annotated[bool, typer.Option("--symmetric", help="fix the zero point at the middle of the range")]
ZeroGridName = Annotated[
    str,
    typer.Option(
        "--zero-grid",
        help="integer, or fractional: less error at 2 and 3 bits for no bit and no time, in a checkpoint that only "
        "dibit reads",
    ),
]
ActivationBits = Annotated[
    int | None,
    typer.Option(help="4, 6 or 8: serving rounds the inputs of quantized linears too; left out: weights only"),
]
RotateResidual = Annotated[
    bool,
    typer.Option(
        "--rotate-residual", help="turn the residual stream by a random rotation first, merged into all weights"
    ),
]
Text = Annotated[Path | None, typer.Option(help="plain text the method learns from", metavar="FILE")]
Samples = Annotated[int | None, typer.Option(help="calibration sequences; left out: 128, or those of the recipe")]
SequenceLength = Annotated[int | None, typer.Option(help="tokens in a calibration sequence; left out: 512")]
RecipeName = Annotated[
    str | None, typer.Option("--recipe", help="method and options found to work well together: fast or best")
]
Seed = Annotated[int, typer.Option(help="seed of everything random")]
MethodOptions = Annotated[
    list[str] | None,
    typer.Option("--option", "-O", help="a setting of the method, e.g. damp=0.05", metavar="NAME=VALUE"),
]
BitsBudget = Annotated[
    float | None,
    typer.Option(help="bits of code per weight on average, e.g. 2.85; each block gets its own width", metavar="BITS"),
]
TargetSize = Annotated[
    str | None, typer.Option(help="size of the whole checkpoint; each block gets its own width", metavar="SIZE")
]
BitsChoices = Annotated[str | None, typer.Option(help="widths a budget may choose from; left out: 2,3,4,8")]
ImportanceName = Annotated[
    str | None,
    typer.Option(
        help="what tells which blocks get more bits: lim, zd, measured, error, fisher, depth or random; left out: lim"
    ),
]
ImportanceSamples = Annotated[
    int | None, typer.Option(help="calibration sequences that the importance looks at; left out: 16, or 4 for measured")
]
Reverse = Annotated[bool, typer.Option("--reverse", help="give the least important blocks more bits: for comparison")]
PerLinear = Annotated[
    bool,
    typer.Option(
        "--per-linear",
        help="a width for q, k and v, one for o, one for gate and up, one for down, instead of one for the block",
    ),
]
PlanFile = Annotated[Path | None, typer.Option("--plan", help="a plan: formats by layer, as JSON", metavar="FILE")]
SavePlan = Annotated[Path | None, typer.Option(help="write the plan that was used", metavar="FILE")]
Overwrite = Annotated[bool, typer.Option("--overwrite", help="replace DIR if it exists")]


def budget_settings(
    *,
    plan: Path | None,
    bits_budget: float | None,
    target_size: str | None,
    bits_choices: str | None,
    importance: str | None,
    importance_samples: int | None,
    reverse: bool,
    per_linear: bool,
) -> dict[str, Any] | None:
    """Fields of the budget that the options describe, or None for none.

    Raises ConfigError for options that exclude each other or need one that is absent.
    """
    sources = {"--plan": plan, "--bits-budget": bits_budget, "--target-size": target_size}
    given = [name for name, value in sources.items() if value is not None]
    if len(given) > 1:
        raise ConfigError(f"{' and '.join(given)} exclude each other; give one of them")
    details = {
        "--bits-choices": bits_choices,
        "--importance": importance,
        "--importance-samples": importance_samples,
        "--reverse": reverse or None,
        "--per-linear": per_linear or None,
    }
    lonely = [name for name, value in details.items() if value is not None]
    if bits_budget is None and target_size is None:
        if lonely:
            raise ConfigError(f"{', '.join(lonely)} goes with --bits-budget or --target-size; give one of them")
        return None
    if per_linear and importance is None:
        importance = "fisher"
    settings = {
        "mean_bits": bits_budget,
        "total_bytes": None if target_size is None else parse_bytes(target_size),
        "choices": None if bits_choices is None else tuple(parse_integers(bits_choices)),
        "importance": importance,
        "samples": importance_samples,
        "reverse": reverse,
        "per_site": per_linear,
    }
    return {name: value for name, value in settings.items() if value is not None}


def read_plan(path: Path) -> str:
    """Text of a plan file. Raises ConfigError."""
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"cannot read the plan {path}: {error}") from error
