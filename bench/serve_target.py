"""The server that a benchmark is pointed at: its address, what it calls its model, and the model's tokenizer."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import httpx

from dibit.engine.errors import CheckpointError, ConfigError
from dibit.engine.tokenizer import HFTokenizer, load_tokenizer, load_tokenizer_directory

_TIMEOUT_S = 30.0


def api_root(base_url: str) -> str:
    """The server's address without the version, which endpoints name."""
    return base_url.rstrip("/").removesuffix("/v1")


def served_models(root: str, headers: Mapping[str, str]) -> list[str]:
    """Names that the server gives its models; none when it does not tell. Raises ConfigError when nobody answers."""
    try:
        response = httpx.get(f"{root}/v1/models", headers=dict(headers), timeout=_TIMEOUT_S)
    except (httpx.HTTPError, httpx.InvalidURL) as error:
        raise ConfigError(f"no answer from {root} ({error}); is the server up, and the address right?") from error
    if response.status_code in (401, 403):
        raise ConfigError(f"{root} answers HTTP {response.status_code}; give its key with --api-key")
    try:
        return [str(model["id"]) for model in response.json()["data"]] if response.status_code == 200 else []
    except (ValueError, KeyError, TypeError):
        return []


def choose_name(served: Sequence[str], *, model: str | None, served_model_name: str | None) -> str:
    """What requests call the model: the name that was given for it, `model` if the server has it, or, where that is
    only where its files lie (or is not given), the one model there is. Raises ConfigError."""
    if served_model_name is not None:
        return served_model_name
    if model is not None and (model in served or not served):
        return model
    if len(served) == 1 and (model is None or Path(model).exists()):
        return served[0]
    asked = "no --model was given" if model is None else f"the server has no model {model!r}"
    has = f"it has: {', '.join(served)}" if served else "it does not list its models"
    raise ConfigError(f"{asked}; {has}. Choose one with --served-model-name")


def find_tokenizer(name: str) -> HFTokenizer | None:
    """The tokenizer of a directory, a .gguf file, a Hub id or "demo"; None when there is no such thing here.

    Raises CheckpointError when there is one and it cannot be read.
    """
    from dibit.engine.checkpoint import open_checkpoint, resolve_model

    if Path(name).is_dir():
        return load_tokenizer_directory(Path(name))
    try:
        path = resolve_model(name)
    except CheckpointError:
        return None
    if path.is_dir():
        return load_tokenizer_directory(path, name=name)
    checkpoint = open_checkpoint(path)
    try:
        return load_tokenizer(checkpoint)
    finally:
        checkpoint.close()
