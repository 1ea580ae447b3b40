"""What passes between the server and its engine: the same plain values on every transport (transport.py).

Commands go to the engine: `Add`, `Abort`, `Stop`. Reports come back: `Ready` once, then `Outputs` of every step, and
`Failed` as the last one. A request has a number of its own, its `stream`: ids are the caller's, and may be used again
while outputs of an earlier request of that id are still on their way.

Everything here, and every value inside, can be written as MessagePack: https://github.com/msgpack/msgpack/blob/master/spec.md
"""

from __future__ import annotations

import msgspec
import numpy as np

from dibit.engine.config import EngineConfig, SamplingParams
from dibit.engine.errors import CheckpointError, ConfigError, EngineDead
from dibit.engine.outputs import EngineStats, RequestOutput


class Add(msgspec.Struct, frozen=True, tag=True):
    """An admitted request (admission.py): all that the engine needs to compute it.

    max_tokens  of the output, at most what fits after the prompt
    seed        the caller's, or one that was drawn for it
    stream      number of the request, given by who sends it
    """

    request_id: str
    prompt_ids: tuple[int, ...]
    params: SamplingParams
    max_tokens: int
    seed: int
    cache_salt: str = ""
    stream: int = 0


class Abort(msgspec.Struct, frozen=True, tag=True):
    """Ends a request, which reports a last output; nothing happens when it has ended already."""

    stream: int


class Stop(msgspec.Struct, frozen=True, tag=True):
    """Ends the engine after the step it is in."""


class Ready(msgspec.Struct, frozen=True, tag=True):
    """The model is loaded.

    max_model_len  longest sequence, prompt and output together, in tokens
    vocab_size     of the tokenizer
    """

    max_model_len: int
    vocab_size: int
    stats: EngineStats


class Outputs(msgspec.Struct, frozen=True, tag=True):
    """What a step (or an abort) brought, each with the number of its request, and the figures after it."""

    news: tuple[tuple[int, RequestOutput], ...]
    stats: EngineStats


class Failed(msgspec.Struct, frozen=True, tag=True):
    """Loading failed, or the engine has ended; `error` is the name of an exception's class."""

    error: str
    message: str

    @classmethod
    def of(cls, error: BaseException) -> Failed:
        """From an error of loading. One that nobody raises on purpose keeps its kind in its message."""
        # A path may hold bytes that are no text.
        message = str(error).encode("utf-8", "backslashreplace").decode()
        if type(error) in _RAISED_AGAIN:
            return cls(type(error).__name__, message)
        return cls(EngineDead.__name__, f"the engine could not be loaded: {type(error).__name__}: {message}")

    def exception(self) -> Exception:
        return next(kind for kind in _RAISED_AGAIN if kind.__name__ == self.error)(self.message)


_RAISED_AGAIN: tuple[type[Exception], ...] = (CheckpointError, ConfigError, EngineDead, MemoryError)


class Launch(msgspec.Struct, frozen=True):
    """What an engine process is told when it starts.

    address    of the ZeroMQ socket it connects to
    factory    "module:function" of what makes the core from model and config
    log_level  of the root logger
    """

    address: str
    factory: str
    model: str
    config: EngineConfig
    log_level: int


# Reports that wait at either end of a socket before the engine waits too.
MAX_REPORTS = 100

Command = Add | Abort | Stop
Report = Ready | Outputs | Failed


def encode(message: Command | Report) -> bytes:
    """As MessagePack. Raises TypeError for values that are no plain ones."""
    return msgspec.msgpack.encode(message, enc_hook=_plain)


def _plain(value: object) -> object:
    """numpy's numbers as Python's: callers have token ids in arrays."""
    if isinstance(value, np.generic):
        return value.item()
    raise TypeError(f"{value!r} is a {type(value).__name__}, which no message carries")
