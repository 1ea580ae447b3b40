"""dibit's own format for fractional zero points, and the width of activations in a config: exact, and never misread."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from checkpoint_files import random_qtensor, write_json, write_model

from dibit.engine.checkpoint import Checkpoint, CheckpointWriter, open_checkpoint
from dibit.engine.checkpoint.dispatch import FRACTIONAL
from dibit.engine.checkpoint.inspect import inspect_checkpoint
from dibit.engine.checkpoint.packing import CannotHold
from dibit.engine.checkpoint.quantization_config import parse_quantization
from dibit.engine.errors import CheckpointError
from dibit.kernels.formats import Format, QTensor, dequantize

TWO, THREE, FOUR = Format(2, 32, "fractional"), Format(3, 32, "fractional"), Format(4, 32)
MODULES = {
    "model.layers.0.self_attn.q_proj": TWO,
    "model.layers.0.mlp.down_proj": TWO,
    "model.layers.1.self_attn.q_proj": FOUR,
    "model.layers.1.mlp.down_proj": THREE,
}


@pytest.fixture
def source(tmp_path: Path) -> Iterator[Checkpoint]:
    folder = write_model(tmp_path / "source", {"model.norm.weight": torch.ones(4)}, torch_dtype="bfloat16")
    write_json(folder / "tokenizer.json", {"version": "1.0"})
    checkpoint = open_checkpoint(folder)
    yield checkpoint
    checkpoint.close()


def written(source: Checkpoint, out: Path, **facts: Any) -> dict[str, QTensor]:
    weights = {module: random_qtensor(64, 128, form) for module, form in MODULES.items()}
    writer = CheckpointWriter(out, source, export=FRACTIONAL)
    for module, q in weights.items():
        writer.add_quantized(module, q)
        assert torch.equal(dequantize(writer.module(module)), dequantize(q))
    writer.add_float("model.norm.weight", torch.ones(4))
    writer.finish(**facts)
    return weights


def test_every_field_comes_back_under_its_own_grid(source: Checkpoint, tmp_path: Path) -> None:
    weights = written(source, tmp_path / "out", activation_bits=4)
    found = open_checkpoint(tmp_path / "out")
    for module, q in weights.items():
        back = found.linear(module)
        assert isinstance(back, QTensor)
        assert back.format == q.format == found.linear_format(module)
        assert torch.equal(back.codes, q.codes)
        assert torch.equal(back.zeros, q.zeros)
        assert torch.equal(dequantize(back), dequantize(q))
    assert found.quantization is not None
    assert found.quantization.activation_bits == 4
    assert found.zero_decision() is None
    found.close()
    text = inspect_checkpoint(tmp_path / "out").text()
    assert "int2-g32-fractional" in text
    assert "activations     4 bits" in text


def test_a_run_that_was_killed_goes_on(source: Checkpoint, tmp_path: Path) -> None:
    module, q = "model.layers.0.mlp.down_proj", random_qtensor(64, 128, THREE)
    writer = CheckpointWriter(tmp_path / "out", source, export=FRACTIONAL)
    writer.add_quantized(module, q)
    writer.flush()
    writer.close()
    again = CheckpointWriter(tmp_path / "out", source, export=FRACTIONAL)
    assert again.module(module).format == THREE
    assert torch.equal(dequantize(again.module(module)), dequantize(q))
    again.close()


def test_other_tools_find_a_method_that_they_do_not_know(source: Checkpoint, tmp_path: Path) -> None:
    written(source, tmp_path / "out")
    config = json.loads((tmp_path / "out" / "config.json").read_text())["quantization_config"]
    assert (config["quant_method"], config["checkpoint_format"]) == ("dibit", "dibit")
    assert (config["zero_grid"], config["bits"], "activation_bits" in config) == ("fractional", 2, False)
    assert sorted(rule.get("zero_grid", "-") for rule in config["dynamic"].values()) == ["-", "integer"]
    assert not (tmp_path / "out" / "quantize_config.json").exists()
    with pytest.raises(CheckpointError, match="quant_method 'dibit'"):
        parse_quantization(config, "config.json")


def test_gptq_never_holds_fractions(source: Checkpoint, tmp_path: Path) -> None:
    writer = CheckpointWriter(tmp_path / "out", source)
    with pytest.raises(CannotHold, match="whole zero points"):
        writer.add_quantized("model.layers.0.mlp.down_proj", random_qtensor(64, 128, TWO))
    writer.close()


def change(folder: Path, **changed: Any) -> None:
    config = json.loads((folder / "config.json").read_text())
    config["quantization_config"] |= changed
    write_json(folder / "config.json", config)


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"checkpoint_format": "gptq_v2"}, "another version of dibit"),
        ({"zero_grid": None}, "zero_grid None; supported: integer, fractional"),
        ({"zero_grid": "halves"}, "zero_grid 'halves'"),
        ({"bits": 4}, "fractional zero points at 4 bits"),
        ({"dynamic": {"+:model.layers.1": {"bits": 4}}}, "fractional zero points at 4 bits"),
        ({"activation_bits": 5}, "activation_bits 5; supported: 4, 6, 8"),
        ({"activation_bits": True}, "activation_bits True"),
        ({"quant_method": "gptq", "checkpoint_format": "gptq_v2"}, "only quant_method dibit has others"),
    ],
)
def test_configs_that_are_not_whole_are_refused(
    source: Checkpoint, tmp_path: Path, changed: dict[str, Any], message: str
) -> None:
    written(source, tmp_path / "out")
    change(tmp_path / "out", **changed)
    with pytest.raises(CheckpointError, match=message):
        open_checkpoint(tmp_path / "out")


def test_an_entry_of_a_gptq_config_cannot_smuggle_a_grid_in() -> None:
    raw = {"quant_method": "gptq", "bits": 4, "group_size": 32, "sym": False}
    raw["dynamic"] = {"+:model.layers.1": {"bits": 2, "zero_grid": "fractional"}}
    with pytest.raises(CheckpointError, match=r"dynamic .*zero_grid 'fractional'"):
        parse_quantization(raw, "config.json")


def test_gptq_configs_may_tell_the_width_of_activations() -> None:
    raw = {"quant_method": "gptq", "bits": 4, "group_size": 32, "sym": False}
    assert parse_quantization(raw, "config.json").activation_bits is None
    assert parse_quantization(raw | {"activation_bits": 8}, "config.json").activation_bits == 8
