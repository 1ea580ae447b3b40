"""AWQ: its order of outputs fixed by hand, the way back bit for bit, and what it has no room for."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from checkpoint_files import MODULE, random_qtensor, same_weight, write_json, write_model
from hypothesis import given
from hypothesis import strategies as st

from dibit.engine.checkpoint import open_checkpoint
from dibit.engine.checkpoint.awq import AwqPacking
from dibit.engine.checkpoint.packing import CannotHold
from dibit.engine.checkpoint.progress import PackedModule
from dibit.engine.errors import CheckpointError
from dibit.kernels.formats import Format, QTensor

AWQ = AwqPacking()
I32 = torch.int32


def config(group_size: int, **more: Any) -> dict[str, Any]:
    return {"quant_method": "awq", "bits": 4, "group_size": group_size, "zero_point": True, "version": "gemm"} | more


def write_awq(folder: Path, q: QTensor, quantization: dict[str, Any]) -> Path:
    tensors = {f"{MODULE}.{part}": tensor for part, tensor in AWQ.pack(q, module=MODULE).items()}
    return write_model(folder, tensors, quantization_config=quantization)


def test_golden_words() -> None:
    """Output 8 c + j of an input has the code j + 8 c: by the published order a word reads 7 5 3 1 6 4 2 0."""
    codes = torch.arange(16, dtype=torch.uint8)[:, None].expand(16, 16).contiguous()
    zeros = (15 - codes[:, :1]).contiguous()
    q = QTensor(codes, zeros, torch.ones(16, 1, dtype=torch.float16), Format(4, 16))
    packed = AWQ.pack(q, module=MODULE)
    assert {part: (t.dtype, tuple(t.shape)) for part, t in packed.items()} == {
        "qweight": (I32, (16, 2)),
        "qzeros": (I32, (1, 2)),
        "scales": (torch.float16, (1, 16)),
    }
    assert [w & 0xFFFFFFFF for w in packed["qweight"][3].tolist()] == [0x75316420, 0xFDB9ECA8]
    assert [w & 0xFFFFFFFF for w in packed["qzeros"][0].tolist()] == [0x8ACE9BDF, 0x02461357]


@given(
    group=st.sampled_from([-1, 16, 32, 64, 128]),
    n=st.integers(1, 5),
    k=st.integers(1, 3),
    seed=st.integers(0, 1000),
)
def test_round_trip(group: int, n: int, k: int, seed: int) -> None:
    torch.manual_seed(seed)
    q = random_qtensor(8 * n, 128 * k, Format(4, group))
    packed = AWQ.pack(q, module=MODULE)
    read = AWQ.unpack(packed, q.format, zeros="v2", module=MODULE, source="here")
    assert same_weight(read, q)
    again = AWQ.pack(read, module=MODULE)
    assert all(torch.equal(again[part], packed[part]) for part in packed)


def test_a_directory(tmp_path: Path) -> None:
    q = random_qtensor(24, 96, Format(4, 32))
    checkpoint = open_checkpoint(write_awq(tmp_path, q, config(32)))
    assert same_weight(checkpoint.linear(MODULE), q)
    assert checkpoint.packed()[MODULE].shape == (24, 96)
    assert checkpoint.zero_decision() is None
    assert checkpoint.quantization is not None
    assert (checkpoint.quantization.method, checkpoint.quantization.symmetric) == ("awq", False)


def test_the_older_names_of_keys(tmp_path: Path) -> None:
    q = random_qtensor(24, 96, Format(4, 32))
    older = {"quant_method": "awq", "w_bit": 4, "q_group_size": 32, "zero_point": True, "version": "GEMM"}
    assert same_weight(open_checkpoint(write_awq(tmp_path, q, older)).linear(MODULE), q)


def test_modules_left_alone_are_float(tmp_path: Path) -> None:
    q = random_qtensor(24, 96, Format(4, 32))
    folder = write_awq(tmp_path, q, config(32, modules_to_not_convert=["mlp", "lm_head"]))
    quantization = open_checkpoint(folder).quantization
    assert quantization is not None
    assert quantization.format_of("model.layers.0.mlp.up_proj") is None
    assert quantization.format_of(MODULE) == Format(4, 32)
    contradicted = write_awq(tmp_path / "c", q, config(32, modules_to_not_convert=["self_attn"]))
    with pytest.raises(CheckpointError, match="declares it float"):
        open_checkpoint(contradicted)


UNSUPPORTED: dict[str, tuple[dict[str, Any], str]] = {
    "gemv": ({"version": "gemv"}, "AWQ of version 'gemv'; supported: gemm"),
    "3-bit": ({"bits": 3}, "AWQ of 3 bits; supported: 4"),
    "bits-text": ({"bits": "4"}, "whole number"),
    "group": ({"group_size": 48}, "group size 48; supported"),
    "skipped": ({"modules_to_not_convert": [3]}, "expected a list of names"),
    "other-group": ({"group_size": 64}, "would have the shape"),
    "zero_point": ({"zero_point": "yes"}, "expected true or false"),
}


@pytest.mark.parametrize("case", UNSUPPORTED)
def test_a_config_that_is_not_supported(tmp_path: Path, case: str) -> None:
    change, message = UNSUPPORTED[case]
    folder = write_awq(tmp_path, random_qtensor(24, 128, Format(4, 32)), config(32) | change)
    with pytest.raises(CheckpointError, match=message):
        open_checkpoint(folder)


@pytest.mark.parametrize(
    ("part", "tensor", "message"),
    [
        ("qweight", torch.zeros(96, 3), "qweight of F32"),
        ("qweight", torch.zeros(90, 3, dtype=I32), "do not divide into groups of 32"),
        ("qzeros", torch.zeros(4, 3, dtype=I32), r"qzeros would have the shape \[3, 3\]"),
        ("scales", torch.zeros(3, 23), r"scales would have the shape \[3, 24\]"),
        ("scales", torch.full((3, 24), float("inf")), "not finite"),
        ("scales", None, "has no scales"),
    ],
)
def test_broken_tensors(tmp_path: Path, part: str, tensor: torch.Tensor | None, message: str) -> None:
    tensors = AWQ.pack(random_qtensor(24, 96, Format(4, 32)), module=MODULE) | {part: tensor}
    named = {f"{MODULE}.{name}": t for name, t in tensors.items() if t is not None}
    with pytest.raises(CheckpointError, match=message):
        open_checkpoint(write_model(tmp_path, named, quantization_config=config(32))).linear(MODULE)


def test_gptq_tensors_under_the_name_of_awq_are_refused(tmp_path: Path) -> None:
    from dibit.engine.checkpoint.gptq import to_gptq

    tensors = to_gptq(random_qtensor(64, 96, Format(4, 32))).named(MODULE)
    with pytest.raises(CheckpointError, match=r"but its tensors .* do not fit: 12 input columns"):
        open_checkpoint(write_model(tmp_path, tensors, quantization_config=config(32)))


def test_another_zero_convention_cannot_be_asked_for(tmp_path: Path) -> None:
    folder = write_awq(tmp_path, random_qtensor(24, 96, Format(4, 32)), config(32))
    with pytest.raises(CheckpointError, match="one way only; leave --gptq-zero out"):
        open_checkpoint(folder, gptq_zero="v1").linear(MODULE)


@pytest.mark.parametrize(
    ("format", "n", "module", "message"),
    [
        (Format(3, 32), 24, MODULE, "3 bits; awq holds 4 only"),
        (Format(2, 32, zero_grid="fractional"), 24, MODULE, "whole zero points"),
        (Format(4, 32), 20, MODULE, "N = 20; awq needs a multiple of 8"),
        (Format(4, 32), 24, "lm_head", "linears of layers only"),
    ],
)
def test_what_it_cannot_hold(format: Format, n: int, module: str, message: str) -> None:
    with pytest.raises(CannotHold, match=message):
        AWQ.check(format, n, 96, module=module)
    with pytest.raises(CannotHold, match=message):
        AWQ.pack(random_qtensor(n, 96, format), module=module)


def test_the_config_that_is_written(tmp_path: Path) -> None:
    modules = {MODULE: PackedModule(4, 32, symmetric=True)}
    names = [f"{MODULE}.qweight", "model.layers.0.mlp.up_proj.weight", "model.layers.0.input_layernorm.weight"]
    written = AWQ.config(modules, names, method="awq", facts={"seed": 3})
    assert written["modules_to_not_convert"] == ["model.layers.0.mlp.up_proj"]
    assert (written["bits"], written["group_size"], written["zero_point"]) == (4, 32, True)
    write_json(tmp_path / "c.json", written)
    modules["model.layers.1.self_attn.q_proj"] = PackedModule(4, 64, symmetric=True)
    with pytest.raises(CheckpointError, match="groups of 32, 64 columns; awq holds one group size"):
        AWQ.config(modules, names, method=None, facts={})
