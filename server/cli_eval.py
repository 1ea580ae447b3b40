"""`dibit eval`: a model's quality, measured through the kernels that answer requests."""

from __future__ import annotations

import dataclasses
from contextlib import ExitStack, closing
from pathlib import Path
from tempfile import gettempdir
from typing import TYPE_CHECKING, Annotated

import typer

from dibit.engine.config import EngineConfig
from dibit.engine.errors import ConfigError
from dibit.server.options import MODEL_HELP, Json, Model, engine_options

if TYPE_CHECKING:
    from dibit.quantize.reference import StreamedReference

eval_app = typer.Typer(help="Measure a model's quality through the serving runtime.", no_args_is_help=True)

Text = Annotated[Path, typer.Option(help="UTF-8 text to predict", metavar="FILE")]
Context = Annotated[int, typer.Option("--ctx", help="tokens in a window")]
MaxWindows = Annotated[int | None, typer.Option(help="score the first N windows only", metavar="N")]


@eval_app.command("ppl")
@engine_options
def eval_ppl(
    model: Model,
    *,
    text: Text,
    ctx: Context = 2048,
    max_windows: MaxWindows = None,
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


@eval_app.command("kl")
@engine_options
def eval_kl(
    model: Model,
    *,
    reference: Annotated[str, typer.Option(help=f"what it should predict like: {MODEL_HELP}", metavar="MODEL")],
    text: Text,
    ctx: Context = 2048,
    max_windows: MaxWindows = None,
    stream_reference: Annotated[
        bool,
        typer.Option(
            "--stream-reference", help="run a float reference first and block by block, so that it is never in memory"
        ),
    ] = False,
    json: Json = None,
    config: EngineConfig,
) -> None:
    """Divergence of a model's predictions from those of a reference, usually the float model it was made from:
    KL of every token, agreement of the likeliest tokens, perplexity of both. Holds both models in memory, or with
    --stream-reference the model and a block of the reference, with the same result.

    Example: dibit eval kl models/demo-4bit --reference demo --text wiki.test.raw --ctx 512 --max-windows 8
    """
    from dibit.engine import LLM
    from dibit.engine.build import build_core
    from dibit.quantize.divergence import divergence
    from dibit.server.output import emit
    from dibit.server.progress import window_progress

    one = _for_one_sequence(config, ctx)
    with ExitStack() as stack:
        other: LLM | StreamedReference
        if stream_reference:
            other = _streamed(reference, text, config, context=ctx, max_windows=max_windows)
        else:
            other = stack.enter_context(LLM.of(build_core(reference, one)))
        llm = stack.enter_context(LLM.of(build_core(model, one)))
        progress = stack.enter_context(window_progress("kl"))
        result = divergence(llm, other, text, context=ctx, max_windows=max_windows, progress=progress)
    emit(result, json)


def _streamed(
    reference: str, text: Path, config: EngineConfig, *, context: int, max_windows: int | None
) -> StreamedReference:
    from dibit.engine.checkpoint import open_checkpoint, resolve_model
    from dibit.quantize.reference import StreamedReference
    from dibit.server.progress import quantize_progress

    with closing(open_checkpoint(resolve_model(reference))) as checkpoint, quantize_progress() as show:
        return StreamedReference(
            checkpoint,
            text,
            context=context,
            max_windows=max_windows,
            directory=Path(gettempdir()),
            threads=config.threads,
            progress=lambda done, blocks: show(done, blocks, "reference"),
        )


@eval_app.command("tasks")
@engine_options
def eval_tasks(
    model: Model,
    *,
    tasks: Annotated[str, typer.Option(help="tasks of lm_eval, separated by commas", metavar="NAMES")],
    include_path: Annotated[
        Path | None, typer.Option(help="directory with task files of your own", metavar="DIR")
    ] = None,
    shots: Annotated[int | None, typer.Option(help="examples before each question; left out: the task's own")] = None,
    limit: Annotated[int | None, typer.Option(help="first N questions of each task", metavar="N")] = None,
    chat_template: Annotated[
        bool, typer.Option("--chat-template", help="put each question into the model's chat template")
    ] = False,
    seed: Annotated[int, typer.Option(help="seed of the choice of examples")] = 0,
    json: Json = None,
    config: EngineConfig,
) -> None:
    """Tasks of lm-evaluation-harness, in process; needs `pip install dibit[eval]`.

    Example: dibit eval tasks models/demo-4bit --tasks arc_easy,piqa --limit 100
    """
    from dibit.engine import LLM
    from dibit.engine.build import build_core
    from dibit.server.output import emit
    from dibit.server.progress import request_progress

    names = [name.strip() for name in tasks.split(",") if name.strip()]
    if not names:
        raise ConfigError("--tasks names no task; write for example arc_easy,piqa")
    if include_path is not None and not include_path.is_dir():
        raise ConfigError(f"{include_path} is not a directory of task files")
    try:
        from dibit.quantize.tasks import run_tasks
    except ModuleNotFoundError as error:
        if (error.name or "").startswith("dibit"):
            raise
        raise ConfigError(
            f"the tasks come from lm_eval, which is not installed ({error}); install it with pip install 'dibit[eval]'"
        ) from error
    with LLM.of(build_core(model, config)) as llm, request_progress() as progress:
        results = run_tasks(
            llm,
            names,
            include_path=include_path,
            shots=shots,
            limit=limit,
            chat_template=chat_template,
            seed=seed,
            progress=progress,
        )
    emit(results, json)


def _for_one_sequence(config: EngineConfig, tokens: int) -> EngineConfig:
    """With a cache for one sequence of `tokens`, where none is asked for: two models share the memory."""
    if config.kv_bytes is not None or tokens < 1:
        return config
    return dataclasses.replace(config, max_num_seqs=1, max_model_len=config.max_model_len or tokens)
