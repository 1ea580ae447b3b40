"""`dibit finetune`: a low-bit checkpoint becomes a better one of the same codes."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from dibit.server.options import Json, Model, parse_assignments


def finetune(
    model: Model,
    *,
    out: Annotated[Path, typer.Option(help="directory to write; it must not exist yet", metavar="DIR")],
    text: Annotated[Path | None, typer.Option(help="plain text to learn from", metavar="FILE")] = None,
    instructions: Annotated[
        Path | None,
        typer.Option(
            help="questions with answers, JSON or JSON lines: rows of instruction, input and output, or of messages",
            metavar="FILE",
        ),
    ] = None,
    objective: Annotated[
        str, typer.Option(help="kl: the float model's predictions; ce: the next token of the text alone")
    ] = "kl",
    teacher: Annotated[
        str | None,
        typer.Option(help="the float model, for kl; left out: the one MODEL's report names", metavar="MODEL"),
    ] = None,
    steps: Annotated[int, typer.Option(help="optimizer steps")] = 100,
    batch: Annotated[int, typer.Option(help="sequences in a step")] = 4,
    samples: Annotated[int, typer.Option(help="sequences taken from the text, or rows of the instructions")] = 256,
    sequence_length: Annotated[int, typer.Option(help="most tokens in a sequence")] = 512,
    seed: Annotated[int, typer.Option(help="seed of everything random")] = 0,
    option: Annotated[
        list[str] | None,
        typer.Option("--option", "-O", help="another setting, e.g. scale_rate=0.001", metavar="NAME=VALUE"),
    ] = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="replace DIR if it exists")] = False,
    revision: Annotated[str | None, typer.Option(help="revision of a teacher from the Hub")] = None,
    json: Json = None,
) -> None:
    """Train the step sizes and norms of a low-bit checkpoint end to end; its codes stay.

    Example: dibit finetune models/demo-2bit --out models/demo-2bit-tuned --text text.txt --teacher demo
    """
    from dibit.quantize.end_to_end import EndToEnd
    from dibit.quantize.finetune import train_end_to_end
    from dibit.server.output import write_json
    from dibit.server.progress import finetune_progress

    given = {"objective": objective, "steps": steps, "batch": batch}
    settings = EndToEnd(**{**given, **parse_assignments(EndToEnd, option or [])})
    with finetune_progress() as progress:
        report = train_end_to_end(
            model,
            out,
            settings=settings,
            text=text,
            instructions=instructions,
            samples=samples,
            sequence_length=sequence_length,
            seed=seed,
            teacher=teacher,
            revision=revision,
            overwrite=overwrite,
            progress=progress,
        )
    if json != "-":
        typer.echo(report.summary())
    write_json(report, json)
