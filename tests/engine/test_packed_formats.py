"""Every on-disk format is served: a tiny model decodes to the same bits from each of them as from GPTQ version 2."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from packed_by_hand import bitblas_parts, compressed_tensors_parts, efficientqat_parts
from safetensors.torch import save_file
from tiny_models import MemoryWeights, Paged, hf_model, quantized, token_ids, weights_of
from torch import Tensor

from dibit.engine.checkpoint import open_checkpoint
from dibit.engine.checkpoint.dispatch import EXPORTS
from dibit.engine.checkpoint.progress import PackedModule
from dibit.engine.config import EngineConfig
from dibit.engine.loader import load_decoder
from dibit.kernels import native
from dibit.kernels.formats import Format, QTensor

PROMPT, STEPS = 19, 4
Pack = Callable[[QTensor], Mapping[str, Tensor]]


def model(*formats: Format) -> MemoryWeights:
    """A model of two layers, each in a format of its own, with no zero point of 0."""
    tiny = weights_of(hf_model(hidden_size=64, intermediate_size=96, num_attention_heads=4))
    low = MemoryWeights(tiny.config, dict(tiny.tensors))
    for layer, form in enumerate(formats):
        for module, w in quantized(tiny, form).packed.items():
            if f".layers.{layer}." in module:
                w.zeros.clamp_(min=1)
                low.packed[module] = w
                del low.tensors[f"{module}.weight"]
    return low


def write(folder: Path, low: MemoryWeights, pack: Pack, quantization: Mapping[str, Any] | None) -> Path:
    folder.mkdir()
    tensors = dict(low.tensors)
    for module, w in low.packed.items():
        tensors |= {f"{module}.{part}": tensor.contiguous() for part, tensor in pack(w).items()}
    save_file(tensors, folder / "model.safetensors")
    config = low.config if quantization is None else low.config | {"quantization_config": dict(quantization)}
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def export_config(to: str, low: MemoryWeights) -> dict[str, Any]:
    modules = {m: PackedModule(w.format.bits, w.format.group_size, symmetric=False) for m, w in low.packed.items()}
    return EXPORTS[to].config(modules, list(low.tensors), method=None, facts={})


def decoded(folder: Path, config: EngineConfig) -> Tensor:
    """Logits of a prompt and of a few greedy steps after it."""
    checkpoint = open_checkpoint(folder)
    paged = Paged(load_decoder(checkpoint, config=config))
    checkpoint.close()
    ids = token_ids(PROMPT)
    logits = []
    for _ in range(STEPS):
        logits.append(paged.logits((paged.request(ids), 0, len(ids)))[-1])
        ids = [*ids, int(logits[-1].argmax())]
    return torch.stack(logits)


@pytest.fixture(params=["reference", "cpu"])
def engine(request: pytest.FixtureRequest) -> EngineConfig:
    if request.param == "cpu" and native.unavailable() is not None:
        pytest.skip("the C++ kernels are not built")
    return EngineConfig(backend=request.param, threads=1)


MIXED = (Format(4, 32), Format(2, -1))
EXPORTED = [
    ("gptq-v1", (Format(3, 32), Format(3, 32))),
    ("gptq-v1", MIXED),
    ("awq", (Format(4, 32), Format(4, 32))),
    ("compressed-tensors", (Format(3, 16), Format(3, -1))),
    ("compressed-tensors", MIXED),
]


@pytest.mark.parametrize(("to", "formats"), EXPORTED, ids=lambda v: v if isinstance(v, str) else v[1].name)
def test_what_dibit_writes(tmp_path: Path, engine: EngineConfig, to: str, formats: tuple[Format, ...]) -> None:
    low = model(*formats)
    gptq = write(tmp_path / "gptq", low, partial(EXPORTS["gptq"].pack, module="m"), export_config("gptq", low))
    other = write(tmp_path / "other", low, partial(EXPORTS[to].pack, module="model.layers.0.m"), export_config(to, low))
    assert torch.equal(decoded(other, engine), decoded(gptq, engine))


def older_compressed_tensors(q: QTensor) -> Mapping[str, Tensor]:
    return compressed_tensors_parts(q, padded=True)


BITBLAS = {"quant_method": "gptq", "checkpoint_format": "bitblas", "bits": 2, "group_size": 32, "sym": False}
IMPORTED: list[tuple[str, Pack, tuple[Format, ...]]] = [
    ("efficientqat", efficientqat_parts, (Format(3, 32), Format(3, 32))),
    ("efficientqat", efficientqat_parts, (Format(2, 16), Format(2, 16))),
    ("bitblas", bitblas_parts, (Format(2, 32), Format(2, 32))),
    ("compressed-tensors", older_compressed_tensors, (Format(3, 32), Format(3, 32))),
]


@pytest.mark.parametrize(("kind", "pack", "formats"), IMPORTED)
def test_what_others_write(
    tmp_path: Path, engine: EngineConfig, kind: str, pack: Pack, formats: tuple[Format, ...]
) -> None:
    low = model(*formats)
    configs = {"efficientqat": None, "bitblas": BITBLAS, "compressed-tensors": export_config("compressed-tensors", low)}
    gptq = write(tmp_path / "gptq", low, partial(EXPORTS["gptq"].pack, module="m"), export_config("gptq", low))
    other = write(tmp_path / "other", low, pack, configs[kind])
    assert torch.equal(decoded(other, engine), decoded(gptq, engine))
