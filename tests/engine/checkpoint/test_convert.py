"""Conversion: every pair of formats keeps every weight to the bit, and what a target cannot hold leaves no trace."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from checkpoint_files import (
    CONFIG,
    MODULE,
    gptq_config,
    random_qtensor,
    same_weight,
    write_gptq,
    write_json,
    write_model,
)
from packed_by_hand import efficientqat_parts

from dibit.engine.checkpoint import CheckpointWriter, open_checkpoint
from dibit.engine.checkpoint.convert import convert_checkpoint
from dibit.engine.checkpoint.dispatch import EXPORTS
from dibit.engine.checkpoint.packing import CannotHold
from dibit.engine.errors import CheckpointError, ConfigError
from dibit.kernels.formats import BITS, Format, QTensor

FLOATS = {
    "model.embed_tokens.weight": torch.randn(50, 64).bfloat16(),
    "model.layers.1.mlp.gate_proj.weight": torch.randn(64, 64).half(),
    f"{MODULE}.bias": torch.randn(64).half(),
}
META = {"quantizer": ["sometool:1.0"], "method": "gptq", "seed": 3, "damp": [1]}


def weights(form: Format) -> dict[str, QTensor]:
    names = (MODULE, "model.layers.0.mlp.down_proj", "model.layers.1.mlp.up_proj")
    return {name: random_qtensor(64, 128, form, low=1) for name in names}


def source(folder: Path, modules: dict[str, QTensor], **more: Any) -> Path:
    form = next(iter(modules.values())).format
    dynamic = {r"-:.*gate_proj": {}} | {
        f"+:{module}$": {"bits": q.format.bits, "group_size": q.format.group_size} for module, q in modules.items()
    }
    write_gptq(folder, modules, gptq_config(form, dynamic=dynamic, meta=META) | more, extra=FLOATS)
    write_json(folder / "tokenizer.json", {"version": "1.0"})
    return folder


def check(folder: Path, modules: dict[str, QTensor]) -> None:
    checkpoint = open_checkpoint(folder)
    assert set(checkpoint.packed()) == set(modules)
    for module, q in modules.items():
        assert same_weight(checkpoint.linear(module), q)
    for name, tensor in FLOATS.items():
        assert torch.equal(checkpoint.tensor(name), tensor)
    assert checkpoint.config | {"quantization_config": None} == CONFIG | {"quantization_config": None}
    assert checkpoint.has_tokenizer()
    checkpoint.close()


@pytest.mark.parametrize(("to", "bits"), [(to, bits) for to in EXPORTS for bits in BITS if to != "awq" or bits == 4])
@pytest.mark.parametrize("group_size", [-1, 32])
def test_there_and_back(tmp_path: Path, *, to: str, bits: int, group_size: int) -> None:
    modules = weights(Format(bits, group_size))
    told: list[tuple[int, int, str]] = []
    result = convert_checkpoint(
        source(tmp_path / "a", modules),
        tmp_path / "b",
        to=to,
        # Random codes do not tell how their zero points are stored.
        gptq_zero="v2",
        progress=lambda *step: told.append(step),
    )
    written = open_checkpoint(tmp_path / "b", gptq_zero="v1" if to == "gptq-v1" else "auto")
    assert all(same_weight(written.linear(module), q) for module, q in modules.items())
    written.close()
    zeros = "v1" if to == "gptq-v1" else "v2" if to == "gptq" else "auto"
    convert_checkpoint(tmp_path / "b", tmp_path / "c", to="compressed-tensors", gptq_zero=zeros)
    check(tmp_path / "c", modules)
    assert (result.packed, result.floats) == (3, 3)
    assert result.file_bytes == (tmp_path / "b" / "model.safetensors").stat().st_size
    assert result.target_format in result.text()
    assert [step[:2] for step in told] == [(0, 3), (1, 3), (2, 3), (3, 3)]
    assert not list(tmp_path.glob("*.partial"))


def test_mixed_formats(tmp_path: Path) -> None:
    modules = weights(Format(4, 32))
    modules["model.layers.1.mlp.up_proj"] = random_qtensor(96, 96, Format(2, 16), low=1)
    modules["model.layers.0.mlp.down_proj"] = random_qtensor(32, 256, Format(3, -1), low=1)
    convert_checkpoint(source(tmp_path / "a", modules), tmp_path / "b", to="compressed-tensors", gptq_zero="v2")
    check(tmp_path / "b", modules)
    with pytest.raises(CannotHold, match=r"has . bits; awq holds 4 only"):
        convert_checkpoint(tmp_path / "b", tmp_path / "c", to="awq")


def test_where_it_came_from_is_kept(tmp_path: Path) -> None:
    modules = weights(Format(4, 32))
    convert_checkpoint(source(tmp_path / "a", modules), tmp_path / "b", to="awq", gptq_zero="v2")
    config = json.loads((tmp_path / "b" / "config.json").read_text())["quantization_config"]
    assert config["modules_to_not_convert"] == ["model.layers.1.mlp.gate_proj"]
    assert config["meta"].pop("quantizer").startswith("dibit:")
    assert config["meta"] == {
        "method": "gptq",
        "seed": 3,
        "converted_from": "gptq (gptq_v2)",
        "source_quantizer": "sometool:1.0",
    }


def test_efficientqat_at_3_bits_becomes_gptq(tmp_path: Path) -> None:
    modules = weights(Format(3, 32))
    tensors = dict(FLOATS)
    for module, q in modules.items():
        tensors |= {f"{module}.{part}": tensor for part, tensor in efficientqat_parts(q).items()}
    write_json(write_model(tmp_path / "a", tensors) / "tokenizer.json", {})
    convert_checkpoint(tmp_path / "a", tmp_path / "b", to="gptq", gptq_zero="v2")
    written = open_checkpoint(tmp_path / "b", gptq_zero="v2")
    assert all(same_weight(written.linear(module), q) for module, q in modules.items())


def test_an_interrupted_run_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    modules = weights(Format(4, 32))
    folder = source(tmp_path / "a", modules)
    add = CheckpointWriter.add_quantized
    added: list[str] = []

    def killed(self: CheckpointWriter, module: str, q: QTensor) -> None:
        if len(added) == 1:
            raise KeyboardInterrupt
        added.append(module)
        add(self, module, q)
        self.flush()

    with monkeypatch.context() as patch:
        patch.setattr(CheckpointWriter, "add_quantized", killed)
        with pytest.raises(KeyboardInterrupt):
            convert_checkpoint(folder, tmp_path / "b", to="awq", gptq_zero="v2")
    assert not (tmp_path / "b").exists()
    with pytest.raises(CheckpointError, match="other settings"):
        convert_checkpoint(folder, tmp_path / "b", to="compressed-tensors", gptq_zero="v2")

    def counted(self: CheckpointWriter, module: str, q: QTensor) -> None:
        added.append(module)
        add(self, module, q)

    monkeypatch.setattr(CheckpointWriter, "add_quantized", counted)
    convert_checkpoint(folder, tmp_path / "b", to="awq", gptq_zero="v2")
    assert sorted(added) == sorted(modules)
    check(tmp_path / "b", modules)


def test_version_1_cannot_hold_a_zero_point_of_0(tmp_path: Path) -> None:
    modules = weights(Format(4, 32))
    modules["model.layers.1.mlp.up_proj"].zeros[5, 1] = 0
    folder = source(tmp_path / "a", modules)
    with pytest.raises(CannotHold, match=r"up_proj has zero points of 0.*write gptq_v2"):
        convert_checkpoint(folder, tmp_path / "b", to="gptq-v1", gptq_zero="v2")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a"]


def test_what_is_not_quantized_is_refused(tmp_path: Path) -> None:
    folder = write_model(tmp_path / "a", {"model.norm.weight": torch.ones(4)})
    with pytest.raises(CheckpointError, match="no quantized linears that could be converted; `dibit quantize`"):
        convert_checkpoint(folder, tmp_path / "b", to="awq")


def test_rounded_activations_are_refused(tmp_path: Path) -> None:
    folder = source(tmp_path / "a", weights(Format(4, 32)), activation_bits=8)
    with pytest.raises(CannotHold, match="rounds its activations to 8 bits, which awq cannot say"):
        convert_checkpoint(folder, tmp_path / "b", to="awq", gptq_zero="v2")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a"]


@pytest.mark.parametrize("to", EXPORTS)
def test_a_fractional_grid_is_refused(tmp_path: Path, to: str) -> None:
    from dibit.engine.checkpoint.dispatch import FRACTIONAL

    plain = open_checkpoint(write_model(tmp_path / "float", {"model.norm.weight": torch.ones(4)}))
    writer = CheckpointWriter(tmp_path / "a", plain, export=FRACTIONAL)
    writer.add_quantized(MODULE, random_qtensor(64, 128, Format(2, 64, zero_grid="fractional")))
    writer.finish()
    with pytest.raises(CannotHold, match=r"q_proj is int2-g64-fractional.*quantize the float model again"):
        convert_checkpoint(tmp_path / "a", tmp_path / "b", to=to)
    assert not list(tmp_path.glob("b*"))


def test_the_output_is_not_overwritten_unasked(tmp_path: Path) -> None:
    folder = source(tmp_path / "a", weights(Format(4, 32)))
    (tmp_path / "b").mkdir()
    write_json(tmp_path / "b" / "config.json", {})
    with pytest.raises(CheckpointError, match="--overwrite"):
        convert_checkpoint(folder, tmp_path / "b", to="awq", gptq_zero="v2")
    convert_checkpoint(folder, tmp_path / "b", to="awq", gptq_zero="v2", overwrite=True)
    # The source itself may be replaced: it is let go of only when the result is whole.
    convert_checkpoint(folder, folder, to="awq", gptq_zero="v2", overwrite=True)
    quantization = open_checkpoint(folder).quantization
    assert quantization is not None
    assert quantization.method == "awq"


def test_an_unknown_format(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="'gguf' is not known; supported: gptq, gptq-v1, awq, compressed-tensors"):
        convert_checkpoint(tmp_path, tmp_path / "b", to="gguf")
