"""`dibit serve` with the engine in a process, on a model that is small and real; and how the transport is chosen."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import openai
import psutil
import pytest
from engine_factory import launched, threaded
from tiny_models import hf_model
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

from dibit.engine import build
from dibit.engine.config import EngineConfig
from dibit.engine.errors import CheckpointError
from dibit.engine.process_transport import ProcessTransport
from dibit.server.cli import app
from server_harness import COMPLETIONS, MODEL, serving, wait_until

DIBIT = [sys.executable, "-c", "from dibit.server.cli import main; main()"]
TEMPLATE = "{% for m in messages %}{{ m['role'] }}: {{ m['content'] }}\n{% endfor %}"


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Llama of two layers whose tokens are bytes."""
    directory = tmp_path_factory.mktemp("tiny")
    tokenizer = Tokenizer(
        models.BPE({char: i for i, char in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}, [])
    )
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    hf_model(vocab_size=256, eos_token_id=None, bos_token_id=None).save_pretrained(directory)
    tokenizer.save(str(directory / "tokenizer.json"))
    own = {"tokenizer_class": "PreTrainedTokenizerFast", "chat_template": TEMPLATE}
    (directory / "tokenizer_config.json").write_text(json.dumps(own))
    return directory


@dataclass(frozen=True)
class Served:
    process: subprocess.Popen[str]
    child: psutil.Process
    url: str

    def client(self) -> openai.OpenAI:
        return openai.OpenAI(base_url=f"{self.url}/v1", api_key="none", max_retries=0, timeout=20)


@pytest.fixture
def served(checkpoint: Path, tmp_path: Path) -> Iterator[Served]:
    command = [*DIBIT, "serve", str(checkpoint), "--port", "0", "--transport", "process", "--kv-bytes", "4MB"]
    env = os.environ | {"TMPDIR": str(tmp_path), "OMP_NUM_THREADS": "1"}
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True, env=env) as process:
        try:
            assert process.stderr is not None
            url = next(line.split()[-1] for line in process.stderr if " on http://" in line)
            [child] = psutil.Process(process.pid).children()
            yield Served(process, child, url)
        finally:
            process.kill()
    psutil.wait_procs([child], timeout=5)
    assert not child.is_running()
    assert list(tmp_path.iterdir()) == []


def test_an_engine_in_a_process_answers_and_drains(served: Served) -> None:
    client = served.client()
    model = client.models.list().data[0].id
    answers = [
        client.chat.completions.create(
            model=model,
            messages=[{"role": "user", "content": "hi"}],
            seed=2**63 - 1,
            n=2,
            max_tokens=5,
            logprobs=True,
            top_logprobs=3,
            stop=["zzzz"],
        )
        for _ in range(2)
    ]
    choices = [[choice.message.content for choice in answer.choices] for answer in answers]
    assert choices[0] == choices[1]
    assert answers[0].usage is not None
    assert answers[0].usage.completion_tokens == 10
    found = answers[0].choices[0].logprobs
    assert found is not None
    assert found.content is not None
    assert len(found.content[0].top_logprobs) == 3
    with pytest.raises(openai.BadRequestError, match="seed"):
        client.completions.create(model=model, prompt="x", seed=2**64)
    with httpx.stream("POST", f"{served.url}/v1/completions", json=endless(model)) as left:
        next(left.iter_raw())
    wait_until(lambda: httpx.get(f"{served.url}/health").json()["running"] == 0)
    metrics = httpx.get(f"{served.url}/metrics").text
    assert 'request_success_total{model_name="' in metrics
    assert 'finished_reason="abort"} 1' in metrics
    stream = client.completions.create(model=model, prompt="x", max_tokens=100, stream=True)
    chunks = [next(stream)]
    # A supervisor may tell every process of a service.
    os.killpg(os.getpgid(served.child.pid), signal.SIGINT)
    served.process.send_signal(signal.SIGINT)
    chunks += stream
    assert chunks[-1].choices[0].finish_reason == "length"
    assert served.process.stderr is not None
    log = served.process.stderr.read()
    assert served.process.wait(timeout=20) == 0
    assert "Traceback" not in log


def test_an_engine_whose_process_is_killed_is_reported() -> None:
    transport = launched(step_delay_s=0.01)
    with serving(transport=transport) as live:
        with live.http.stream("POST", COMPLETIONS, json=endless(MODEL)) as response:
            lines = response.iter_lines()
            next(lines)
            os.kill(transport.pid, signal.SIGKILL)
            assert any("SIGKILL" in line for line in lines)
        health = live.http.get("/health")
        assert (health.status_code, health.json()["status"]) == (503, "dead")
        assert "SIGKILL" in health.json()["reason"]
        assert live.complete().status_code == 503


def endless(model: str) -> dict[str, object]:
    return {"model": model, "prompt": "x", "max_tokens": 120, "stream": True}


def test_a_model_that_cannot_be_loaded_ends_the_command(checkpoint: Path, tmp_path: Path) -> None:
    broken = tmp_path / "broken"
    broken.mkdir()
    for file in checkpoint.iterdir():
        if file.suffix == ".json":
            (broken / file.name).write_bytes(file.read_bytes())
    (broken / "model.safetensors").write_bytes(b"\0" * 100)
    command = [*DIBIT, "serve", str(broken), "--port", "0", "--transport", "process"]
    ended = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    assert ended.returncode == 2, ended.stderr
    assert len(ended.stderr.splitlines()) == 1
    assert "safetensors" in ended.stderr


def test_the_socket_is_closed_when_loading_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[socket.socket] = []

    def bind(host: str, port: int) -> socket.socket:
        made.append(socket.create_server((host, port)))
        return made[0]

    monkeypatch.setattr("dibit.server.lifecycle.bind_socket", bind)
    monkeypatch.setattr("sys.argv", ["dibit", "serve", "no-such-model", "--port", "0"])
    with pytest.raises(CheckpointError, match="no-such-model"):
        app(standalone_mode=False)
    assert made[0].fileno() == -1


@pytest.mark.parametrize(
    ("settings", "gpus", "expected"),
    [
        ({"device": "cpu"}, 1, "thread"),
        ({"device": "cuda"}, 0, "process"),
        ({"backend": "cpu"}, 1, "thread"),
        ({"backend": "triton"}, 1, "process"),
        ({}, 1, "process"),
        ({}, 0, "thread"),
    ],
    ids=str,
)
def test_a_process_is_for_a_gpu(
    monkeypatch: pytest.MonkeyPatch, settings: dict[str, Any], gpus: int, expected: str
) -> None:
    made: list[str] = []
    monkeypatch.setattr("torch.cuda.device_count", lambda: gpus)
    monkeypatch.setattr(build, "build_core", lambda model, config: made.append("thread"))
    monkeypatch.setattr(build, "ThreadTransport", lambda core: threaded())
    monkeypatch.setattr("dibit.engine.checkpoint.resolve_model", Path)
    monkeypatch.setattr(ProcessTransport, "launch", lambda *_, **__: made.append("process") or threaded())
    build.build_engine("some-model", EngineConfig(**settings))
    assert made == [expected]
