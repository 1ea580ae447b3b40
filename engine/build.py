"""From a model's name to an engine: the one place where checkpoint, tokenizer, decoder and runner meet the core."""

from __future__ import annotations

import importlib.metadata
import logging
from pathlib import Path
from typing import TYPE_CHECKING

from dibit.engine import numa
from dibit.engine.async_engine import AsyncEngine
from dibit.engine.config import EngineConfig
from dibit.engine.core import EngineCore
from dibit.engine.errors import ConfigError

if TYPE_CHECKING:
    from dibit.engine.checkpoint import Checkpoint
    from dibit.engine.packed_cache import PackedCache

logger = logging.getLogger(__name__)


def build_core(model: str | Path, config: EngineConfig) -> EngineCore:
    """Loads `model` (a directory, a .gguf file, a Hub id or "demo"). Raises CheckpointError or ConfigError."""
    from dibit.engine.checkpoint import open_checkpoint, resolve_model
    from dibit.engine.loader import load_decoder
    from dibit.engine.memory_plan import free_memory
    from dibit.engine.runner import ModelRunner
    from dibit.engine.tokenizer import load_tokenizer
    from dibit.kernels import native

    numa.apply(config.numa)
    checkpoint = open_checkpoint(resolve_model(str(model)), gptq_zero=config.gptq_zero)
    try:
        tokenizer = load_tokenizer(checkpoint)
        quantization = checkpoint.quantization
        activation_bits = None if quantization is None else quantization.activation_bits
        cache = _packed_cache(checkpoint, config)
        decoder = load_decoder(checkpoint, config=config, activation_bits=activation_bits, cache=cache)
    finally:
        checkpoint.close()
    on_cpu = decoder.device.type == "cpu"
    if on_cpu and config.backend == "auto" and (reason := native.unavailable()) is not None:
        logger.warning("running on the reference path, many times slower than the C++ kernels: %s", reason)
    free = free_memory(decoder.device)
    if on_cpu and cache is not None:
        # Mapped weights are page cache, which the system counts as free.
        free = max(0, free - cache.mapped_bytes)
    runner = ModelRunner(decoder, config, free_bytes=free)
    runner.warm_up()
    return EngineCore(runner, tokenizer, config)


def _packed_cache(checkpoint: Checkpoint, config: EngineConfig) -> PackedCache | None:
    """The packed weights of a checkpoint, where this start uses them."""
    from dibit.engine.checkpoint.identity import identity
    from dibit.engine.loader import resolve_device
    from dibit.engine.packed_cache import PackedCache, default_directory

    if config.numa != "off":
        # Pages of a file lie where they were first read, whatever the policy of this process is.
        return None
    if not config.cache or config.backend not in ("auto", "cpu") or resolve_device(config).type != "cpu":
        return None
    version = importlib.metadata.version("dibit")
    key = f"{identity(checkpoint.path)} head {config.head_bits} zero {config.gptq_zero} dibit {version}"
    try:
        directory = Path(config.cache_dir).expanduser() if config.cache_dir else default_directory()
    except ConfigError as error:
        logger.warning("packed weights are not kept for the next start: %s", error)
        return None
    return PackedCache(directory, key=key, model=checkpoint.name)


def build_engine(model: str | Path, config: EngineConfig, *, model_name: str | None = None) -> AsyncEngine:
    """`build_core` behind a thread that is not started yet. Callers are told `model_name` (by default the
    name of the directory or file, or the Hub id)."""
    default = Path(model).name if Path(model).exists() else str(model)
    return AsyncEngine(build_core(model, config), model_name=model_name or default)
