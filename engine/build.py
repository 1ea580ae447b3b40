"""From a model's name to an engine: the one place where checkpoint, tokenizer, decoder and runner meet the core."""

from __future__ import annotations

import logging
from pathlib import Path

from dibit.engine.async_engine import AsyncEngine
from dibit.engine.config import EngineConfig
from dibit.engine.core import EngineCore

logger = logging.getLogger(__name__)


def build_core(model: str | Path, config: EngineConfig) -> EngineCore:
    """Loads `model` (a directory, a .gguf file, a Hub id or "demo"). Raises CheckpointError or ConfigError."""
    from dibit.engine.checkpoint import open_checkpoint, resolve_model
    from dibit.engine.loader import load_decoder
    from dibit.engine.runner import ModelRunner
    from dibit.engine.tokenizer import load_tokenizer
    from dibit.kernels import native

    checkpoint = open_checkpoint(resolve_model(str(model)), gptq_zero=config.gptq_zero)
    try:
        tokenizer = load_tokenizer(checkpoint)
        quantization = checkpoint.quantization
        activation_bits = None if quantization is None else quantization.activation_bits
        decoder = load_decoder(checkpoint, config=config, activation_bits=activation_bits)
    finally:
        checkpoint.close()
    on_cpu = decoder.device.type == "cpu"
    if on_cpu and config.backend == "auto" and (reason := native.unavailable()) is not None:
        logger.warning("running on the reference path, many times slower than the C++ kernels: %s", reason)
    runner = ModelRunner(decoder, config)
    runner.warm_up()
    return EngineCore(runner, tokenizer, config)


def build_engine(model: str | Path, config: EngineConfig, *, model_name: str | None = None) -> AsyncEngine:
    """`build_core` behind a thread that is not started yet. Callers are told `model_name` (by default the
    name of the directory or file, or the Hub id)."""
    default = Path(model).name if Path(model).exists() else str(model)
    return AsyncEngine(build_core(model, config), model_name=model_name or default)
