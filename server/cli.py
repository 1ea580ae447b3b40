"""The `dibit` command, and the composition root: the one file that may reach every folder. It imports them lazily,
so that `dibit --help` is instant and serving never loads the quantizer.

Every failure ends in one message that says what was found, what is supported and what to do, and in a non-zero exit:
2 what the caller can mend, 1 everything else, 130 interrupted. DIBIT_DEBUG=1 adds the traceback.
"""

from __future__ import annotations

import logging
import os
import sys
import traceback
from pathlib import Path
from typing import Annotated

import typer

from dibit.engine.config import EngineConfig
from dibit.engine.errors import ConfigError, DibitError, UserError
from dibit.server import quantize_options as q
from dibit.server.options import engine_options, parse_assignments, parse_integers

app = typer.Typer(
    help="Quantize language models to 2, 3 or 4 bits and serve them behind the OpenAI API.",
    no_args_is_help=True,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
    add_completion=False,
    context_settings={"max_content_width": 110},
)
eval_app = typer.Typer(help="Measure a model's quality through the serving runtime.", no_args_is_help=True)
bench_app = typer.Typer(help="Measure speed, beside the machine's limits.", no_args_is_help=True)
app.add_typer(eval_app, name="eval")
app.add_typer(bench_app, name="bench")

MODEL_HELP = "a directory, a .gguf file, a Hub id, or `demo` (SmolLM2-135M-Instruct)"
Model = Annotated[str, typer.Argument(help=MODEL_HELP, metavar="MODEL")]
Json = Annotated[
    str | None, typer.Option("--json", help="write the figures as JSON to FILE, or - for stdout", metavar="FILE|-")
]


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
        format="%(asctime)s %(levelname)s %(message)s",
        stream=sys.stderr,
    )


@app.command()
def quantize(
    model: Model,
    *,
    out: q.Out,
    method: Annotated[str, typer.Option(help="rtn (no calibration), gptq, awq, omniquant or block-ap")] = "rtn",
    bits: q.Bits = None,
    group_size: q.GroupSize = None,
    symmetric: q.Symmetric = False,
    calibration: q.Text = None,
    samples: q.Samples = 128,
    sequence_length: q.SequenceLength = 512,
    seed: q.Seed = 0,
    option: q.MethodOptions = None,
    bits_budget: q.BitsBudget = None,
    target_size: q.TargetSize = None,
    bits_choices: q.BitsChoices = None,
    importance: q.ImportanceName = None,
    importance_samples: q.ImportanceSamples = None,
    reverse: q.Reverse = False,
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
    from dibit.server.progress import quantize_progress

    if method not in METHODS:
        raise ConfigError(f"method {method!r} is not known; supported: {', '.join(METHODS)}")
    budget = q.budget_settings(
        plan=plan_file,
        bits_budget=bits_budget,
        target_size=target_size,
        bits_choices=bits_choices,
        importance=importance,
        importance_samples=importance_samples,
        reverse=reverse,
    )
    given = None if plan_file is None else Plan.from_json(q.read_plan(plan_file))
    with quantize_progress() as progress:
        report = quantize_checkpoint(
            model,
            out,
            method=METHODS[method](**parse_assignments(METHODS[method], option or [])),
            bits=bits,
            group_size=group_size,
            symmetric=symmetric,
            calibration=calibration,
            samples=samples,
            sequence_length=sequence_length,
            seed=seed,
            plan=given if budget is None else Budget(**budget),
            save_plan=save_plan,
            overwrite=overwrite,
            revision=revision,
            progress=progress,
        )
    typer.echo(report.summary())


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
    config: EngineConfig,
) -> None:
    """Serve a model behind the OpenAI API; a chat page is at /.

    Example: dibit serve models/demo-4bit --port 8000
    """
    from dibit.engine.build import build_engine
    from dibit.server.lifecycle import bind_socket
    from dibit.server.lifecycle import serve as run_server

    logging.getLogger().setLevel(logging.INFO)
    sock = bind_socket(host, port)
    engine = build_engine(model, config)
    run_server(engine, sock=sock, model_name=served_model_name, api_key=api_key, drain_timeout_s=drain_timeout_s)


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


@bench_app.command("ops")
def bench_ops(
    *,
    shapes: Annotated[
        str, typer.Option(help="weights as NxK, separated by commas")
    ] = "4096x4096,11008x4096,4096x11008",
    bits: Annotated[str, typer.Option(help="widths")] = "2,3,4,8",
    group_size: Annotated[int, typer.Option(help="columns that share a scale")] = 64,
    batch_sizes: Annotated[str, typer.Option(help="tokens per step")] = "1",
    threads: Annotated[int | None, typer.Option(help="left out: every core this process may use")] = None,
    json: Json = None,
) -> None:
    """Time of the quantized linear per shape and width, against the measured bandwidth and torch in fp32 and bf16.

    Example: dibit bench ops --shapes 4096x4096 --bits 2,4 --batch-sizes 1,64
    """
    from dibit.bench import ops
    from dibit.kernels.formats import FormatError
    from dibit.kernels.native import NativeError
    from dibit.server.output import write_json

    pairs = []
    for shape in shapes.split(","):
        n, x, k = shape.strip().lower().partition("x")
        if not (x and n.isdigit() and k.isdigit()):
            raise ConfigError(f"{shape!r} is not a shape; write for example 4096x11008 (outputs x inputs)")
        pairs.append((int(n), int(k)))
    try:
        results = ops.run_ops(
            pairs,
            bits=parse_integers(bits),
            group_size=group_size,
            batch_sizes=parse_integers(batch_sizes),
            threads=threads,
        )
    except (FormatError, NativeError) as error:
        raise ConfigError(str(error)) from error
    if json != "-":
        typer.echo(ops.format_table(results))
    write_json(results, json)


@bench_app.command("decode")
@engine_options
def bench_decode(
    models: Annotated[list[str], typer.Argument(help=MODEL_HELP + "; several take turns", metavar="MODEL...")],
    *,
    prompt_len: Annotated[int, typer.Option(help="tokens in each prompt")] = 512,
    gen_len: Annotated[int, typer.Option(help="tokens generated by each sequence")] = 128,
    batch_sizes: Annotated[str, typer.Option(help="sequences decoded together")] = "1,8,32",
    repeats: Annotated[int, typer.Option(help="runs of each, the median counts")] = 3,
    json: Json = None,
    config: EngineConfig,
) -> None:
    """Prefill and decode speed, and the share of the memory bandwidth that decoding reaches.

    Example: dibit bench decode models/demo-4bit --prompt-len 512 --gen-len 128 --batch-sizes 1,8,32 --json -
    """
    from dibit.bench import decode
    from dibit.server.output import write_json

    results = decode.run_decode(
        models,
        config,
        prompt_len=prompt_len,
        gen_len=gen_len,
        batch_sizes=parse_integers(batch_sizes),
        repeats=repeats,
    )
    if json != "-":
        typer.echo(decode.format_table(results))
    write_json(results, json)
