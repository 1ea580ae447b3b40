"""`dibit eval`: a model's quality, measured through the kernels that answer requests."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from dibit.engine.config import EngineConfig
from dibit.server.options import Json, Model, engine_options

eval_app = typer.Typer(help="Measure a model's quality through the serving runtime.", no_args_is_help=True)


@eval_app.command("ppl")
@engine_options
def eval_ppl(
    model: Model,
    *,
    text: Annotated[Path, typer.Option(help="UTF-8 text to predict", metavar="FILE")],
    ctx: Annotated[int, typer.Option(help="tokens in a window")] = 2048,
    max_windows: Annotated[int | None, typer.Option(help="score the first N windows only", metavar="N")] = None,
    json: Json = None,
    config: EngineConfig,
) -> None:
    """Perplexity on a text, through the kernels that answer requests.

    Example: dibit eval ppl models/demo-4bit --text wiki.test.raw --ctx 2048 --max-windows 32
    """
    from dibit.engine import LLM
    from dibit.engine.build import build_core
    from dibit.quantize.evaluate import perplexity
    from dibit.server.output import emit
    from dibit.server.progress import window_progress

    with LLM.of(build_core(model, config)) as llm, window_progress() as progress:
        result = perplexity(llm, text, context=ctx, max_windows=max_windows, progress=progress)
    emit(result, json)
