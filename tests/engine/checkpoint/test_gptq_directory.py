"""GPTQ checkpoints in directories: read exactly, wrong labels overruled, what is not supported refused."""

from __future__ import annotations

import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from checkpoint_files import (
    CONFIG,
    MODULE,
    gptq_config,
    random_qtensor,
    rounded_weight,
    write_gptq,
    write_json,
    write_model,
)

from dibit.engine.checkpoint import open_checkpoint
from dibit.engine.checkpoint.gptq import to_gptq
from dibit.engine.errors import CheckpointError
from dibit.kernels.formats import BITS, Format, QTensor


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("zeros", ["v1", "v2"])
@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("group", [-1, 16, 32, 64, 128])
def test_gptq_is_read_exactly(tmp_path: Path, *, bits: int, zeros: Any, symmetric: bool, group: int) -> None:
    form = Format(bits, group)
    q = rounded_weight(96, 256, form, symmetric=symmetric)
    if zeros == "v1":
        q.zeros.clamp_(min=1)
    label = "gptq" if zeros == "v1" else "gptq_v2"
    config = gptq_config(form, label=label, symmetric=symmetric)
    bias = torch.randn(96).half()
    checkpoint = open_checkpoint(
        write_gptq(tmp_path, {MODULE: q}, config, zeros=zeros, extra={f"{MODULE}.bias": bias, "n.weight": bias + 1})
    )
    assert checkpoint.linear_format(MODULE) == form
    read = checkpoint.linear(MODULE)
    assert isinstance(read, QTensor)
    assert torch.equal(read.codes, q.codes)
    assert torch.equal(read.zeros, q.zeros)
    assert torch.equal(read.scales.float(), q.scales.float())
    assert torch.equal(checkpoint.tensor(f"{MODULE}.bias"), bias)
    assert checkpoint.float_bytes() == 2 * bias.nbytes
    assert checkpoint.packed_bytes() == sum(t.nbytes for t in to_gptq(q).named("m").values())


def test_a_wrong_label_is_overruled_and_logged(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    form = Format(4, 32)
    q = rounded_weight(64, 128, form, symmetric=True)
    folder = write_gptq(tmp_path, {MODULE: q}, gptq_config(form, label="gptq", symmetric=True), zeros="v2")
    with caplog.at_level(logging.INFO):
        read = open_checkpoint(folder).linear(MODULE)
    assert isinstance(read, QTensor)
    assert torch.equal(read.zeros, q.zeros)
    assert [r.levelno for r in caplog.records] == [logging.WARNING]
    assert "read as v2" in caplog.text
    forced = open_checkpoint(folder, gptq_zero="v1").linear(MODULE)
    assert isinstance(forced, QTensor)
    assert torch.equal(forced.zeros, q.zeros + 1)


def test_dynamic_overrides(tmp_path: Path) -> None:
    formats = {
        "model.layers.0.mlp.up_proj": Format(2, 32),
        "model.layers.0.mlp.down_proj": Format(8, 64),
        "model.layers.1.mlp.up_proj": Format(4, 64),
        "model.layers.1.mlp.down_proj": Format(4, -1),
    }
    dynamic = {
        r"-:.*\.1\.mlp\.gate_proj": {},
        r"+:model\.layers\.0\..*up_proj": {"bits": 2, "group_size": 32},
        r".*\.0\.mlp": {"bits": 8},
        r"+:.*\.1\..*down_proj": {"group_size": -1},
    }
    floats = {"model.layers.1.mlp.gate_proj.weight": torch.ones(4, 4)}
    modules = {module: random_qtensor(32, 128, form) for module, form in formats.items()}
    checkpoint = open_checkpoint(
        write_gptq(tmp_path, modules, gptq_config(Format(4, 64), dynamic=dynamic), extra=floats), gptq_zero="v2"
    )
    for module, form in formats.items():
        assert checkpoint.linear_format(module) == form
        read = checkpoint.linear(module)
        assert isinstance(read, QTensor)
        assert torch.equal(read.codes, modules[module].codes)
    assert checkpoint.linear_format("model.layers.1.mlp.gate_proj") is None
    assert isinstance(checkpoint.linear("model.layers.1.mlp.gate_proj"), torch.Tensor)


def test_the_older_config_file_and_its_names(tmp_path: Path) -> None:
    form = Format(4, 32)
    q = rounded_weight(64, 128, form)
    folder = write_model(tmp_path, to_gptq(q, module=MODULE).named(MODULE))
    write_json(folder / "quantize_config.json", {"wbits": 4, "q_group_size": 32, "zero_point": True})
    checkpoint = open_checkpoint(folder)
    assert checkpoint.quantization is not None
    assert not checkpoint.quantization.symmetric
    assert checkpoint.quantization.checkpoint_format == "gptq"
    assert checkpoint.linear_format(MODULE) == form


UNSUPPORTED: dict[str, tuple[dict[str, Any], str]] = {
    "hqq": ({"quant_method": "hqq"}, "quant_method 'hqq'; supported: GPTQ.*AWQ.*compressed-tensors"),
    "bitsandbytes": ({"quant_method": "bitsandbytes"}, "'bitsandbytes'; supported"),
    "fp8": ({"quant_method": "fp8"}, "'fp8'; supported"),
    "auto-round": ({"quant_method": "auto-round"}, "format auto_gptq"),
    "no-method": ({"quant_method": None}, "no quant_method"),
    "marlin": ({"checkpoint_format": "marlin"}, "checkpoint_format 'marlin'"),
    "planar": ({"checkpoint_format": "gptq_p"}, "'gptq_p'; supported: gptq, gptq_v2"),
    "int64-words": ({"pack_dtype": "int64"}, "packs into int64"),
    "adapter": ({"adapter": {"rank": 4}}, "sets adapter"),
    "5-bit": ({"bits": 5}, "supported: 2, 3, 4, 8"),
    "bits-text": ({"bits": "4"}, "whole number"),
    "bits-bool": ({"bits": True}, "whole number"),
    "bits-missing": ({"bits": None}, "whole number"),
    "group-256": ({"group_size": 256}, "group size 256; supported"),
    "sym-text": ({"sym": "no"}, "expected true or false"),
    "contradiction": ({"wbits": 8}, "contradicts itself: bits=4, wbits=8"),
    "contradiction-sym": ({"sym": True, "zero_point": True}, "contradicts itself"),
    "dynamic-list": ({"dynamic": [1]}, "expected an object of patterns"),
    "dynamic-regex": ({"dynamic": {"+:(": {}}}, "no regular expression"),
    "dynamic-long": ({"dynamic": {"a" * 2000: {}}}, "at most"),
    "dynamic-value": ({"dynamic": {"+:a": 4}}, "expected an object with bits"),
    "dynamic-bits": ({"dynamic": {"+:a": {"bits": 7}}}, "supported: 2, 3, 4, 8"),
    "declared-float": ({"dynamic": {"-:.*q_proj": {}}}, "declares it float"),
    "other-bits": ({"bits": 8}, "declared 8-bit, but its shapes .* imply 4 bits"),
    "other-group": ({"group_size": 64}, "imply a group size of 32"),
    "per-channel": ({"group_size": -1}, "imply a group size of 32"),
}


@pytest.mark.parametrize("case", UNSUPPORTED)
def test_a_config_that_is_not_supported(tmp_path: Path, case: str) -> None:
    changes, message = UNSUPPORTED[case]
    form = Format(4, 32)
    folder = write_gptq(tmp_path, {MODULE: rounded_weight(64, 128, form)}, gptq_config(form) | changes)
    with pytest.raises(CheckpointError, match=message):
        open_checkpoint(folder)


def test_another_method_is_refused_before_a_weight_file_is_touched(tmp_path: Path) -> None:
    write_json(tmp_path / "config.json", CONFIG | {"quantization_config": {"quant_method": "hqq"}})
    (tmp_path / "model.safetensors").write_bytes(b"garbage")
    with pytest.raises(CheckpointError, match="quant_method 'hqq'"):
        open_checkpoint(tmp_path)


def swap(**parts: torch.Tensor) -> Callable[[dict[str, torch.Tensor]], None]:
    return lambda tensors: tensors.update({f"{MODULE}.{part}": tensor for part, tensor in parts.items()})


def drop(part: str) -> Callable[[dict[str, torch.Tensor]], None]:
    def edit(tensors: dict[str, torch.Tensor]) -> None:
        del tensors[f"{MODULE}.{part}"]

    return edit


I32 = torch.int32
BAD_SHAPES: dict[str, tuple[Callable[[dict[str, torch.Tensor]], None], str]] = {
    "no-scales": (drop("scales"), "has no scales"),
    "no-qzeros": (drop("qzeros"), "has no qzeros"),
    "float-qweight": (swap(qweight=torch.ones(16, 64)), r"qweight is F32 .* expected int32"),
    "int-scales": (swap(scales=torch.ones(4, 64, dtype=I32)), r"scales is I32"),
    "flat-scales": (swap(scales=torch.ones(256)), "2 dimension"),
    "scales-rows": (swap(scales=torch.ones(3, 64)), "do not belong together"),
    "scales-columns": (swap(scales=torch.ones(4, 60)), "do not belong together"),
    "padded-rows": (swap(qweight=torch.ones(17, 64, dtype=I32)), "do not belong together at 4 bits"),
    "g-idx-short": (swap(g_idx=torch.zeros(64, dtype=I32)), "do not belong together at 4 bits"),
    "uneven-groups": (swap(qzeros=torch.ones(3, 8, dtype=I32), scales=torch.ones(3, 64)), "no whole number"),
    "empty": (swap(qweight=torch.ones(0, 64, dtype=I32), g_idx=torch.ones(0, dtype=I32)), "do not belong together"),
}


@pytest.mark.parametrize("case", BAD_SHAPES)
def test_packed_tensors_of_wrong_shape(tmp_path: Path, case: str) -> None:
    edit, message = BAD_SHAPES[case]
    form = Format(4, 32)
    tensors = to_gptq(rounded_weight(64, 128, form)).named(MODULE)
    edit(tensors)
    folder = write_model(tmp_path, tensors, quantization_config=gptq_config(form))
    with pytest.raises(CheckpointError, match=message):
        open_checkpoint(folder)


def test_act_order_is_refused_at_opening(tmp_path: Path) -> None:
    form = Format(4, 32)
    tensors = to_gptq(rounded_weight(64, 128, form)).named(MODULE)
    config = gptq_config(form, desc_act=True)
    open_checkpoint(write_model(tmp_path / "trivial", tensors, quantization_config=config)).close()
    tensors[f"{MODULE}.g_idx"] = (torch.randperm(128) // 32).to(I32)
    with pytest.raises(CheckpointError, match="act-order"):
        open_checkpoint(write_model(tmp_path / "shuffled", tensors, quantization_config=config))


def test_packed_tensors_without_a_config_and_the_other_way_round(tmp_path: Path) -> None:
    form = Format(8, 32)
    packed = to_gptq(rounded_weight(64, 128, form)).named(MODULE)
    with pytest.raises(CheckpointError, match="says how they are packed"):
        open_checkpoint(write_model(tmp_path / "a", packed))
    with pytest.raises(CheckpointError, match="has no packed tensors"):
        open_checkpoint(
            write_model(tmp_path / "b", {f"{MODULE}.weight": torch.ones(2, 2)}, quantization_config=gptq_config(form))
        )
