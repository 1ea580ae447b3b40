"""`dibit kernels`: what the GPU kernels compile to, on any machine."""

from __future__ import annotations

from itertools import product
from pathlib import Path
from typing import Annotated

import typer

from dibit.engine.errors import ConfigError, DibitError
from dibit.server.options import Json, Model

kernels_app = typer.Typer(help="Examine the GPU kernels, and fit them to a GPU.", no_args_is_help=True)


@kernels_app.command("report")
def kernels_report(
    *,
    gpu: Annotated[
        list[str] | None, typer.Option(help="only this GPU, such as A100 (repeat for several); left out: all known")
    ] = None,
    check: Annotated[bool, typer.Option("--check", help="fail when a kernel breaks a rule of docs/gpu.md")] = False,
    json: Json = None,
) -> None:
    """Compile every GPU kernel ahead of time: registers, spills, shared memory, widths of loads, instructions per
    weight, bytes moved, and the time that a stated model predicts. Takes a few minutes the first time.

    Example: dibit kernels report --gpu A100 --gpu H100 --json kernels.json
    """
    from dibit.kernels.triton.availability import compiler_unavailable
    from dibit.server.output import write_json

    if (reason := compiler_unavailable()) is not None:
        raise ConfigError(f"the GPU kernels cannot be compiled here: {reason}")
    from dibit.kernels.formats import Format
    from dibit.kernels.triton.aot import NoCompiler
    from dibit.kernels.triton.report import kernel_reports, predict_decode
    from dibit.kernels.triton.report_model import GPUS, HEADER, faults, line

    wanted = {name.lower() for name in gpu or []}
    if unknown := wanted - {known.name.lower() for known in GPUS}:
        supported = ", ".join(known.name for known in GPUS)
        raise ConfigError(f"no figures for a GPU called {', '.join(sorted(unknown))}; supported: {supported}")
    chosen = [known for known in GPUS if not wanted or known.name.lower() in wanted]
    if json != "-":
        typer.echo(HEADER)
    rows = []
    try:
        for row in kernel_reports(chosen):
            rows.append(row)
            if json != "-":
                typer.echo(line(row))
        if json != "-":
            for known, bits in product(chosen, (2, 3, 4)):
                step = predict_decode(known, Format(bits, 128))
                typer.echo(
                    f"{step.gpu}: a decode step of Llama-2-7B in {step.format}, {step.launches} launches: "
                    f"{step.step_us:.0f} us, {step.tok_s:.0f} tokens/s, {step.bandwidth_share:.0%} of the bandwidth"
                )
    except NoCompiler as error:
        raise ConfigError(str(error)) from error
    write_json(rows, json)
    broken = [fault for row in rows for fault in faults(row)]
    if check and broken:
        raise DibitError("kernels break the rules of docs/gpu.md:\n" + "\n".join(broken))


@kernels_app.command("tune")
def kernels_tune(
    model: Model,
    *,
    seconds: Annotated[float, typer.Option(min=1.0, help="begin no further shape after this long")] = 600.0,
    out: Annotated[
        Path | None,
        typer.Option(help="folder to keep it in, such as kernels/triton/tuned to ship it; left out: this user's"),
    ] = None,
    json: Json = None,
) -> None:
    """Measure the products of a model on this GPU, and keep what is fastest for every later start. One kind of GPU and
    one shape of weight need it once; without it products are cut by rules.

    Example: dibit kernels tune models/my-7b-3bit
    """
    from dibit.engine.tuning import tune_model
    from dibit.server.output import emit

    emit(tune_model(model, limit_s=seconds, say=typer.echo, folder=out), json)
