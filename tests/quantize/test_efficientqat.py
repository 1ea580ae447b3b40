"""Both phases as one command: better than the first alone, one checkpoint at the end, and resumable in either."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest
import torch

from dibit.engine.checkpoint import open_checkpoint
from dibit.engine.errors import ConfigError
from dibit.kernels.formats import QTensor
from dibit.quantize import quantize_checkpoint
from dibit.quantize.methods import make_method
from dibit.quantize.methods.block_ap import BlockAP
from dibit.quantize.methods.efficientqat import EfficientQAT
from dibit.quantize.report import QuantizeReport

METHOD = EfficientQAT(start="rtn", steps=4, held_out=0.25, end_steps=6, end_scale_rate=0.02, end_norm_rate=0.01)


def run(model: Path, out: Path, text: Path, **changes: Any) -> QuantizeReport:
    options = {"method": METHOD, "bits": 2, "group_size": 32, "samples": 12, "sequence_length": 24, **changes}
    return quantize_checkpoint(str(model), out, calibration=text, **options)


@pytest.fixture(scope="module")
def whole(tiny: Path, text: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, QuantizeReport]:
    out = tmp_path_factory.mktemp("whole") / "out"
    return out, run(tiny, out, text)


def test_it_is_block_ap_with_other_step_sizes(
    tiny: Path, text: Path, whole: tuple[Path, QuantizeReport], tmp_path: Path
) -> None:
    out, report = whole
    run(tiny, tmp_path / "first", text, method=METHOD.blocks())
    first, both = open_checkpoint(tmp_path / "first"), open_checkpoint(out)
    module = "model.layers.1.mlp.up_proj"
    before, after = first.linear(module), both.linear(module)
    assert isinstance(before, QTensor)
    assert isinstance(after, QTensor)
    assert torch.equal(before.codes, after.codes)
    assert not torch.equal(before.scales, after.scales)
    assert report == QuantizeReport.read(out)
    assert (report.method, report.out, report.model) == ("efficientqat", str(out), str(tiny))
    assert report.stages[-1].name == "end to end"
    assert "divergence from the float model" in report.summary()
    assert (out / "finetune_report.json").exists()
    assert (out / "quantize_report.html").exists()
    assert both.config["quantization_config"]["meta"]["method"] == "efficientqat"
    assert [path.name for path in out.parent.iterdir()] == ["out"]


@pytest.mark.parametrize("where", ["step 3 of 4", "end to end, step 5 of 6"])
def test_an_interrupted_run_continues_in_its_phase(
    tiny: Path, text: Path, whole: tuple[Path, QuantizeReport], tmp_path: Path, where: str
) -> None:
    def stop(done: int, total: int, note: str) -> None:
        heard.append(note)
        if where in note and (done == 1 or "end" in where):
            raise KeyboardInterrupt

    heard: list[str] = []
    with pytest.raises(KeyboardInterrupt):
        run(tiny, tmp_path / "out", text, progress=stop)
    assert not (tmp_path / "out").exists()
    with pytest.raises(ConfigError, match="options: "):
        run(tiny, tmp_path / "out", text, method=dataclasses.replace(METHOD, steps=5))
    heard.clear()
    where = "never"
    run(tiny, tmp_path / "out", text, progress=stop)
    assert any("layers.0, step" in note for note in heard) is False
    for file in whole[0].glob("*.safetensors"):
        assert (tmp_path / "out" / file.name).read_bytes() == file.read_bytes()
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_somebody_elses_directory_is_not_taken(tiny: Path, text: Path, tmp_path: Path) -> None:
    (tmp_path / "out.blocks").mkdir()
    with pytest.raises(ConfigError, match="in the way"):
        run(tiny, tmp_path / "out", text)


def test_options_reach_their_phase() -> None:
    method = make_method("efficientqat", {"steps": 7, "end_steps": 9, "objective": "ce"})
    assert isinstance(method, EfficientQAT)
    assert method.blocks() == BlockAP(steps=7)
    assert (method.end_to_end().steps, method.end_to_end().objective) == (9, "ce")
    with pytest.raises(ConfigError, match="objective"):
        EfficientQAT(objective="mse")
    with pytest.raises(ConfigError, match="start"):
        EfficientQAT(start="awq")
