"""Directories in Hugging Face form: what is read, and what is refused with which words."""

from __future__ import annotations

import json
import logging
import os
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
    raw_safetensors,
    rounded_weight,
    write_gptq,
    write_json,
    write_model,
)
from safetensors.torch import save_file

from dibit.engine.checkpoint import open_checkpoint
from dibit.engine.checkpoint.gptq import to_gptq
from dibit.engine.checkpoint.safetensors_file import MAX_HEADER_BYTES
from dibit.engine.errors import CheckpointError
from dibit.kernels.formats import BITS, Format, QTensor

W = f"{MODULE}.weight"


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_single_file(tmp_path: Path, dtype: torch.dtype) -> None:
    tensors = {W: torch.randn(5, 7).to(dtype), "model.norm.weight": torch.randn(7).to(dtype), "s": torch.tensor(1.0)}
    checkpoint = open_checkpoint(write_model(tmp_path / "m", tensors))
    assert set(checkpoint.names()) == set(tensors)
    for name, tensor in tensors.items():
        assert torch.equal(checkpoint.tensor(name), tensor)
        assert checkpoint.tensor(name).dtype == tensor.dtype
        assert checkpoint.info(name).shape == tuple(tensor.shape)
        assert checkpoint.info(name).nbytes == tensor.nbytes
    assert checkpoint.linear_format(MODULE) is None
    weight = checkpoint.linear(MODULE)
    assert isinstance(weight, torch.Tensor)
    assert torch.equal(weight, tensors[W])
    assert checkpoint.quantization is None
    assert checkpoint.zero_decision() is None
    assert (checkpoint.packed_bytes(), checkpoint.float_bytes()) == (0, sum(t.nbytes for t in tensors.values()))
    assert checkpoint.name == "m"
    checkpoint.close()


def test_tensors_are_memory_of_their_own(tmp_path: Path) -> None:
    checkpoint = open_checkpoint(write_model(tmp_path, {W: torch.ones(4, 4)}))
    checkpoint.tensor(W).zero_()
    assert bool((checkpoint.tensor(W) == 1).all())


def sharded(folder: Path, **replaced: Any) -> Path:
    folder.mkdir(exist_ok=True)
    write_json(folder / "config.json", CONFIG)
    save_file({"a": torch.ones(3)}, folder / "model-00001-of-00002.safetensors")
    save_file({"b": torch.full((2,), 2.0), "c": torch.zeros(1)}, folder / "model-00002-of-00002.safetensors")
    weight_map = {
        "a": "model-00001-of-00002.safetensors",
        "b": "model-00002-of-00002.safetensors",
        "c": "model-00002-of-00002.safetensors",
    }
    write_json(folder / "model.safetensors.index.json", {"weight_map": weight_map | replaced})
    return folder


def test_shards(tmp_path: Path) -> None:
    checkpoint = open_checkpoint(sharded(tmp_path))
    assert list(checkpoint.names()) == ["a", "b", "c"]
    assert checkpoint.tensor("b").tolist() == [2.0, 2.0]


def test_a_missing_shard_is_named(tmp_path: Path) -> None:
    (sharded(tmp_path) / "model-00002-of-00002.safetensors").unlink()
    with pytest.raises(CheckpointError, match="lacks the shard model-00002-of-00002"):
        open_checkpoint(tmp_path)


def test_a_tensor_that_only_the_index_knows(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="do not have, such as d in"):
        open_checkpoint(sharded(tmp_path, d="model-00001-of-00002.safetensors"))


@pytest.mark.parametrize("shard", ["../outside.safetensors", "/etc/passwd", "pytorch_model-00001.bin"])
def test_an_index_may_not_point_elsewhere(tmp_path: Path, shard: str) -> None:
    with pytest.raises(CheckpointError, match="beside it"):
        open_checkpoint(sharded(tmp_path, d=shard))


def test_shards_without_an_index(tmp_path: Path) -> None:
    (sharded(tmp_path) / "model.safetensors.index.json").unlink()
    with pytest.raises(CheckpointError, match=r"2 \.safetensors files and no"):
        open_checkpoint(tmp_path)


def entry(dtype: str = "F32", shape: object = (2,), offsets: object = (0, 8)) -> dict[str, object]:
    return {"dtype": dtype, "shape": shape, "data_offsets": offsets}


DEEP = b'{"a":' * 100_000 + b"1" + b"}" * 100_000
BROKEN: dict[str, tuple[bytes, str]] = {
    "empty": (b"", "cut short"),
    "shorter-than-its-prefix": (b"\x00\x00\x00", "cut short"),
    "header-cut": (raw_safetensors({"a": entry()})[:20], "cut short"),
    "header-huge": (raw_safetensors({}, length=MAX_HEADER_BYTES + 1), "at most"),
    "header-absurd": (raw_safetensors({}, length=(1 << 64) - 1), "at most"),
    "header-longer-than-file": (raw_safetensors({}, length=1000), "cut short"),
    "no-json": (raw_safetensors(b"{broken"), "not valid JSON"),
    "no-utf8": (raw_safetensors(b'{"\xff": 1}'), "UTF-8"),
    "no-object": (raw_safetensors([1]), "expected an object"),
    "too-deep": (raw_safetensors(DEEP), "nested too deeply"),
    "same-name-twice": (raw_safetensors(b'{"a": 1, "a": 2}'), "twice"),
    "entry-no-object": (raw_safetensors({"a": 3}), "not described"),
    "entry-incomplete": (raw_safetensors({"a": {"dtype": "F32"}}), "not described"),
    "unknown-type": (raw_safetensors({"a": entry("F8_E4M3")}, bytes(8)), "type 'F8_E4M3'"),
    "negative-shape": (raw_safetensors({"a": entry(shape=[-2])}, bytes(8)), "damaged"),
    "float-shape": (raw_safetensors({"a": entry(shape=[2.0])}, bytes(8)), "damaged"),
    "bool-shape": (raw_safetensors({"a": entry(shape=[True])}, bytes(8)), "damaged"),
    "three-offsets": (raw_safetensors({"a": entry(offsets=[0, 4, 8])}, bytes(8)), "damaged"),
    "size-differs": (raw_safetensors({"a": entry(shape=[3])}, bytes(8)), "12 bytes, but its offsets span 8"),
    "backwards": (raw_safetensors({"a": entry(offsets=[8, 0])}, bytes(8)), "offsets span -8"),
    "overlap": (raw_safetensors({"a": entry(), "b": entry(offsets=[4, 12])}, bytes(12)), "overlaps"),
    "hole": (raw_safetensors({"a": entry(), "b": entry(offsets=[12, 20])}, bytes(20)), "hole"),
    "not-from-start": (raw_safetensors({"a": entry(offsets=[4, 12])}, bytes(12)), "hole"),
    "outside": (raw_safetensors({"a": entry()}, bytes(7)), "cut short"),
    "trailing-bytes": (raw_safetensors({"a": entry()}, bytes(9)), "after its last tensor"),
    "product-overflow": (raw_safetensors({"a": entry(shape=[1 << 40, 1 << 40])}, bytes(8)), "offsets span"),
    "nothing": (raw_safetensors({}), "no tensors"),
}


@pytest.mark.parametrize("case", BROKEN)
def test_a_broken_file_is_refused(tmp_path: Path, case: str) -> None:
    data, message = BROKEN[case]
    write_json(tmp_path / "config.json", CONFIG)
    (tmp_path / "model.safetensors").write_bytes(data)
    open_files = len(os.listdir("/proc/self/fd"))
    with pytest.raises(CheckpointError, match=message):
        open_checkpoint(tmp_path)
    assert len(os.listdir("/proc/self/fd")) == open_files


def test_every_truncation_is_noticed(tmp_path: Path) -> None:
    write_model(tmp_path, {"a": torch.ones(3), "b": torch.ones(2)})
    file = tmp_path / "model.safetensors"
    whole = file.read_bytes()
    for size in range(len(whole)):
        file.write_bytes(whole[:size])
        with pytest.raises(CheckpointError):
            open_checkpoint(tmp_path)


def test_a_file_that_shrinks_after_opening(tmp_path: Path) -> None:
    checkpoint = open_checkpoint(write_model(tmp_path, {W: torch.ones(64, 64)}))
    os.truncate(tmp_path / "model.safetensors", 1000)
    with pytest.raises(CheckpointError, match="bytes early"):
        checkpoint.tensor(W)


def remove_config(folder: Path) -> None:
    (folder / "config.json").unlink()


def break_config(folder: Path) -> None:
    (folder / "config.json").write_text("{")


def adapter(folder: Path) -> None:
    (folder / "config.json").rename(folder / "adapter_config.json")


def pickle_only(folder: Path) -> None:
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")


def no_weights(folder: Path) -> None:
    (folder / "model.safetensors").unlink()


def empty_index(folder: Path) -> None:
    no_weights(folder)
    write_json(folder / "model.safetensors.index.json", {"weight_map": {}})


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (remove_config, r"no config\.json"),
        (break_config, "not valid JSON"),
        (adapter, "merge it into its base model"),
        (pickle_only, "a pickle.*safe_serialization"),
        (no_weights, r"no \.safetensors files"),
        (empty_index, "no weight_map"),
    ],
)
def test_a_directory_that_is_no_model(tmp_path: Path, damage: Callable[[Path], None], message: str) -> None:
    damage(write_model(tmp_path, {W: torch.ones(2, 2)}))
    with pytest.raises(CheckpointError, match=message):
        open_checkpoint(tmp_path)


def test_no_such_tensor(tmp_path: Path) -> None:
    checkpoint = open_checkpoint(write_model(tmp_path, {W: torch.ones(2, 2)}))
    for read in (checkpoint.tensor, checkpoint.info, checkpoint.linear, checkpoint.linear_format):
        with pytest.raises(CheckpointError, match=r"has no tensor nowhere"):
            read("nowhere")


def test_integers_are_no_weights(tmp_path: Path) -> None:
    checkpoint = open_checkpoint(write_model(tmp_path, {W: torch.ones(2, 2, dtype=torch.int32)}))
    with pytest.raises(CheckpointError, match="I32; expected"):
        checkpoint.tensor(W)


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
        open_checkpoint(write_model(tmp_path / "b", {W: torch.ones(2, 2)}, quantization_config=gptq_config(form)))


def test_tokenizer_files_are_copied(tmp_path: Path) -> None:
    folder = write_model(tmp_path / "m", {W: torch.ones(2, 2)})
    checkpoint = open_checkpoint(folder)
    assert not checkpoint.has_tokenizer()
    assert not checkpoint.has_chat_template()
    write_json(folder / "tokenizer.json", {"version": "1.0"})
    write_json(folder / "tokenizer_config.json", {"chat_template": "{{ messages }}"})
    write_json(folder / "generation_config.json", {"eos_token_id": [1, 2]})
    (folder / "modeling_evil.py").write_text("raise SystemExit")
    assert checkpoint.has_tokenizer()
    assert checkpoint.has_chat_template()
    out = tmp_path / "out"
    out.mkdir()
    checkpoint.write_tokenizer(out)
    assert sorted(p.name for p in out.iterdir()) == [
        "generation_config.json",
        "tokenizer.json",
        "tokenizer_config.json",
    ]
    assert json.loads((out / "generation_config.json").read_text()) == {"eos_token_id": [1, 2]}
