"""A checkpoint becomes tokens: models, paged KV cache, scheduler, sampler. Knows nothing of HTTP.

Names are imported on first use, so that importing a part of the engine does not import torch.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from dibit.engine import errors
    from dibit.engine.async_engine import AsyncEngine
    from dibit.engine.config import EngineConfig, SamplingParams
    from dibit.engine.llm import LLM
    from dibit.engine.outputs import Completion

__all__ = ["LLM", "AsyncEngine", "Completion", "EngineConfig", "SamplingParams", "errors"]

_MODULE_OF = {
    "LLM": "llm",
    "AsyncEngine": "async_engine",
    "Completion": "outputs",
    "EngineConfig": "config",
    "SamplingParams": "config",
}


def __getattr__(name: str) -> object:
    if name == "errors":
        return import_module("dibit.engine.errors")
    if name in _MODULE_OF:
        return getattr(import_module(f"dibit.engine.{_MODULE_OF[name]}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
