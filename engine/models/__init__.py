"""The model families that can be read. A new one is a file with its `Arch` and a line in `ARCHS`."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from dibit.engine.errors import CheckpointError
from dibit.engine.models.hf_config import read_sizes
from dibit.engine.models.llama import LLAMA, MISTRAL
from dibit.engine.models.qwen import QWEN2, QWEN3
from dibit.engine.models.spec import Arch, Sizes

ARCHS: tuple[Arch, ...] = (LLAMA, MISTRAL, QWEN2, QWEN3)


def resolve_arch(config: Mapping[str, Any]) -> tuple[Arch, Sizes]:
    """Structure and sizes of the model that a Hugging Face config.json describes.

    Raises CheckpointError for an architecture, a key or a size that is not understood.
    """
    listed = config.get("architectures")
    names = [listed] if isinstance(listed, str) else list(listed or ())
    for arch in ARCHS:
        if any(name in arch.hf_names for name in names) or (not names and config.get("model_type") == arch.name):
            return arch, read_sizes(arch, config)
    found = ", ".join(map(str, names)) or f"model_type {config.get('model_type')!r}"
    supported = ", ".join(name for arch in ARCHS for name in arch.hf_names)
    raise CheckpointError(f"architecture {found} in config.json; supported: {supported}. Choose a checkpoint of those")
