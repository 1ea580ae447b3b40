"""Engines over a fake model, behind either transport: what a process imports to build one, and what starts it.

A request's id says what happens in the steps in which it takes part (`_obey`), since nothing else reaches the runner.
"""

from __future__ import annotations

import json
import logging
import os
import signal
import time
from pathlib import Path
from typing import Any

import pytest

from dibit.engine.config import EngineConfig
from dibit.engine.core import EngineCore
from dibit.engine.errors import CheckpointError
from dibit.engine.process_transport import ProcessTransport
from dibit.engine.step import Step
from dibit.engine.transport import ThreadTransport
from fakes import ByteTokenizer, FakeRunner

TESTS = Path(__file__).parent
FACTORY = "engine_factory:build"


def build(model: str, config: EngineConfig) -> EngineCore:
    """`model`: arguments of FakeRunner as JSON, or the name of what goes wrong while it is loaded."""
    logging.getLogger(__name__).info("loading %s", model)
    match model:
        case "broken":
            raise CheckpointError("the file is broken;\nmend it")
        case "surprising":
            raise KeyError("lm_head")
        case "too large":
            raise MemoryError("no room")
        case "fatal":
            os._exit(3)
        case "slow":
            time.sleep(60)
    return EngineCore(FakeRunner(on_execute=_obey, **json.loads(model)), ByteTokenizer(), config)


def _obey(step: Step) -> None:
    for chunk in step.chunks:
        match chunk.request.id:
            case "bad":
                raise RuntimeError("cannot compute")
            case "fatal":
                raise MemoryError("no more")
            case "killed":
                os.kill(os.getpid(), signal.SIGKILL)
            case "hanging":
                time.sleep(60)


def threaded(settings: dict[str, Any] | None = None, **runner: Any) -> ThreadTransport:
    """Keywords are arguments of FakeRunner, settings fields of EngineConfig."""
    return ThreadTransport(build(json.dumps(runner), EngineConfig(**(settings or {}))))


def launched(model: str | None = None, settings: dict[str, Any] | None = None, **runner: Any) -> ProcessTransport:
    """The same in a process; `model` as in `build` instead."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", str(TESTS))
        return ProcessTransport.launch(
            json.dumps(runner) if model is None else model,
            EngineConfig(**(settings or {})),
            load_tokenizer=ByteTokenizer,
            factory=FACTORY,
        )
