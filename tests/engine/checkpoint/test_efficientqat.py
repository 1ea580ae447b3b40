"""EfficientQAT's own files: width and group size told from shapes, weights bit for bit."""

from __future__ import annotations

import logging
from pathlib import Path

import pytest
import torch
from checkpoint_files import MODULE, random_qtensor, rounded_weight, same_weight, write_model
from packed_by_hand import efficientqat_parts as by_hand

from dibit.engine.checkpoint import open_checkpoint
from dibit.engine.checkpoint.gptq import to_gptq
from dibit.engine.errors import CheckpointError
from dibit.kernels.formats import Format, QTensor

I32 = torch.int32


def write_eqat(folder: Path, modules: dict[str, dict[str, torch.Tensor]]) -> Path:
    tensors = {f"{module}.{part}": t for module, parts in modules.items() for part, t in parts.items()}
    return write_model(folder, tensors)


@pytest.mark.parametrize("bits", [2, 3, 4])
@pytest.mark.parametrize("group_size", [-1, 16, 64])
@pytest.mark.parametrize(("n", "k"), [(100, 320), (37, 64), (64, 192)])
def test_it_is_read_exactly(tmp_path: Path, *, bits: int, group_size: int, n: int, k: int) -> None:
    q = rounded_weight(n, k, Format(bits, group_size))
    checkpoint = open_checkpoint(write_eqat(tmp_path, {MODULE: by_hand(q)}))
    quantization = checkpoint.quantization
    assert quantization is not None
    # A single group of a row is one group per row, whatever it is called.
    expected = Format(bits, -1 if q.zeros.shape[1] == 1 else group_size)
    assert (quantization.method, quantization.format) == ("efficientqat", expected)
    assert checkpoint.linear_format(MODULE) == expected
    assert same_weight(checkpoint.linear(MODULE), QTensor(q.codes, q.zeros, q.scales, expected))
    decision = checkpoint.zero_decision()
    assert decision is not None
    assert decision.convention == "v2"


def test_scales_of_the_end_to_end_phase_are_kept_in_float32(tmp_path: Path) -> None:
    q = rounded_weight(64, 128, Format(2, 64))
    scales = q.scales * (1 + torch.rand_like(q.scales) * 1e-4)
    fine = QTensor(q.codes, q.zeros, scales, q.format)
    read = open_checkpoint(write_eqat(tmp_path, {MODULE: by_hand(fine, dtype=torch.float32)})).linear(MODULE)
    assert isinstance(read, QTensor)
    assert read.scales.dtype == torch.float32
    assert torch.equal(read.scales, scales)


def test_how_it_was_told_is_logged(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    q = rounded_weight(64, 128, Format(3, 64))
    with caplog.at_level(logging.INFO):
        open_checkpoint(write_eqat(tmp_path, {MODULE: by_hand(q)}))
    assert "read as EfficientQAT's, int3-g64 by its shapes" in caplog.text


def test_modules_of_several_formats(tmp_path: Path) -> None:
    formats = [Format(2, 64), Format(2, 64), Format(3, 16), Format(4, 64)]
    modules = {f"model.layers.{i}.mlp.up_proj": rounded_weight(48, 128, form) for i, form in enumerate(formats)}
    checkpoint = open_checkpoint(write_eqat(tmp_path, {m: by_hand(q) for m, q in modules.items()}))
    for module, q in modules.items():
        assert same_weight(checkpoint.linear(module), q)


def test_a_gptq_file_that_lost_its_config_is_read_by_its_values(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    q = rounded_weight(64, 128, Format(4, 64))
    q.zeros.clamp_(min=1)
    with caplog.at_level(logging.WARNING):
        checkpoint = open_checkpoint(write_eqat(tmp_path, {MODULE: to_gptq(q, zeros="v1").named("")}))
        assert same_weight(checkpoint.linear(MODULE), q)
    assert "zero points read as v1" in caplog.text
    forced = open_checkpoint(tmp_path, gptq_zero="v2").linear(MODULE)
    assert isinstance(forced, QTensor)
    assert torch.equal(forced.zeros, q.zeros - 1)


def test_an_overflowed_version_1_zero_is_refused(tmp_path: Path) -> None:
    q = random_qtensor(64, 128, Format(2, 64))
    q.zeros[0, 0] = 3
    folder = write_eqat(tmp_path, {MODULE: by_hand(q)})
    with pytest.raises(CheckpointError, match="overflowed"):
        open_checkpoint(folder, gptq_zero="v1").linear(MODULE)


@pytest.mark.parametrize(
    ("part", "tensor"),
    [
        ("qweight", torch.zeros(9, 64, dtype=I32)),
        ("qzeros", torch.zeros(2, 5, dtype=I32)),
        ("scales", torch.zeros(2, 63)),
        ("scales", torch.zeros(128)),
        ("g_idx", torch.zeros(120, dtype=I32)),
        ("g_idx", None),
    ],
)
def test_other_shapes_are_not_guessed_at(tmp_path: Path, part: str, tensor: torch.Tensor | None) -> None:
    tensors = by_hand(rounded_weight(64, 128, Format(2, 64))) | {part: tensor}
    with pytest.raises(CheckpointError, match="says how they are packed, and their shapes are not those of"):
        open_checkpoint(write_eqat(tmp_path, {MODULE: {k: t for k, t in tensors.items() if t is not None}}))


def test_gptqs_3_bit_stream_without_a_config_is_not_taken_for_it(tmp_path: Path) -> None:
    tensors = to_gptq(rounded_weight(64, 128, Format(3, 64))).named("")
    with pytest.raises(CheckpointError, match="says how they are packed"):
        open_checkpoint(write_eqat(tmp_path, {MODULE: tensors}))


@pytest.mark.parametrize(
    ("part", "tensor", "message"),
    [
        ("qweight", torch.zeros(8, 64), "qweight of F32"),
        ("g_idx", torch.arange(128, dtype=I32).flip(0) // 64, "act-order"),
    ],
)
def test_broken_tensors(tmp_path: Path, part: str, tensor: torch.Tensor, message: str) -> None:
    tensors = by_hand(rounded_weight(64, 128, Format(2, 64))) | {part: tensor}
    with pytest.raises(CheckpointError, match=message):
        open_checkpoint(write_eqat(tmp_path, {MODULE: tensors}))
