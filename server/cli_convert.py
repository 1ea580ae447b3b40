"""`dibit convert`: a quantized checkpoint in the on-disk format of another tool."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal, cast

import typer

from dibit.engine.errors import ConfigError
from dibit.server.options import Json, Model


def convert(
    model: Model,
    *,
    to: Annotated[str, typer.Option(help="gptq (version 2), gptq-v1, awq or compressed-tensors")],
    out: Annotated[Path, typer.Option(help="directory to write; made when everything is in it", metavar="DIR")],
    gptq_zero: Annotated[
        str,
        typer.Option(help="zero points of a GPTQ source: v1 (minus one), v2, or auto: by label and values"),
    ] = "auto",
    overwrite: Annotated[bool, typer.Option("--overwrite", help="replace a checkpoint in DIR")] = False,
    json: Json = None,
    revision: Annotated[str | None, typer.Option(help="revision of a Hub model")] = None,
) -> None:
    """Write a quantized checkpoint in another format, bit for bit: the same codes, zero points and scales.

    Example: dibit convert models/demo-4bit --to compressed-tensors --out models/demo-4bit-ct
    """
    from dibit.engine.checkpoint.convert import convert_checkpoint
    from dibit.server.output import emit
    from dibit.server.progress import convert_progress

    if gptq_zero not in ("auto", "v1", "v2"):
        raise ConfigError(f"--gptq-zero is {gptq_zero!r}; supported: auto, v1, v2")
    with convert_progress() as progress:
        result = convert_checkpoint(
            model,
            out,
            to=to,
            gptq_zero=cast(Literal["auto", "v1", "v2"], gptq_zero),
            overwrite=overwrite,
            revision=revision,
            progress=progress,
        )
    emit(result, json)
