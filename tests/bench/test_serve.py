"""The serving benchmark against a server with scripted delays, against ours; its figures on results made by hand."""

from __future__ import annotations

import asyncio
import itertools
import json
import math
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from dibit.bench import serve, serve_client, serve_target
from dibit.bench.serve_client import RequestResult, Target
from dibit.bench.serve_metrics import measure, parse_goodput, parse_metrics, parse_percentiles
from dibit.bench.serve_prompts import Dataset, Prompt, draw_prompts
from dibit.engine.errors import ConfigError
from dibit.server.cli import app
from fakes import ByteTokenizer, FakeRunner
from server_harness import MODEL, Live, serving

FIRST_S, GAP_S = 0.06, 0.03


def chunk(text: str, **choice: Any) -> bytes:
    return b"data: " + json.dumps({"choices": [{"index": 0, "text": text, **choice}]}).encode() + b"\n\n"


@dataclass
class Script:
    """What the scripted server does: parts of the body, each after a delay; and what it saw."""

    parts: Sequence[tuple[float, bytes]]
    status: str = "200 OK"
    bodies: list[dict[str, Any]] = field(default_factory=list)
    headers: list[str] = field(default_factory=list)
    running: int = 0
    most: int = 0
    url: str = ""

    async def answer(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        head = (await reader.readuntil(b"\r\n\r\n")).decode().lower()
        length = next(int(line.split(":")[1]) for line in head.splitlines() if line.startswith("content-length"))
        self.bodies.append(json.loads(await reader.readexactly(length)))
        self.headers.append(head)
        self.running += 1
        self.most = max(self.most, self.running)
        writer.write(f"HTTP/1.1 {self.status}\r\nconnection: close\r\n\r\n".encode())
        try:
            for delay_s, part in self.parts:
                await asyncio.sleep(delay_s)
                writer.write(part)
                await writer.drain()
        except asyncio.CancelledError:
            return
        finally:
            self.running -= 1
            writer.close()


@contextmanager
def scripted(script: Script) -> Iterator[Script]:
    ready = threading.Event()
    stop: list[Callable[[], object]] = []

    async def listen() -> None:
        ended = asyncio.Event()
        server = await asyncio.start_server(script.answer, "127.0.0.1", 0)
        script.url = f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}"
        loop = asyncio.get_running_loop()
        stop.append(lambda: loop.call_soon_threadsafe(ended.set))
        ready.set()
        await ended.wait()
        server.close()

    thread = threading.Thread(target=lambda: asyncio.run(listen()), name="scripted server")
    thread.start()
    assert ready.wait(10)
    try:
        yield script
    finally:
        stop[0]()
        thread.join(10)
        assert not thread.is_alive()


def answer_of(count: int, *, usage: bool = True) -> list[tuple[float, bytes]]:
    parts = [
        (FIRST_S, chunk("a")),
        *[(GAP_S, chunk("b")) for _ in range(count - 1)],
        (0, chunk("", finish_reason="length")),
    ]
    counted = {"choices": [], "usage": {"prompt_tokens": 7, "completion_tokens": count}}
    if usage:
        parts.append((0.0, b"data: " + json.dumps(counted).encode() + b"\n\n"))
    return [*parts, (0, b"data: [DONE]\n\n")]


def run(script: Script, load: serve.Load, **target: Any) -> serve.ServeRun:
    dataset = [Prompt(f"prompt {i}", 3, 5) for i in range(load.num_prompts)]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(serve, "draw_prompts", lambda *args, **settings: dataset)
        [only] = serve.run_serve(
            Target(f"{script.url}/v1/completions", "m", **target), Dataset(), load, serve.Measure(), tokenizer=None
        )
    return only


@pytest.mark.parametrize("usage", [True, False])
def test_scripted_delays_are_found_again(*, usage: bool) -> None:
    with scripted(Script(answer_of(5, usage=usage))) as script:
        found = run(script, serve.Load(4, max_concurrency=2))
    metrics = found.metrics
    assert (metrics.completed, metrics.failed, metrics.max_concurrent_requests, script.most) == (4, 0, 2, 2)
    assert metrics.total_output_tokens == 20
    assert metrics.total_input_tokens == (28 if usage else 12)
    for result in found.results:
        assert result.text == "abbbb"
        assert len(result.gaps_s) == 4
        # Never early; late by what a busy machine takes.
        assert FIRST_S <= result.ttft_s < FIRST_S + 1
        assert sum(result.gaps_s) == pytest.approx(result.latency_s - result.ttft_s, abs=0.3)
    assert metrics.spreads["tpot"].median >= 0.8 * GAP_S * 1e3
    assert metrics.duration_s >= 2 * (FIRST_S + 4 * GAP_S)
    # One warm-up before the four, with another text.
    assert [body["max_tokens"] for body in script.bodies] == [5] * 5
    assert script.bodies[0]["prompt"].startswith("Warm-up")
    assert {body["prompt"] for body in script.bodies[1:]} == {f"prompt {i}" for i in range(4)}


def test_a_rate_is_kept_whatever_the_server_does() -> None:
    with scripted(Script([(1.0, b""), *answer_of(1)])) as script:
        found = run(script, serve.Load(8, request_rate=40.0, num_warmups=0))
    starts_s = sorted(result.start_s for result in found.results)
    # Eight in 0.2 s though each takes more than a second.
    assert starts_s[-1] - starts_s[0] < 0.95
    assert script.most == 8


@pytest.mark.parametrize(
    ("script", "message"),
    [
        (Script([(0, b'{"error": {"message": "queue is full"}}')], status="503 No"), "HTTP 503: queue is full"),
        (Script([(0, chunk("a")), (0, b'data: {"error": {"message": "it broke"}}\n\n')]), "it broke"),
        (Script([(0, chunk("a"))]), "ended before"),
        (Script([(0, b"data: nonsense\n\n")]), "no OpenAI stream"),
        (Script([(0, chunk("a")), (9, b"")]), "within 0.2 s"),
    ],
)
def test_failures_are_told(script: Script, message: str) -> None:
    with scripted(script), pytest.raises(ConfigError, match=message):
        run(script, serve.Load(2, num_warmups=0), timeout_s=0.2)


def test_fields_and_headers_of_the_request() -> None:
    with scripted(Script(answer_of(1))) as script:
        run(
            script,
            serve.Load(1, num_warmups=0),
            backend="openai-chat",
            headers={"x-tenant": "seven"},
            body={"top_k": 4, "temperature": 0.5},
            ignore_eos=True,
        )
    assert script.bodies == [
        {
            "model": "m",
            "stream": True,
            "stream_options": {"include_usage": True},
            "messages": [{"role": "user", "content": "prompt 0"}],
            "max_completion_tokens": 5,
            "temperature": 0.5,
            "ignore_eos": True,
            "top_k": 4,
        }
    ]
    assert "x-tenant: seven" in script.headers[0]


def test_an_opening_role_and_a_closing_reason_are_no_tokens() -> None:
    reading = serve_client._Reading(0.0, Prompt("p", 1, 4))

    def delta(now_s: float, finish: str | None = None, **fields: Any) -> None:
        reading.add(json.dumps({"choices": [{"delta": fields, "finish_reason": finish}]}).encode(), now_s)

    delta(0.1, role="assistant", content="")
    delta(0.5, content="a")
    delta(0.7, content="")  # a token whose text is held back
    delta(1.0, content="bc")
    delta(1.5, finish="stop")
    result = reading.finished()
    assert (result.ttft_s, result.latency_s, result.output_tokens, result.text) == (0.5, 1.5, 3, "abc")
    assert result.gaps_s == pytest.approx([0.2, 0.3])


def test_figures_of_results_made_by_hand() -> None:
    def result(start_s: float, ttft_s: float, gaps_s: Sequence[float], tokens: int, error: str = "") -> RequestResult:
        return RequestResult(start_s, ttft_s, ttft_s + sum(gaps_s), tuple(gaps_s), 10, tokens, "", error)

    results = [
        result(100.0, 0.1, [0.1, 0.3], 3),  # tpot 200 ms, latency 500 ms
        result(100.2, 0.3, [], 1),  # no tpot
        result(100.5, 0.2, [0.5], 6),  # two chunks with six tokens: tpot 100 ms, latency 700 ms
        result(101.0, 0.2, [9.0], 2, "lost"),
    ]
    metrics = measure(results, duration_s=2.0, percentiles=(50, 99), goodput_ms={"ttft": 250, "tpot": 150})
    values = metrics.to_json()
    assert (values["completed"], values["failed"]) == (3, 1)
    assert (values["total_input_tokens"], values["total_output_tokens"]) == (30, 10)
    assert (values["request_throughput"], values["output_throughput"]) == (1.5, 5.0)
    assert values["total_token_throughput"] == 20.0
    assert values["request_goodput"] == 0.5  # the first is too slow per token, the second to its first token
    assert values["max_concurrent_requests"] == 2
    # 1 + 1 + 1 of the first, 1 of the second, 3 of the third fall into the first second.
    assert values["max_output_tokens_per_s"] == 7.0
    assert values["mean_ttft_ms"] == pytest.approx(200)
    assert values["median_tpot_ms"] == pytest.approx(150)
    assert values["std_tpot_ms"] == pytest.approx(50)
    assert values["mean_itl_ms"] == pytest.approx(300)
    assert values["p50_e2el_ms"] == pytest.approx(500)
    assert values["p99_e2el_ms"] == pytest.approx(500 + 0.98 * 200)
    text = metrics.text(request_rate=math.inf, max_concurrency=8)
    assert "Successful requests:                     3" in text
    assert "P99 E2EL (ms):                           696.00" in text
    assert {len(line) for line in text.splitlines() if line[0] in "=-"} == {50}
    assert measure(results, duration_s=1, metrics=["itl"]).to_json().keys().isdisjoint({"mean_ttft_ms"})


def test_arrivals_are_poisson_at_the_rate_asked_for() -> None:
    times_s = serve.arrival_times(4000, 8.0, 1.0, seed=3)
    gaps_s = [b - a for a, b in itertools.pairwise(times_s)]
    mean_s = sum(gaps_s) / len(gaps_s)
    spread = math.sqrt(sum((gap - mean_s) ** 2 for gap in gaps_s) / len(gaps_s)) / mean_s
    assert times_s[-1] == pytest.approx(500.0)
    assert spread == pytest.approx(1.0, abs=0.08)
    assert times_s == serve.arrival_times(4000, 8.0, 1.0, seed=3) != serve.arrival_times(4000, 8.0, 1.0, seed=4)
    even = serve.arrival_times(1000, 8.0, 400.0, seed=3)
    assert max(b - a for a, b in itertools.pairwise(even)) < 0.16
    assert serve.arrival_times(3, math.inf, 1.0, seed=0) == [0.0] * 3


def test_random_prompts_have_the_lengths_asked_for() -> None:
    tokenizer = ByteTokenizer()
    dataset = Dataset(input_len=40, output_len=10, range_ratio=0.5, prefix_len=8)
    prompts = draw_prompts(dataset, 50, tokenizer, seed=1)
    assert {prompt.text[:8] for prompt in prompts} == {prompts[0].text[:8]}
    assert len({prompt.text for prompt in prompts}) == 50
    for prompt in prompts:
        assert prompt.input_tokens == len(tokenizer.encode(prompt.text))
        assert 28 <= prompt.input_tokens <= 68
        assert 5 <= prompt.output_tokens <= 15
    assert prompts == draw_prompts(dataset, 50, tokenizer, seed=1)
    assert not {p.text for p in prompts} & {p.text for p in draw_prompts(dataset, 50, tokenizer, seed=2)}
    assert {p.input_tokens for p in draw_prompts(Dataset(input_len=40), 20, tokenizer, seed=1)} == {40}
    with pytest.raises(ConfigError, match="--tokenizer"):
        draw_prompts(dataset, 1, None, seed=1)


def test_prompts_of_files(tmp_path: Path) -> None:
    talk = [{"from": "human", "value": "how are you"}, {"from": "gpt", "value": "well, thanks"}]
    (tmp_path / "s.json").write_text(
        json.dumps([{"conversations": talk}, {"conversations": talk[:1]}, {"conversations": [talk[0], {}]}, {}])
    )
    sharegpt = Dataset("sharegpt", tmp_path / "s.json", output_len=None)
    assert draw_prompts(sharegpt, 1, ByteTokenizer(), seed=0) == [Prompt("how are you", 12, 13)]
    with pytest.raises(ConfigError, match="1 prompts that can be used, 2 were asked for"):
        draw_prompts(sharegpt, 2, ByteTokenizer(), seed=0)
    assert len(draw_prompts(replace(sharegpt, oversample=True), 3, ByteTokenizer(), seed=0)) == 3

    (tmp_path / "c.jsonl").write_text('{"prompt": "one", "output_tokens": 4}\n\n{"prompt": "two"}\n')
    custom = Dataset("custom", tmp_path / "c.jsonl", output_len=9)
    assert {(p.text, p.input_tokens, p.output_tokens) for p in draw_prompts(custom, 2, None, seed=0)} == {
        ("one", 0, 9),
        ("two", 0, 9),
    }
    with pytest.raises(ConfigError, match="line 3: output_tokens is None"):
        draw_prompts(replace(custom, output_len=None), 2, None, seed=0)
    with pytest.raises(ConfigError, match="needs a file"):
        Dataset("custom")


def test_names_that_the_server_knows(tmp_path: Path) -> None:
    def choose(served: list[str], model: str | None = None, name: str | None = None) -> str:
        return serve_target.choose_name(served, model=model, served_model_name=name)

    assert choose(["a"]) == "a"
    assert choose(["a", "b"], "b") == "b"
    assert choose([], "b") == "b"
    assert choose(["a"], str(tmp_path)) == "a"
    assert choose(["a"], "c", "d") == "d"
    with pytest.raises(ConfigError, match="no model 'c'; it has: a"):
        choose(["a"], "c")
    with pytest.raises(ConfigError, match="--served-model-name"):
        choose(["a", "b"])
    assert serve_target.api_root("http://h:1/v1/") == "http://h:1"


def test_settings_that_mean_nothing_are_refused() -> None:
    assert parse_goodput("ttft:500 tpot:80,e2el:9") == {"ttft": 500, "tpot": 80, "e2el": 9}
    for parse, text in (
        (parse_goodput, "itl:5"),
        (parse_goodput, "ttft"),
        (parse_metrics, "ttft,x"),
        (parse_percentiles, "101"),
    ):
        with pytest.raises(ConfigError):
            parse(text)
    for settings in ({"request_rate": 0.0}, {"request_rate": math.nan}, {"max_concurrency": 0}, {"num_prompts": 0}):
        with pytest.raises(ConfigError):
            serve.Load(**settings)  # type: ignore[arg-type]


@pytest.fixture(scope="module")
def live() -> Iterator[Live]:
    with serving(FakeRunner(num_blocks=2048, max_model_len=256, step_delay_s=0.002)) as live:
        yield live


@pytest.mark.parametrize("backend", ["openai", "openai-chat"])
def test_our_server_from_the_command_line(
    live: Live, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, backend: str
) -> None:
    prompts = tmp_path / "prompts.jsonl"
    prompts.write_text("".join(json.dumps({"prompt": f"say {i}", "output_tokens": 6}) + "\n" for i in range(8)))
    words = ["bench", "serve", "--base-url", live.url, "--backend", backend, "--dataset-name", "custom"]
    words += ["--dataset-path", str(prompts), "--num-prompts", "8", "--max-concurrency", "1,4", "--ignore-eos"]
    words += ["--goodput", "ttft:60000 tpot:0", "--save-detailed", "--result-dir", str(tmp_path / "out")]
    words += ["--label", "ours", "--metadata", "kernel=fake"]
    words += ["--api-key", "secret-1", "--header=x-key=secret-2", "--header", "x-more=secret-3"]
    monkeypatch.setattr("sys.argv", ["dibit", *words])
    done = CliRunner().invoke(app, words)
    assert done.exit_code == 0, done.output
    assert done.output.count(" Serving Benchmark Result ") == 2
    files = sorted((tmp_path / "out").iterdir())
    assert [file.name.startswith(f"ours-infqps-concurrency{n}-fake-") for file, n in zip(files, (1, 4), strict=True)]
    for file, limit in zip(files, (1, 4), strict=True):
        assert "secret" not in file.read_text()
        values = json.loads(file.read_text())
        assert "--num-prompts 8" in values["client"]["command"]
        assert (values["completed"], values["failed"], values["max_concurrency"]) == (8, 0, limit)
        assert (values["model_id"], values["kernel"], values["request_rate"]) == (MODEL, "fake", "inf")
        assert values["max_concurrent_requests"] == limit
        assert values["output_lens"] == [6] * 8
        assert [len(gaps) for gaps in values["itls"]] == [5] * 8
        assert all(values["generated_texts"])
        assert values["request_goodput"] == 0.0
        assert values["mean_tpot_ms"] >= 2.0
    assert live.busy() == 0


def test_a_server_that_is_not_there() -> None:
    done = CliRunner().invoke(app, ["bench", "serve", "--port", "9"])
    assert isinstance(done.exception, ConfigError)
    assert "is the server up" in str(done.exception)


@pytest.mark.demo
def test_random_prompts_reach_a_real_model_with_the_lengths_counted(low_bit_demo: Path) -> None:
    from dibit.engine.build import build_engine
    from dibit.engine.config import EngineConfig
    from dibit.server.app import create_app
    from dibit.server.lifecycle import Server, bind_socket
    from server_harness import wait_until

    engine = build_engine(low_bit_demo, EngineConfig(max_model_len=128, max_num_seqs=4))
    sock = bind_socket("127.0.0.1", 0)
    server = Server(create_app(engine), engine, drain_timeout_s=5)
    thread = threading.Thread(target=server.run, kwargs={"sockets": [sock]})
    thread.start()
    try:
        wait_until(lambda: server.started, timeout_s=30)
        words = ["bench", "serve", "--port", str(sock.getsockname()[1]), "--model", str(low_bit_demo)]
        words += ["--random-input-len", "24", "--random-output-len", "5", "--num-prompts", "6", "--request-rate", "50"]
        done = CliRunner().invoke(app, [*words, "--ignore-eos"])
    finally:
        server.should_exit = True
        thread.join(20)
        engine.stop(20)
    assert done.exit_code == 0, (done.output, done.exception)
    assert "Total input tokens:                      144\n" in done.output
    assert "Total generated tokens:                  30\n" in done.output
