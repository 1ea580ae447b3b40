"""`dibit bench serve` and `dibit bench plot`: a running server under load, and pictures of what was measured."""

from __future__ import annotations

import shlex
import sys
from pathlib import Path
from typing import Annotated, Any, Literal

import orjson
import typer

from dibit.engine.errors import ConfigError
from dibit.server.options import MODEL_HELP

_SECRET = ("--api-key", "--header")


def bench_serve(
    *,
    backend: Annotated[
        Literal["openai", "openai-chat"], typer.Option(help="text completions, or chat completions")
    ] = "openai",
    base_url: Annotated[str | None, typer.Option(help="the server's address; left out: made of host and port")] = None,
    host: Annotated[str, typer.Option(help="the server's host")] = "127.0.0.1",
    port: Annotated[int, typer.Option(help="the server's port")] = 8000,
    endpoint: Annotated[str | None, typer.Option(help="path of the endpoint; left out: the backend's")] = None,
    api_key: Annotated[str | None, typer.Option(help="bearer token", envvar="OPENAI_API_KEY")] = None,
    header: Annotated[list[str] | None, typer.Option(help="another header, NAME=VALUE; repeatable")] = None,
    extra_body: Annotated[str | None, typer.Option(help="JSON object of fields to send with every request")] = None,
    model: Annotated[
        str | None, typer.Option(help=f"the model: {MODEL_HELP}, or its name in the API; left out: what the server has")
    ] = None,
    served_model_name: Annotated[str | None, typer.Option(help="the model's name in the API")] = None,
    tokenizer: Annotated[str | None, typer.Option(help="where its tokenizer is; left out: the model's place")] = None,
    dataset_name: Annotated[
        Literal["random", "sharegpt", "custom"], typer.Option(help="random text, or prompts of a file")
    ] = "random",
    dataset_path: Annotated[
        Path | None, typer.Option(help='ShareGPT JSON, or lines {"prompt": ..., "output_tokens": ...}')
    ] = None,
    random_input_len: Annotated[int, typer.Option(help="tokens of a random prompt")] = 1024,
    random_output_len: Annotated[int, typer.Option(help="tokens asked for, with random prompts")] = 128,
    random_range_ratio: Annotated[
        float, typer.Option(help="random lengths are between (1 - r) and (1 + r) times those")
    ] = 0.0,
    random_prefix_len: Annotated[int, typer.Option(help="tokens before them that all prompts share")] = 0,
    sharegpt_output_len: Annotated[int | None, typer.Option(help="left out: as long as the file's answers")] = None,
    custom_output_len: Annotated[int | None, typer.Option(help="left out: as the file says")] = None,
    oversample: Annotated[bool, typer.Option("--oversample", help="repeat the file's prompts if too few")] = False,
    num_prompts: Annotated[int, typer.Option(help="requests in a run")] = 1000,
    num_warmups: Annotated[int, typer.Option(help="requests before a run, not counted")] = 1,
    request_rate: Annotated[
        str, typer.Option(help="requests per second, inf for all at once; several (1,2,4) make a run each")
    ] = "inf",
    burstiness: Annotated[float, typer.Option(help="1: Poisson arrivals; less: in bursts; more: even")] = 1.0,
    max_concurrency: Annotated[
        str | None, typer.Option(help="most requests at once; several (1,8,32) make a run each")
    ] = None,
    seed: Annotated[int, typer.Option(help="of prompts and arrivals; every run of a series adds 1")] = 0,
    ignore_eos: Annotated[bool, typer.Option("--ignore-eos", help="answers as long as asked for")] = False,
    temperature: Annotated[float, typer.Option(help="0 is greedy")] = 0.0,
    request_timeout_s: Annotated[float, typer.Option(help="a request that takes longer has failed")] = 3600.0,
    percentile_metrics: Annotated[
        str, typer.Option(help="what to report, of ttft,tpot,itl,e2el")
    ] = "ttft,tpot,itl,e2el",
    metric_percentiles: Annotated[str, typer.Option(help="percentiles of each")] = "50,99",
    goodput: Annotated[
        str | None, typer.Option(help='bounds in ms, such as "ttft:500 tpot:80 e2el:3000", that a good request meets')
    ] = None,
    save_result: Annotated[bool, typer.Option("--save-result", help="write a JSON file per run")] = False,
    save_detailed: Annotated[
        bool, typer.Option("--save-detailed", help="with times, texts and errors of every request in it")
    ] = False,
    result_dir: Annotated[Path, typer.Option(help="directory for it")] = Path(),
    result_filename: Annotated[str | None, typer.Option(help="left out: label, rate, concurrency, model, date")] = None,
    label: Annotated[str | None, typer.Option(help="name of the result, in the file and in plots")] = None,
    metadata: Annotated[list[str] | None, typer.Option(help="NAME=VALUE to put into the file; repeatable")] = None,
) -> None:
    """Load on a running server (any OpenAI endpoint): throughput, TTFT, TPOT, ITL and latency as its clients see them.

    Example: dibit bench serve --model models/demo-4bit --random-input-len 256 --num-prompts 64 --max-concurrency 1,8,32
    """
    from dibit.bench import serve, serve_client, serve_metrics, serve_prompts, serve_target
    from dibit.server.progress import request_progress

    rates = _numbers(request_rate, "--request-rate")
    limits = [int(n) for n in _numbers(max_concurrency, "--max-concurrency", whole=True)] if max_concurrency else [None]
    runs = len(rates) * len(limits)
    if result_filename is not None and runs > 1:
        raise ConfigError(f"one --result-filename for {runs} runs; leave it out, every run then has a name of its own")
    measured = serve.Measure(
        serve_metrics.parse_metrics(percentile_metrics),
        serve_metrics.parse_percentiles(metric_percentiles),
        serve_metrics.parse_goodput(goodput or ""),
    )
    output_len = {"random": random_output_len, "sharegpt": sharegpt_output_len, "custom": custom_output_len}
    dataset = serve_prompts.Dataset(
        dataset_name,
        dataset_path,
        input_len=random_input_len,
        output_len=output_len[dataset_name],
        range_ratio=random_range_ratio,
        prefix_len=random_prefix_len,
        oversample=oversample,
    )
    load = serve.Load(num_prompts, burstiness=burstiness, num_warmups=num_warmups, seed=seed)
    headers = _pairs(header or [], "--header")
    if api_key is not None:
        headers = {"Authorization": f"Bearer {api_key}", **headers}
    notes = _pairs(metadata or [], "--metadata")
    root = serve_target.api_root(base_url or f"http://{host}:{port}")
    names = serve_target.served_models(root, headers)
    target = serve_client.Target(
        url=root + "/" + (endpoint or serve_client.ENDPOINTS[backend]).lstrip("/"),
        model=serve_target.choose_name(names, model=model, served_model_name=served_model_name),
        backend=backend,
        headers=headers,
        body=_json_object(extra_body),
        ignore_eos=ignore_eos,
        temperature=temperature,
        timeout_s=request_timeout_s,
    )
    tokenizer_id = tokenizer or model or target.model
    found = serve_target.find_tokenizer(tokenizer_id)
    if found is None and tokenizer is not None:
        raise ConfigError(f"--tokenizer {tokenizer}: there is no such directory, .gguf file or Hub id")
    with request_progress() as progress:
        series = serve.run_serve(
            target,
            dataset,
            load,
            measured,
            tokenizer=found,
            tokenizer_id=tokenizer_id if found is not None else "",
            rates=rates,
            concurrencies=limits,
            progress=progress,
        )
        for run in series:
            typer.echo(run.text())
            if save_result or save_detailed:
                path = result_dir / (result_filename or run.file_name(label=label))
                command = _command(sys.argv[1:])
                serve.write_result(run, path, label=label, metadata=notes, command=command, detailed=save_detailed)


def bench_plot(
    results: Annotated[
        list[Path],
        typer.Argument(help="JSON files of bench serve, decode, ops, or directories of them", metavar="FILE..."),
    ],
    *,
    out: Annotated[Path, typer.Option(help="directory for the page and the pictures")] = Path("plots"),
) -> None:
    """Charts of measured results: a page that needs no network (bench.html), PNG files too where matplotlib is there.

    Example: dibit bench plot results/ --out plots
    """
    from dibit.bench import charts, plot

    found = charts.read_results(results)
    for path in found.unknown:
        typer.echo(f"left out, no results of a speed: {path}", err=True)
    for path in plot.plot(found, out):
        typer.echo(path)
    if not plot.has_png():
        typer.echo("no PNG files: matplotlib is not installed (pip install 'dibit[bench]')", err=True)


def _numbers(text: str, option: str, *, whole: bool = False) -> list[float]:
    try:
        return [int(part) if whole else float(part) for part in text.split(",")]
    except ValueError as error:
        raise ConfigError(f"{option} {text!r} is not a number, or several such as 1,2,4") from error


def _command(words: list[str]) -> str:
    """The command as it is put into a file: without keys."""
    shown = ["dibit"]
    for word in words:
        name, equals, _ = word.partition("=")
        if shown[-1] in _SECRET:
            shown.append("...")
        elif equals and name in _SECRET:
            shown.append(f"{name}=...")
        else:
            shown.append(word)
    return shlex.join(shown)


def _pairs(texts: list[str], option: str) -> dict[str, str]:
    pairs = {}
    for text in texts:
        name, equals, value = text.partition("=")
        if not (equals and name):
            raise ConfigError(f"{option} {text!r} is not NAME=VALUE")
        pairs[name] = value
    return pairs


def _json_object(text: str | None) -> dict[str, Any]:
    if text is None:
        return {}
    try:
        value = orjson.loads(text)
    except ValueError as error:
        raise ConfigError(f"--extra-body is not JSON: {error}") from error
    if not isinstance(value, dict):
        raise ConfigError(f'--extra-body must be a JSON object such as {{"top_k": 20}}, not {text}')
    return value
