"""Directories in Hugging Face form: what is read, and what is refused with which words."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from checkpoint_files import (
    CONFIG,
    MODULE,
    raw_safetensors,
    write_json,
    write_model,
)
from safetensors.torch import save_file

from dibit.engine.checkpoint import open_checkpoint
from dibit.engine.checkpoint.safetensors_file import MAX_HEADER_BYTES
from dibit.engine.errors import CheckpointError

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
