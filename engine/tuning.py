"""`dibit kernels tune`: the products of a model, measured on the GPU at hand (kernels/triton/autotune.py)."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch

from dibit.engine.build import load_model
from dibit.engine.config import EngineConfig
from dibit.engine.errors import ConfigError
from dibit.kernels.triton.availability import gpu_of, unavailable


@dataclass(frozen=True)
class TuningResult:
    """shapes: one line for each that was measured. file: where they are kept."""

    gpu: str
    shapes: tuple[str, ...]
    file: Path

    def text(self) -> str:
        return f"{len(self.shapes)} shapes kept in {self.file}"


def tune_model(model: str, *, limit_s: float, say: Callable[[str], None], folder: Path | None = None) -> TuningResult:
    """Measures and keeps, for this user or in `folder`; no further shape is begun after `limit_s` seconds. `say` is
    told of each. Raises ConfigError without a GPU, for a model without quantized weights, and where the file cannot be
    written."""
    if (reason := unavailable()) is not None:
        raise ConfigError(f"nothing to measure on: the triton backend {reason}")
    from dibit.engine.models.decoder import PackedLinear
    from dibit.engine.models.fused_block import FusedBlock
    from dibit.kernels.triton.autotune import After, gpu_timer, tune_all
    from dibit.kernels.triton.layout import TritonQWeight
    from dibit.kernels.triton.plan import Tuned
    from dibit.kernels.triton.tuned_plans import keep

    lines: list[str] = []

    def progress(key: str, tuned: Tuned) -> None:
        chosen = ", ".join(f"{name} for {tokens} tokens" for tokens, name in tuned.configs.items())
        splits = [] if tuned.splits is None else [f"{tuned.splits} splits"]
        lines.append(f"{key}: {', '.join([*splits, chosen] if chosen else splits) or 'as the rules have it'}")
        say(lines[-1])

    decoder = load_model(model, EngineConfig(device="cuda", backend="triton"))
    weights = [weight for weight in decoder.packed_weights() if isinstance(weight, TritonQWeight)]
    if not weights:
        raise ConfigError(f"{model} has no quantized weights; tuning is for those")
    readers = {
        id(linear.weight): After.HALVES if site == "gate_up" else After.ROW
        for block in decoder.blocks
        if isinstance(block, FusedBlock)
        for site, linear in block.linears.items()
        if isinstance(linear, PackedLinear)
    }
    measured = tune_all(
        weights,
        gpu=gpu_of(decoder.device),
        timer=lambda w: gpu_timer(w, after=readers.get(id(w), After.NOTHING)),
        limit_s=limit_s,
        progress=progress,
    )
    name = torch.cuda.get_device_name(decoder.device)
    try:
        return TuningResult(name, tuple(lines), keep(name, measured, folder=folder))
    except OSError as error:
        raise ConfigError(f"what was measured cannot be kept: {error}; name another folder") from error
