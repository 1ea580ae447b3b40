"""The writer: what it writes reads back, a killed run goes on, and nothing half-written has the name of a whole."""

from __future__ import annotations

import errno
import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from checkpoint_files import random_qtensor, write_json, write_model
from safetensors.torch import load_file

from dibit.engine.checkpoint import Checkpoint, CheckpointWriter, open_checkpoint
from dibit.engine.checkpoint import shard_file as shard_file_module
from dibit.engine.checkpoint import writer as writer_module
from dibit.engine.checkpoint.progress import PROGRESS_NAME
from dibit.engine.errors import CheckpointError
from dibit.kernels.formats import Format, QTensor

FLOATS = {
    "model.embed_tokens.weight": torch.randn(50, 64).bfloat16(),
    "model.norm.weight": torch.randn(64),
    "model.layers.0.input_layernorm.weight": torch.randn(64).half(),
}
PROJECTIONS = ("self_attn.q_proj", "self_attn.k_proj", "mlp.up_proj", "mlp.down_proj")


@pytest.fixture
def source(tmp_path: Path) -> Iterator[Checkpoint]:
    folder = write_model(tmp_path / "source", {"model.norm.weight": torch.ones(4)}, torch_dtype="bfloat16")
    write_json(folder / "tokenizer.json", {"version": "1.0"})
    write_json(folder / "generation_config.json", {"eos_token_id": 2})
    checkpoint = open_checkpoint(folder)
    yield checkpoint
    checkpoint.close()


INT4 = Format(4, 32)


def layer(index: int, form: Format = INT4) -> dict[str, QTensor]:
    torch.manual_seed(index)
    return {f"model.layers.{index}.{name}": random_qtensor(64, 128, form) for name in PROJECTIONS}


def same(a: object, b: QTensor) -> bool:
    return (
        isinstance(a, QTensor)
        and a.format == b.format
        and torch.equal(a.codes, b.codes)
        and torch.equal(a.zeros, b.zeros)
        and torch.equal(a.scales.float(), b.scales.float())
    )


def add(writer: CheckpointWriter, modules: dict[str, QTensor]) -> None:
    for module, q in modules.items():
        writer.add_quantized(module, q)


def add_floats(writer: CheckpointWriter) -> None:
    for name, tensor in FLOATS.items():
        writer.add_float(name, tensor)


@pytest.mark.parametrize("max_shard_bytes", [1, 9000, 2_000_000_000])
def test_what_is_written_reads_back(tmp_path: Path, source: Checkpoint, max_shard_bytes: int) -> None:
    out = tmp_path / "deep" / "out"
    writer = CheckpointWriter(out, source, max_shard_bytes=max_shard_bytes)
    add_floats(writer)
    modules = layer(0) | layer(1) | layer(2) | layer(10)
    add(writer, layer(0))
    writer.flush()
    add(writer, layer(10) | layer(1))
    writer.flush()
    add(writer, layer(2))
    assert not out.exists()
    assert writer.finish(method="rtn", facts={"samples": 3}) == out
    assert not writer.directory.exists()
    checkpoint = open_checkpoint(out)
    for module, q in modules.items():
        assert same(checkpoint.linear(module), q)
    for name, tensor in FLOATS.items():
        assert torch.equal(checkpoint.tensor(name), tensor)
        assert checkpoint.tensor(name).dtype == tensor.dtype
    shards = sorted(out.glob("*.safetensors"))
    assert set(checkpoint.names()) == {name for shard in shards for name in load_file(shard)}
    if len(shards) > 1:
        index = json.loads((out / "model.safetensors.index.json").read_text())
        assert set(index["weight_map"]) == set(checkpoint.names())
        assert index["metadata"]["total_size"] == checkpoint.packed_bytes() + checkpoint.float_bytes()
        for shard in shards:
            tensors = load_file(shard)
            assert len(tensors) == 1 or sum(t.nbytes for t in tensors.values()) <= max_shard_bytes
    else:
        assert [shard.name for shard in shards] == ["model.safetensors"]
        assert not (out / "model.safetensors.index.json").exists()
    rest = {path.name for path in out.iterdir() if path.suffix != ".safetensors"}
    assert rest - {"model.safetensors.index.json"} == {
        "config.json",
        "quantize_config.json",
        "generation_config.json",
        "tokenizer.json",
    }


def test_the_configs(tmp_path: Path, source: Checkpoint) -> None:
    from transformers import AutoConfig

    writer = CheckpointWriter(tmp_path / "out", source)
    add_floats(writer)
    add(writer, layer(0))
    writer.finish(method="gptq", facts={"samples": 128})
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    quantization = config.pop("quantization_config")
    assert config == source.config
    assert quantization == json.loads((tmp_path / "out" / "quantize_config.json").read_text())
    meta = quantization.pop("meta")
    assert meta.pop("quantizer").startswith("dibit:")
    assert meta == {"method": "gptq", "samples": 128}
    assert quantization == {
        "quant_method": "gptq",
        "checkpoint_format": "gptq_v2",
        "bits": 4,
        "group_size": 32,
        "desc_act": False,
        "sym": False,
        "lm_head": False,
        "pack_dtype": "int32",
    }
    assert AutoConfig.from_pretrained(tmp_path / "out").quantization_config["bits"] == 4


def test_symmetric_is_what_the_zero_points_say(tmp_path: Path, source: Checkpoint) -> None:
    writer = CheckpointWriter(tmp_path / "out", source)
    modules = layer(0)
    for q in modules.values():
        q.zeros.fill_(8)
    add(writer, modules)
    checkpoint = open_checkpoint(writer.finish())
    assert checkpoint.quantization is not None
    assert checkpoint.quantization.symmetric


def test_mixed_formats_are_declared(tmp_path: Path, source: Checkpoint) -> None:
    modules = layer(0) | layer(1) | layer(2, Format(2, 16)) | layer(12, Format(2, 16)) | layer(3)
    modules["model.layers.3.mlp.up_proj"] = random_qtensor(32, 32, Format(3, -1))
    modules["lm_head"] = random_qtensor(64, 64, Format(8, 64))
    del modules["model.layers.1.mlp.up_proj"]
    writer = CheckpointWriter(tmp_path / "out", source)
    add(writer, modules)
    writer.add_float("model.layers.1.mlp.up_proj.weight", torch.ones(4, 4))
    checkpoint = open_checkpoint(writer.finish())
    assert checkpoint.quantization is not None
    for module, q in modules.items():
        assert checkpoint.quantization.format_of(module) == q.format, module
        assert same(checkpoint.linear(module), q)
    assert checkpoint.quantization.format_of("model.layers.1.mlp.up_proj") is None
    dynamic = json.loads((tmp_path / "out" / "quantize_config.json").read_text())["dynamic"]
    assert dynamic["+:model\\.layers\\.(?:2|12)\\."] == {"bits": 2, "group_size": 16}
    assert len(dynamic) == 4


def test_a_float_model_gets_no_quantization_config(tmp_path: Path, source: Checkpoint) -> None:
    writer = CheckpointWriter(tmp_path / "out", source)
    add_floats(writer)
    checkpoint = open_checkpoint(writer.finish())
    assert checkpoint.quantization is None
    assert not (checkpoint.path / "quantize_config.json").exists()


def test_a_killed_run_goes_on(tmp_path: Path, source: Checkpoint) -> None:
    out = tmp_path / "out"
    first = CheckpointWriter(out, source, settings={"bits": 4})
    add_floats(first)
    add(first, layer(0))
    first.flush()
    add(first, layer(1))
    first.close()
    (first.directory / "part-00007.safetensors").write_bytes(b"rubbish")
    (first.directory / "part-00001.safetensors.new").write_bytes(b"half")

    second = CheckpointWriter(out, source, settings={"bits": 4})
    assert all(second.has(name) for name in FLOATS)
    for module, q in layer(0).items():
        assert second.has_module(module)
        assert same(second.module(module), q)
    assert not any(second.has_module(module) for module in layer(1))
    add(second, layer(1))
    checkpoint = open_checkpoint(second.finish())
    for module, q in (layer(0) | layer(1)).items():
        assert same(checkpoint.linear(module), q)
    assert {p.name for p in out.glob("*.safetensors*")} == {"model.safetensors"}


def test_a_tensor_added_again_is_replaced(tmp_path: Path, source: Checkpoint) -> None:
    writer = CheckpointWriter(tmp_path / "out", source)
    add_floats(writer)
    add(writer, layer(0))
    writer.flush()
    module = "model.layers.0.mlp.up_proj"
    newer = random_qtensor(64, 128, Format(2, 64))
    writer.add_quantized(module, newer)
    assert same(writer.module(module), newer)
    writer.flush()
    assert same(writer.module(module), newer)
    checkpoint = open_checkpoint(writer.finish())
    assert same(checkpoint.linear(module), newer)


@pytest.mark.parametrize("damage", ["flip", "cut", "remove"])
def test_a_part_that_changed_is_made_again(tmp_path: Path, source: Checkpoint, damage: str) -> None:
    writer = CheckpointWriter(tmp_path / "out", source)
    add(writer, layer(0))
    writer.flush()
    add(writer, layer(1))
    writer.flush()
    writer.close()
    part = writer.directory / "part-00001.safetensors"
    data = bytearray(part.read_bytes())
    if damage == "remove":
        part.unlink()
    else:
        data[-100] ^= 1
        part.write_bytes(data if damage == "flip" else data[:-10])
    again = CheckpointWriter(tmp_path / "out", source)
    assert all(again.has_module(module) for module in layer(0))
    assert not any(again.has_module(module) for module in layer(1))
    again.close()


def test_other_settings_do_not_mix(tmp_path: Path, source: Checkpoint) -> None:
    writer = CheckpointWriter(tmp_path / "out", source, settings={"bits": 4})
    add(writer, layer(0))
    writer.flush()
    writer.close()
    with pytest.raises(CheckpointError, match="interrupted run with other settings"):
        CheckpointWriter(tmp_path / "out", source, settings={"bits": 3})


def test_two_runs_do_not_write_at_once(tmp_path: Path, source: Checkpoint) -> None:
    writer = CheckpointWriter(tmp_path / "out", source)
    with pytest.raises(CheckpointError, match="another run is writing"):
        CheckpointWriter(tmp_path / "out", source)
    writer.close()
    CheckpointWriter(tmp_path / "out", source).close()


class KilledError(BaseException):
    """Stands for the death of the process."""


def test_gathering_goes_on_after_a_kill(tmp_path: Path, source: Checkpoint, monkeypatch: pytest.MonkeyPatch) -> None:
    def begin() -> CheckpointWriter:
        return CheckpointWriter(tmp_path / "out", source, max_shard_bytes=9000)

    writer = begin()
    modules: dict[str, QTensor] = {}
    for i in range(4):
        add(writer, layer(i))
        modules |= layer(i)
        writer.flush()
    written: list[str] = []

    def dying(path: Path, *args: Any) -> int:
        if len(written) == 3:
            raise KilledError
        written.append(path.name)
        return shard_file_module.write_shard(path, *args)

    with monkeypatch.context() as patch:
        patch.setattr(writer_module, "write_shard", dying)
        with pytest.raises(KilledError):
            writer.finish()
    writer.close()
    assert not (tmp_path / "out").exists()
    again = begin()
    assert all(again.has_module(module) for module in modules)
    # A gathering that is continued with more to write than before gives other shards.
    add(again, layer(4))
    add_floats(again)
    checkpoint = open_checkpoint(again.finish())
    for module, q in (modules | layer(4)).items():
        assert same(checkpoint.linear(module), q)
    assert not list((tmp_path / "out").glob("part-*"))


@pytest.mark.parametrize("when", ["flush", "finish", "rename"])
def test_a_full_disk(tmp_path: Path, source: Checkpoint, monkeypatch: pytest.MonkeyPatch, when: str) -> None:
    out = tmp_path / "out"
    writer = CheckpointWriter(out, source)
    add(writer, layer(0))
    writer.flush()
    add(writer, layer(1))

    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        if when == "rename":
            patch.setattr(writer_module.shutil, "rmtree", full)
            patch.setattr(Path, "rename", full)
        else:
            patch.setattr(os, "fsync", full)
        with pytest.raises(CheckpointError, match="no space left on the disk"):
            writer.flush() if when == "flush" else writer.finish()
    assert not out.exists()
    assert not list(writer.directory.glob("*.new"))
    writer.close()
    again = CheckpointWriter(out, source)
    assert all(again.has_module(module) for module in layer(0))
    add(again, layer(1))
    assert same(
        open_checkpoint(again.finish()).linear("model.layers.1.mlp.up_proj"), layer(1)["model.layers.1.mlp.up_proj"]
    )


def test_scratch_files_are_not_part_of_the_result(tmp_path: Path, source: Checkpoint) -> None:
    writer = CheckpointWriter(tmp_path / "out", source)
    add(writer, layer(0))
    (writer.directory / "journal").write_text("x")
    (writer.directory / "report.json").write_text("{}")
    out = writer.finish(scratch=["journal"])
    assert {"journal", PROGRESS_NAME, "writer.lock"}.isdisjoint(p.name for p in out.iterdir())
    assert (out / "report.json").exists()


def test_an_output_that_exists(tmp_path: Path, source: Checkpoint) -> None:
    out = tmp_path / "out"
    out.mkdir()
    CheckpointWriter(out, source).close()
    (out / "note.txt").write_text("mine")
    with pytest.raises(CheckpointError, match="not empty"):
        CheckpointWriter(out, source)
    with pytest.raises(CheckpointError, match="holds no checkpoint"):
        CheckpointWriter(out, source, overwrite=True)
    with pytest.raises(CheckpointError, match="no directory"):
        CheckpointWriter(out / "note.txt", source)


def test_overwriting(tmp_path: Path, source: Checkpoint) -> None:
    for index in (0, 1):
        writer = CheckpointWriter(tmp_path / "out", source, overwrite=index == 1)
        add(writer, layer(index))
        writer.finish()
    checkpoint = open_checkpoint(tmp_path / "out")
    assert checkpoint.has("model.layers.1.mlp.up_proj.qweight")
    assert not checkpoint.has("model.layers.0.mlp.up_proj.qweight")
    assert {p.name for p in tmp_path.iterdir()} == {"out", "source"}


def test_large_additions_do_not_stay_in_memory(
    tmp_path: Path, source: Checkpoint, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(writer_module, "PART_BYTES", 5000)
    writer = CheckpointWriter(tmp_path / "out", source)
    add(writer, layer(0))
    assert len(list(writer.directory.glob("part-*.safetensors"))) >= 2
    add(writer, layer(1))
    checkpoint = open_checkpoint(writer.finish())
    for module, q in (layer(0) | layer(1)).items():
        assert same(checkpoint.linear(module), q)


def test_a_tokenizer_that_cannot_be_written_is_known_at_once(
    tmp_path: Path, source: Checkpoint, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(_: object, out: Path) -> None:
        raise CheckpointError(f"no tokenizer for {out}")

    monkeypatch.setattr(type(source), "write_tokenizer", refuse)
    with pytest.raises(CheckpointError, match="no tokenizer"):
        CheckpointWriter(tmp_path / "out", source)
