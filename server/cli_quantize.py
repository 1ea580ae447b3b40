"""`dibit quantize`: a float checkpoint becomes a low-bit one; `dibit report`: what that came to, as a page."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal, cast

import typer

from dibit.engine.errors import ConfigError
from dibit.server import quantize_options as q
from dibit.server.options import Model, parse_assignments


def quantize(
    model: Model,
    *,
    out: q.Out,
    method: Annotated[
        str | None,
        typer.Option(help="rtn (no calibration), gptq, awq, omniquant, block-ap or efficientqat; left out: rtn"),
    ] = None,
    recipe: q.RecipeName = None,
    bits: q.Bits = None,
    group_size: q.GroupSize = None,
    symmetric: q.Symmetric = False,
    zero_grid: q.ZeroGridName = "integer",
    activation_bits: q.ActivationBits = None,
    rotate_residual: q.RotateResidual = False,
    calibration: q.Text = None,
    samples: q.Samples = None,
    sequence_length: q.SequenceLength = None,
    seed: q.Seed = 0,
    option: q.MethodOptions = None,
    bits_budget: q.BitsBudget = None,
    target_size: q.TargetSize = None,
    bits_choices: q.BitsChoices = None,
    importance: q.ImportanceName = None,
    importance_samples: q.ImportanceSamples = None,
    reverse: q.Reverse = False,
    per_linear: q.PerLinear = False,
    plan_file: q.PlanFile = None,
    save_plan: q.SavePlan = None,
    overwrite: q.Overwrite = False,
    revision: Annotated[str | None, typer.Option(help="revision of a Hub model")] = None,
) -> None:
    """Make a low-bit checkpoint from a float model.

    Example: dibit quantize demo --out models/demo-4bit --method rtn --bits 4 --group-size 64
    """
    from dibit.quantize import METHODS, quantize_checkpoint
    from dibit.quantize.budget import Budget
    from dibit.quantize.plan import Plan
    from dibit.quantize.recipes import Recipe
    from dibit.quantize.recipes import recipe as named_recipe
    from dibit.quantize.report_html import HTML_NAME
    from dibit.server.progress import quantize_progress

    if recipe is not None and method is not None:
        raise ConfigError(f"--recipe {recipe} chooses the method; leave out --method {method}")
    settings = Recipe(method or "rtn") if recipe is None else named_recipe(recipe)
    if settings.method not in METHODS:
        raise ConfigError(f"method {method!r} is not known; supported: {', '.join(METHODS)}")
    budget = q.budget_settings(
        plan=plan_file,
        bits_budget=bits_budget,
        target_size=target_size,
        bits_choices=bits_choices,
        importance=importance,
        importance_samples=importance_samples,
        reverse=reverse,
        per_linear=per_linear,
    )
    given = None if plan_file is None else Plan.from_json(q.read_plan(plan_file))
    with quantize_progress() as progress:
        done = quantize_checkpoint(
            model,
            out,
            method=settings.make(parse_assignments(METHODS[settings.method], option or [])),
            bits=bits,
            group_size=group_size,
            symmetric=symmetric,
            zero_grid=cast(Literal["integer", "fractional"], zero_grid),
            activation_bits=activation_bits,
            rotate_residual=rotate_residual,
            calibration=calibration,
            samples=settings.samples if samples is None else samples,
            sequence_length=settings.sequence_length if sequence_length is None else sequence_length,
            seed=seed,
            plan=given if budget is None else Budget(**budget),
            save_plan=save_plan,
            overwrite=overwrite,
            revision=revision,
            progress=progress,
        )
    typer.echo(f"{done.summary()}\nreport: {out / HTML_NAME}")


def report(
    checkpoint: Annotated[Path, typer.Argument(help="directory of a checkpoint that quantize wrote", metavar="DIR")],
) -> None:
    """Make the report page of a quantized checkpoint again, from its JSON; print the summary.

    Example: dibit report models/demo-4bit
    """
    from dibit.quantize.report import QuantizeReport
    from dibit.quantize.report_html import write_html

    found = QuantizeReport.read(checkpoint)
    try:
        page = write_html(found, checkpoint)
    except OSError as error:
        raise ConfigError(f"cannot write into {checkpoint}: {error.strerror or error}") from error
    typer.echo(f"{found.summary()}\n{page}")
