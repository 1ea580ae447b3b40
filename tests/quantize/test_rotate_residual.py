"""A turned residual stream changes nothing before rounding: norms, biases, grouped queries, tied and untied heads."""

from __future__ import annotations

import json
import shutil
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import LlamaForCausalLM

from dibit.engine.checkpoint import CheckpointWriter, open_checkpoint
from dibit.engine.errors import ConfigError
from dibit.engine.models import resolve_arch
from dibit.engine.models.weights import check_names
from dibit.kernels.formats import QTensor, dequantize
from dibit.quantize import quantize_checkpoint
from dibit.quantize.rotate_residual import RotatedCheckpoint

EMBEDDING = "model.embed_tokens.weight"
TEXT: dict[str, Any] = {"samples": 8, "sequence_length": 40}


@pytest.fixture(scope="module")
def tied(tiny: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same model with its embedding as the head, in float16."""
    path = tmp_path_factory.mktemp("models") / "tied"
    shutil.copytree(tiny, path)
    tensors = {name: tensor.half() for name, tensor in load_file(tiny / "model.safetensors").items()}
    del tensors["lm_head.weight"]
    save_file(tensors, path / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((path / "config.json").read_text()) | {"tie_word_embeddings": True, "dtype": "float16"}
    (path / "config.json").write_text(json.dumps(config))
    return path


@pytest.fixture(params=["untied", "tied"])
def model(request: pytest.FixtureRequest, tiny: Path, tied: Path) -> Path:
    return tied if request.param == "tied" else tiny


@torch.no_grad()
def logits(path: Path, tokens: Tensor) -> Tensor:
    """By transformers, in float32."""
    found: Tensor = LlamaForCausalLM.from_pretrained(path, dtype=torch.float32).eval()(tokens).logits
    return found


def test_the_rotated_model_computes_the_same(model: Path, unseen: Tensor, tmp_path: Path) -> None:
    with closing(open_checkpoint(model)) as source:
        rotated = RotatedCheckpoint(source, seed=3)
        check_names(rotated, *resolve_arch(rotated.config))
        with closing(CheckpointWriter(tmp_path / "out", rotated)) as writer:
            for name in rotated.names():
                found = rotated.tensor(name)
                assert rotated.info(name).shape == tuple(found.shape)
                assert rotated.info(name).dtype == found.dtype
                assert rotated.export(name).dtype == source.export(name if source.has(name) else EMBEDDING).dtype
                writer.add_float(name, found)
            writer.finish()
        for name in ("model.layers.1.self_attn.v_proj.weight", "model.layers.0.mlp.down_proj.weight", EMBEDDING):
            old, new = source.tensor(name).float(), rotated.tensor(name)
            assert float((old - new).norm() / old.norm()) > 0.5
    before, after = logits(model, unseen), logits(tmp_path / "out", unseen)
    assert float((after - before).norm() / before.norm()) < 1e-5


def test_seeds_are_other_rotations(tiny: Path) -> None:
    with closing(open_checkpoint(tiny)) as source:
        first, again, other = (RotatedCheckpoint(source, seed=seed).tensor(EMBEDDING) for seed in (1, 1, 2))
        assert torch.equal(first, again)
        assert not torch.allclose(first, other, atol=0.01)


@pytest.mark.parametrize("method", ["rtn", "gptq", "awq"])
def test_a_rotated_model_is_quantized_like_any_other(
    model: Path, text: Path, unseen: Tensor, tmp_path: Path, method: str
) -> None:
    """At 8 bits it is the model that it was."""
    learns: dict[str, Any] = {} if method == "rtn" else {"calibration": text, **TEXT}
    options: dict[str, Any] = {"method": method, "group_size": 32, "rotate_residual": True, **learns}
    report = quantize_checkpoint(str(model), tmp_path / "out", bits=8, **options)
    assert report.options["rotate_residual"] is True
    config = json.loads((tmp_path / "out/config.json").read_text())
    assert config["tie_word_embeddings"] is False
    assert config["quantization_config"]["meta"]["rotate_residual"] is True
    floats = LlamaForCausalLM.from_pretrained(model, dtype=torch.float32).eval()
    with torch.no_grad():
        before = floats(unseen).logits
        after = served(tmp_path / "out", floats)(unseen).logits
    assert float((after - before).norm() / before.norm()) < 0.03


def served(path: Path, like: Any) -> Any:
    """transformers on the dequantized weights."""
    like.config.tie_word_embeddings = False
    model = LlamaForCausalLM(like.config).eval()
    with closing(open_checkpoint(path)) as checkpoint, torch.no_grad():
        for name, parameter in model.named_parameters():
            module, _, leaf = name.rpartition(".")
            found = checkpoint.linear(module) if leaf == "weight" and module in checkpoint.packed() else None
            parameter.copy_(dequantize(found) if isinstance(found, QTensor) else checkpoint.tensor(name).float())
    return model


def test_both_phases_of_efficientqat_take_it(tied: Path, text: Path, tmp_path: Path) -> None:
    from dibit.quantize.methods import make_method

    chosen = make_method("efficientqat", {"steps": 2, "end_steps": 2, "held_out": 0.25, "objective": "kl"})
    options: dict[str, Any] = {"bits": 2, "group_size": 32, "calibration": text, **TEXT}
    report = quantize_checkpoint(str(tied), tmp_path / "out", method=chosen, rotate_residual=True, **options)
    assert report.method == "efficientqat"
    with closing(open_checkpoint(tmp_path / "out")) as checkpoint:
        assert not torch.equal(checkpoint.tensor("lm_head.weight"), checkpoint.tensor(EMBEDDING))


def test_an_interrupted_run_is_continued_with_the_same_rotation_only(tiny: Path, text: Path, tmp_path: Path) -> None:
    def stop(done: int, total: int, note: str) -> None:
        if done == 1:
            raise KeyboardInterrupt

    options: dict[str, Any] = {"method": "gptq", "bits": 3, "group_size": 32, "calibration": text, **TEXT}
    quantize_checkpoint(str(tiny), tmp_path / "whole", rotate_residual=True, **options)
    with pytest.raises(KeyboardInterrupt):
        quantize_checkpoint(str(tiny), tmp_path / "out", rotate_residual=True, progress=stop, **options)
    with pytest.raises(ConfigError, match="rotate_residual: True then"):
        quantize_checkpoint(str(tiny), tmp_path / "out", **options)
    report = quantize_checkpoint(str(tiny), tmp_path / "out", rotate_residual=True, **options)
    assert report.resumed_blocks == 1
    assert (tmp_path / "out/model.safetensors").read_bytes() == (tmp_path / "whole/model.safetensors").read_bytes()
