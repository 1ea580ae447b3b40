"""BitBLAS: its order within a word undone, by arithmetic on the published rule; what cannot be known is refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from checkpoint_files import MODULE, rounded_weight, same_weight, write_model
from packed_by_hand import bitblas_parts as by_hand
from packed_by_hand import interleaved

from dibit.engine.checkpoint import open_checkpoint
from dibit.engine.errors import CheckpointError
from dibit.kernels.formats import Format, QTensor

I8 = torch.int8


def config(format: Format, **more: Any) -> dict[str, Any]:
    return {
        "quant_method": "gptq",
        "checkpoint_format": "bitblas",
        "bits": format.bits,
        "group_size": format.group_size,
        "desc_act": False,
        "sym": False,
    } | more


def write_bitblas(folder: Path, tensors: dict[str, torch.Tensor], quantization: dict[str, Any]) -> Path:
    named = {f"{MODULE}.{part}": tensor for part, tensor in tensors.items()}
    return write_model(folder, named, quantization_config=quantization)


def test_golden_words() -> None:
    """Codes 0..7 at 4 bits: even ones below, odd ones above bit 16."""
    assert interleaved(list(range(8)), 4) == [0x20, 0x64, 0x31, 0x75]
    # At 2 bits 0 1 2 3 0 1 2 3 ...: even codes 0 2 0 2 are 0x88 a byte, odd ones 1 3 1 3 are 0xDD.
    assert interleaved([0, 1, 2, 3] * 4, 2) == [0x88, 0xDD, 0x88, 0xDD]


@pytest.mark.parametrize("bits", [2, 4, 8])
@pytest.mark.parametrize("group_size", [-1, 32])
@pytest.mark.parametrize("zeros", ["qzeros", "zeros"])
@pytest.mark.parametrize("method", ["gptq", "bitblas"])
def test_it_is_read_exactly(tmp_path: Path, *, bits: int, group_size: int, zeros: str, method: str) -> None:
    q = rounded_weight(48, 160, Format(bits, group_size))
    quantization = config(q.format, quant_method=method)
    checkpoint = open_checkpoint(write_bitblas(tmp_path, by_hand(q, zeros=zeros), quantization))
    assert same_weight(checkpoint.linear(MODULE), q)
    assert checkpoint.packed()[MODULE].shape == (48, 160)
    assert checkpoint.quantization is not None
    assert checkpoint.quantization.method == "bitblas"
    decision = checkpoint.zero_decision()
    assert decision is not None
    assert decision.convention == "v2"


def test_zero_points_off_by_one_are_noticed(tmp_path: Path) -> None:
    q = rounded_weight(48, 160, Format(2, 32))
    q.zeros.clamp_(min=1)
    lower = QTensor(q.codes, q.zeros - 1, q.scales, q.format)
    checkpoint = open_checkpoint(write_bitblas(tmp_path, by_hand(lower), config(q.format)))
    decision = checkpoint.zero_decision()
    assert decision is not None
    assert decision.convention == "v1"
    assert same_weight(checkpoint.linear(MODULE), q)


@pytest.mark.parametrize(
    ("part", "tensor", "message"),
    [
        ("qweight", torch.zeros(3, 5, 16, 8, dtype=I8), "permuted for one GPU's schedule"),
        ("qweight", torch.zeros(48, 40), "qweight of F32"),
        ("qweight", torch.zeros(48, 16, dtype=I8), "scales would have the shape"),
        ("qweight", torch.zeros(48, 18, dtype=I8), "do not fit"),
        ("qzeros", torch.zeros(0, dtype=I8), "symmetric BitBLAS weight"),
        ("qzeros", None, "symmetric BitBLAS weight"),
        ("qzeros", torch.zeros(5, 11, dtype=I8), "qzeros would have the shape"),
        ("scales", torch.full((48, 5), float("inf")), "not finite"),
        ("scales", None, "has no scales"),
    ],
)
def test_what_is_refused(tmp_path: Path, part: str, tensor: torch.Tensor | None, message: str) -> None:
    form = Format(2, 32)
    tensors = by_hand(rounded_weight(48, 160, form)) | {part: tensor}
    kept = {name: t for name, t in tensors.items() if t is not None}
    with pytest.raises(CheckpointError, match=message):
        open_checkpoint(write_bitblas(tmp_path, kept, config(form))).linear(MODULE)


def test_3_bits_do_not_exist(tmp_path: Path) -> None:
    tensors = by_hand(rounded_weight(48, 160, Format(2, 32)))
    with pytest.raises(CheckpointError, match="BitBLAS of 3 bits; supported: 2, 4, 8"):
        open_checkpoint(write_bitblas(tmp_path, tensors, config(Format(3, 32))))
