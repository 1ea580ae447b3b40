"""Small checkpoints written by hand, so that tests decide every byte."""

from __future__ import annotations

import json
import struct
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from dibit.engine.checkpoint.checkpoint import ZeroConvention
from dibit.engine.checkpoint.gptq import to_gptq
from dibit.kernels.formats import Format, QTensor

CONFIG: dict[str, Any] = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "hidden_size": 64,
    "num_hidden_layers": 1,
    "max_position_embeddings": 128,
}
MODULE = "model.layers.0.self_attn.q_proj"


def write_json(path: Path, content: Any) -> None:
    path.write_text(json.dumps(content))


def write_model(folder: Path, tensors: Mapping[str, Tensor], **config: Any) -> Path:
    folder.mkdir(exist_ok=True)
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, folder / "model.safetensors")
    write_json(folder / "config.json", CONFIG | config)
    return folder


def raw_safetensors(header: object, data: bytes = b"", *, length: int | None = None) -> bytes:
    """A file of the given header, well-formed or not; `length` overrides what the prefix claims."""
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text) if length is None else length) + text + data


def random_qtensor(n: int, k: int, format: Format, *, low: int = 0) -> QTensor:
    """Codes of every value, zeros in [low, qmax], scales of float16 values."""
    groups = format.groups(k)
    return QTensor(
        codes=torch.randint(0, format.qmax + 1, (n, k), dtype=torch.uint8),
        zeros=torch.randint(low, format.qmax + 1, (n, groups), dtype=torch.uint8),
        scales=(torch.rand(n, groups) * 0.1 + 1e-3).to(torch.float16),
        format=format,
    )


def rounded_weight(n: int, k: int, format: Format, *, symmetric: bool = False) -> QTensor:
    """What quantizing a weight of normal numbers gives."""
    w = torch.randn(n, k) * 0.02
    return format.encode(w, *format.ranges(w, symmetric=symmetric))


def gptq_config(format: Format, *, label: str = "gptq_v2", symmetric: bool = False, **more: Any) -> dict[str, Any]:
    return {
        "quant_method": "gptq",
        "checkpoint_format": label,
        "bits": format.bits,
        "group_size": format.group_size,
        "desc_act": False,
        "sym": symmetric,
    } | more


def words_of(fields: Iterable[int], bits: int, *, per_word: int | None = None) -> list[int]:
    """Signed 32-bit words of fields, lowest bits first, by arithmetic on one large number.

    per_word  that many fields a word; left out: a dense stream
    """
    row = [int(field) for field in fields]
    if per_word is None:
        number = sum(field << (i * bits) for i, field in enumerate(row))
        count = -(-len(row) * bits // 32)
    else:
        number = sum(field << (i // per_word * 32 + i % per_word * bits) for i, field in enumerate(row))
        count = -(-len(row) // per_word)
    words = [(number >> (32 * i)) & 0xFFFFFFFF for i in range(count)]
    return [w - (1 << 32) if w >> 31 else w for w in words]


def word_rows(fields: Tensor, bits: int, *, per_word: int | None = None) -> Tensor:
    """int32 words of every row of fields [R, n]."""
    return torch.tensor([words_of(row, bits, per_word=per_word) for row in fields.tolist()], dtype=torch.int32)


def same_weight(found: object, q: QTensor) -> bool:
    return (
        isinstance(found, QTensor)
        and found.format == q.format
        and torch.equal(found.codes, q.codes)
        and torch.equal(found.zeros, q.zeros)
        and torch.equal(found.scales.float(), q.scales.float())
    )


def write_gptq(
    folder: Path,
    modules: Mapping[str, QTensor],
    config: Mapping[str, Any],
    *,
    zeros: ZeroConvention = "v2",
    extra: Mapping[str, Tensor] | None = None,
) -> Path:
    tensors = dict(extra or {})
    for module, q in modules.items():
        tensors |= to_gptq(q, zeros=zeros, module=module).named(module)
    return write_model(folder, tensors, quantization_config=dict(config))
