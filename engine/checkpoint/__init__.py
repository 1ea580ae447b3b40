"""Models on disk: opened from their headers, streamed tensor by tensor, written aside and renamed when whole."""

from __future__ import annotations

from pathlib import Path

from dibit.engine.checkpoint.checkpoint import (
    Checkpoint,
    ModuleRule,
    Quantization,
    TensorInfo,
    ZeroChoice,
    ZeroConvention,
    ZeroDecision,
)
from dibit.engine.checkpoint.resolve import SUPPORTED, resolve_model
from dibit.engine.checkpoint.writer import CheckpointWriter
from dibit.engine.errors import CheckpointError

__all__ = [
    "Checkpoint",
    "CheckpointWriter",
    "ModuleRule",
    "Quantization",
    "TensorInfo",
    "ZeroChoice",
    "ZeroConvention",
    "ZeroDecision",
    "open_checkpoint",
    "resolve_model",
]


def open_checkpoint(path: Path | str, *, gptq_zero: ZeroChoice = "auto") -> Checkpoint:
    """Open a model directory or a .gguf file; only headers are read.

    gptq_zero  how the zero points of a GPTQ checkpoint are read; "auto" decides from label and values
    Raises CheckpointError when the files are missing, broken or of a kind that is not supported.
    """
    path = Path(path)
    if path.is_dir():
        from dibit.engine.checkpoint.safetensors_dir import DirectoryCheckpoint

        return DirectoryCheckpoint(path, gptq_zero=gptq_zero)
    if not path.is_file():
        raise CheckpointError(f"{path}: there is no such file or directory; a model is {SUPPORTED}")
    if path.suffix != ".gguf":
        raise CheckpointError(f"{path} is a file of a kind that is not supported; a model is {SUPPORTED}")
    from dibit.engine.checkpoint.gguf_file import GgufCheckpoint

    return GgufCheckpoint(path)
