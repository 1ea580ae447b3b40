"""From a model's name to an engine: the one place where checkpoint, tokenizer, decoder and runner meet the core."""

from __future__ import annotations

import ctypes
import importlib.metadata
import logging
from contextlib import ExitStack, closing
from pathlib import Path
from typing import TYPE_CHECKING

from dibit.engine import numa
from dibit.engine.async_engine import AsyncEngine
from dibit.engine.config import EngineConfig, TransportName
from dibit.engine.core import EngineCore
from dibit.engine.errors import ConfigError
from dibit.engine.transport import ThreadTransport, Transport

if TYPE_CHECKING:
    from dibit.engine.checkpoint import Checkpoint
    from dibit.engine.models.decoder import Decoder
    from dibit.engine.packed_cache import PackedCache
    from dibit.engine.tokenizer import Tokenizer

logger = logging.getLogger(__name__)


def build_core(model: str | Path, config: EngineConfig) -> EngineCore:
    """Loads `model` (a directory, a .gguf file, a Hub id or "demo"), and the draft model that the settings name.
    Raises CheckpointError or ConfigError."""
    from dibit.engine.memory_plan import CacheSize, activation_bytes, free_memory
    from dibit.engine.runner import ModelRunner
    from dibit.kernels import native

    numa.apply(config.numa)
    with ExitStack() as opened:
        main = opened.enter_context(closing(_Source(model, config)))
        draft = None
        if config.draft_model is not None:
            from dibit.engine.draft_model import check_vocabulary

            draft = opened.enter_context(closing(_Source(config.draft_model, config)))
            check_vocabulary(main.tokenizer, draft.tokenizer, name=config.draft_model)
        decoder = main.decoder()
        guessing = None if draft is None else draft.decoder()
    _return_freed()
    on_cpu = decoder.device.type == "cpu"
    if on_cpu and config.backend == "auto" and (reason := native.unavailable()) is not None:
        logger.warning("running on the reference path, many times slower than the C++ kernels: %s", reason)
    free = free_memory(decoder.device)
    if on_cpu:
        # Mapped weights are page cache, which the system counts as free.
        free = max(0, free - main.mapped_bytes - (0 if draft is None else draft.mapped_bytes))
    if guessing is None:
        runner = ModelRunner(decoder, config, free_bytes=free)
        runner.warm_up()
        return EngineCore(runner, main.tokenizer, config)
    from dibit.engine.draft_model import DraftModel
    from dibit.engine.runner import set_threads

    sizes = guessing.sizes
    free -= activation_bytes(sizes, config, max_model_len=sizes.max_positions, gpu=not on_cpu)
    block = CacheSize.of(sizes, config, quantized=guessing.quantized, num_blocks=0, max_model_len=0).block_bytes
    runner = ModelRunner(decoder, config, free_bytes=free, draft_block_bytes=block)
    drafter = DraftModel(
        guessing,
        config,
        num_blocks=runner.num_blocks,
        max_model_len=runner.max_model_len,
        vocab_size=main.tokenizer.vocab_size,
    )
    # Both share the threads, those of torch too, which the model with floats needs.
    set_threads(config, guessing if decoder.quantized else decoder)
    for one in (drafter.runner, runner):
        one.warm_up()
    return EngineCore(runner, main.tokenizer, config, drafter=drafter)


def _return_freed() -> None:
    """What loading has freed goes back to the system: a tokenizer of 50 thousand tokens leaves 25 MB of small pieces,
    which glibc would keep. Nothing happens under another C library."""
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:
        trim(0)


def load_model(model: str | Path, config: EngineConfig) -> Decoder:
    """The weights of `model` alone. Raises CheckpointError or ConfigError."""
    with closing(_Source(model, config)) as source:
        return source.decoder()


class _Source:
    """A checkpoint being loaded: its tokenizer, then its weights."""

    def __init__(self, model: str | Path, config: EngineConfig) -> None:
        from dibit.engine.checkpoint import open_checkpoint, resolve_model
        from dibit.engine.tokenizer import load_tokenizer

        self._config = config
        self._checkpoint = open_checkpoint(resolve_model(str(model)), gptq_zero=config.gptq_zero)
        self._cache: PackedCache | None = None
        try:
            self.tokenizer = load_tokenizer(self._checkpoint)
        except BaseException:
            self.close()
            raise

    @property
    def mapped_bytes(self) -> int:
        return 0 if self._cache is None else self._cache.mapped_bytes

    def decoder(self) -> Decoder:
        from dibit.engine.loader import load_decoder

        quantization = self._checkpoint.quantization
        activation_bits = None if quantization is None else quantization.activation_bits
        self._cache = _packed_cache(self._checkpoint, self._config)
        return load_decoder(self._checkpoint, config=self._config, activation_bits=activation_bits, cache=self._cache)

    def close(self) -> None:
        self._checkpoint.close()


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


def build_engine(
    model: str | Path, config: EngineConfig, *, model_name: str | None = None, transport: TransportName = "auto"
) -> AsyncEngine:
    """An engine that is loaded and not started yet, on a thread or in a process ("auto": a process on a GPU).

    Callers are told `model_name` (by default the name of the directory or file, or the Hub id). Raises what
    `build_core` does, and EngineDead when a process ends before it has loaded.
    """
    default = Path(model).name if Path(model).exists() else str(model)
    return AsyncEngine(_transport(model, config, transport), model_name=model_name or default)


def _transport(model: str | Path, config: EngineConfig, name: TransportName) -> Transport:
    if name == "thread" or (name == "auto" and not _expects_gpu(config)):
        return ThreadTransport(build_core(model, config))
    from dibit.engine.checkpoint import resolve_model
    from dibit.engine.process_transport import ProcessTransport

    # Once, here: both processes read it, and neither is to download what the other does.
    path = resolve_model(str(model))

    def tokenizer() -> Tokenizer:
        with closing(_Source(path, config)) as source:
            found = source.tokenizer
        _return_freed()
        return found

    return ProcessTransport.launch(str(path), config, load_tokenizer=tokenizer)


def _expects_gpu(config: EngineConfig) -> bool:
    """What `loader.resolve_device` will find, without CUDA: whoever initialises it here keeps a context on the GPU."""
    if config.device != "auto":
        return config.device == "cuda"
    if config.backend not in ("auto", "triton"):
        return False
    import torch

    # Asks NVML; `is_available` would ask the CUDA driver.
    return torch.cuda.device_count() > 0
