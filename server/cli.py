"""The `dibit` command, and the composition root: with `cli_*.py`, which hold the longer commands, the one place that
may reach every folder. It imports them lazily, so that `dibit --help` is instant and serving never loads the quantizer.

Every failure ends in one message that says what was found, what is supported and what to do, and in a non-zero exit:
2 what the caller can mend, 1 everything else, 130 interrupted. DIBIT_DEBUG=1 adds the traceback.
"""

from __future__ import annotations

import logging
import os
import sys
import traceback
from typing import Annotated

import typer

from dibit.engine.config import LOG_FORMAT, EngineConfig, TransportName
from dibit.engine.errors import DibitError, UserError
from dibit.server.cli_bench import bench_app
from dibit.server.cli_cache import cache_app
from dibit.server.cli_convert import convert
from dibit.server.cli_eval import eval_app
from dibit.server.cli_finetune import finetune
from dibit.server.cli_kernels import kernels_app
from dibit.server.cli_quantize import quantize, report
from dibit.server.options import Json, Model, engine_options, parse_bytes

app = typer.Typer(
    help="Quantize language models to 2, 3 or 4 bits and serve them behind the OpenAI API.",
    no_args_is_help=True,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
    add_completion=False,
    context_settings={"max_content_width": 110},
)
app.command()(quantize)
app.command()(finetune)
app.command()(report)
app.command()(convert)
app.add_typer(eval_app, name="eval")
app.add_typer(bench_app, name="bench")
app.add_typer(kernels_app, name="kernels")
app.add_typer(cache_app, name="cache")


def main() -> None:
    """Entry point of the console script."""
    # A torch thread that spins while our own pool computes takes a core away from it. Read when OpenMP starts, so
    # it must be set before torch is imported.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    try:
        sys.exit(app(standalone_mode=False) or 0)
    except typer.Exit as leave:
        sys.exit(leave.exit_code)
    except (KeyboardInterrupt, typer.Abort):
        _fail("interrupted", status=130)
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(1)
    except UserError as error:
        _fail(str(error), status=2)
    except DibitError as error:
        _fail(str(error), status=1)
    except MemoryError:
        _fail("out of memory; `dibit plan MODEL` shows what the model needs and what is free", status=1)
    except Exception as error:
        # A usage error: typer carries its own copy of click, or click itself, so it is known by what it can do.
        if hasattr(error, "show") and hasattr(error, "exit_code"):
            error.show()
            sys.exit(error.exit_code)
        _fail(f"unexpected {type(error).__name__}: {error} (DIBIT_DEBUG=1 shows where)", status=1)


def _fail(message: str, *, status: int) -> None:
    if os.environ.get("DIBIT_DEBUG") == "1":
        traceback.print_exc()
    print(f"dibit: {message}", file=sys.stderr)
    sys.exit(status)


@app.callback()
def _setup(
    *,
    verbose: Annotated[bool, typer.Option("--verbose", "-v", help="log what is decided and why")] = False,
) -> None:
    logging.basicConfig(
        level=logging.INFO if verbose else logging.WARNING,
        format=LOG_FORMAT,
        stream=sys.stderr,
    )


@app.command()
@engine_options
def serve(
    model: Model,
    *,
    host: Annotated[str, typer.Option(help="address to listen on")] = "127.0.0.1",
    port: Annotated[int, typer.Option(help="port to listen on; 0 takes a free one")] = 8000,
    served_model_name: Annotated[
        str | None, typer.Option(help="the model's name in the API; left out: the model's own")
    ] = None,
    api_key: Annotated[
        str | None, typer.Option(help="key that clients must send as a bearer token", envvar="DIBIT_API_KEY")
    ] = None,
    drain_timeout_s: Annotated[float, typer.Option(help="seconds that running requests may take after SIGTERM")] = 30.0,
    cors_origin: Annotated[
        list[str] | None,
        typer.Option(help="browser origin that may use the API from its own pages, or * (repeat for several)"),
    ] = None,
    keep_alive_s: Annotated[
        float, typer.Option(help="longest silence on a stream before a comment is sent, so that proxies keep it")
    ] = 15.0,
    connection_idle_s: Annotated[
        float, typer.Option(help="seconds after which a connection without requests is closed")
    ] = 5.0,
    max_body_bytes: Annotated[
        str, typer.Option(help="largest request body; for example 32MiB", metavar="SIZE")
    ] = "8MiB",
    transport: Annotated[
        TransportName,
        typer.Option(help="the engine runs on a thread of the server or in a process; auto: a process on a GPU"),
    ] = "auto",
    config: EngineConfig,
) -> None:
    """Serve a model behind the OpenAI API; a chat page is at /.

    Example: dibit serve models/demo-4bit --port 8000
    """
    from dibit.engine.build import build_engine
    from dibit.server.lifecycle import ServerSettings, bind_socket
    from dibit.server.lifecycle import serve as run_server

    logging.getLogger().setLevel(logging.INFO)
    settings = ServerSettings(
        model_name=served_model_name,
        api_key=api_key,
        drain_timeout_s=drain_timeout_s,
        cors_origins=tuple(cors_origin or ()),
        keep_alive_s=keep_alive_s,
        connection_idle_s=connection_idle_s,
        max_body_bytes=parse_bytes(max_body_bytes),
    )
    with bind_socket(host, port) as sock:
        engine = build_engine(model, config, transport=transport)
        try:
            run_server(engine, settings, sock=sock)
        finally:
            engine.stop()


@app.command()
@engine_options
def chat(
    model: Model,
    *,
    system: Annotated[str | None, typer.Option(help="system message")] = None,
    max_tokens: Annotated[int, typer.Option(help="longest answer")] = 512,
    temperature: Annotated[float, typer.Option(help="0 is greedy")] = 0.7,
    top_p: Annotated[float, typer.Option(help="nucleus of the draw")] = 0.95,
    seed: Annotated[int | None, typer.Option(help="seed of the draws")] = None,
    config: EngineConfig,
) -> None:
    """Chat in the terminal. /reset starts over, /exit or Ctrl-D leaves, Ctrl-C stops an answer.

    Example: dibit chat demo
    """
    from dibit.engine import LLM, SamplingParams
    from dibit.engine.build import build_core
    from dibit.server.terminal_chat import run_chat

    params = SamplingParams(max_tokens=max_tokens, temperature=temperature, top_p=top_p, seed=seed)
    with LLM.of(build_core(model, config)) as llm:
        run_chat(llm, params, system=system)


@app.command()
@engine_options
def generate(
    model: Model,
    *,
    prompt: Annotated[str, typer.Option(help="text to continue; - reads it from stdin")],
    max_tokens: Annotated[int, typer.Option(help="longest completion")] = 128,
    temperature: Annotated[float, typer.Option(help="0 is greedy")] = 0.0,
    top_p: Annotated[float, typer.Option(help="nucleus of the draw")] = 1.0,
    top_k: Annotated[int, typer.Option(help="tokens in the draw; 0 is all")] = 0,
    seed: Annotated[int | None, typer.Option(help="seed of the draws")] = None,
    stop: Annotated[list[str] | None, typer.Option(help="text to stop at (repeat for several)")] = None,
    config: EngineConfig,
) -> None:
    """Print one completion as it is generated.

    Example: dibit generate demo --prompt "The capital of France is" --max-tokens 16
    """
    from dibit.engine import LLM, SamplingParams
    from dibit.engine.build import build_core

    params = SamplingParams(
        max_tokens=max_tokens, temperature=temperature, top_p=top_p, top_k=top_k, seed=seed, stop=tuple(stop or ())
    )
    text = sys.stdin.read() if prompt == "-" else prompt
    with LLM.of(build_core(model, config)) as llm:
        for output in llm.stream(text, params):
            typer.echo(output.text, nl=False)
    typer.echo()


@app.command()
def inspect(
    model: Model,
    *,
    json: Json = None,
    revision: Annotated[str | None, typer.Option(help="revision of a Hub model")] = None,
) -> None:
    """What is in a checkpoint: sizes, formats, bits of every kind of layer. Reads headers only.

    Example: dibit inspect models/demo-4bit
    """
    from dibit.engine.checkpoint.inspect import inspect_checkpoint
    from dibit.engine.checkpoint.resolve import resolve_model
    from dibit.server.output import emit

    emit(inspect_checkpoint(resolve_model(model, revision=revision)), json)


@app.command()
@engine_options
def plan(model: Model, *, json: Json = None, config: EngineConfig) -> None:
    """What a model will need against what is free, and the largest context and batch that fit. Reads headers only.

    Example: dibit plan models/demo-4bit --max-num-seqs 16
    """
    from dibit.engine.memory_plan import plan_model
    from dibit.server.output import emit

    emit(plan_model(model, config), json)


@app.command()
def doctor(*, json: Json = None) -> None:
    """What this machine runs: cores, instruction set, kernels chosen for every op and why, formats, memory.

    Example: dibit doctor
    """
    from dibit.engine.doctor import examine
    from dibit.server.output import emit

    emit(examine(), json)
