"""What `quantize_checkpoint` refuses, and that it leaves nothing behind."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import LlamaForCausalLM

from dibit.engine.errors import CheckpointError, ConfigError, UserError
from dibit.quantize import quantize_checkpoint


class TestRefusals:
    """All before anything is computed or written."""

    @pytest.fixture(autouse=True)
    def nothing_is_written(self, tmp_path: Path) -> Any:
        before = sorted(tmp_path.rglob("*"))
        yield
        assert [path for path in sorted(tmp_path.rglob("*")) if path not in before and "given" not in path.parts] == []

    def test_group_size_that_does_not_divide(self, tiny: Path, tmp_path: Path) -> None:
        with pytest.raises(ConfigError, match="group sizes that work there: -1, 16, 32 "):
            quantize_checkpoint(str(tiny), tmp_path / "out", group_size=64)

    def test_bits_and_group_size_out_of_range(self, tiny: Path, tmp_path: Path) -> None:
        with pytest.raises(ConfigError, match="5 bits"):
            quantize_checkpoint(str(tiny), tmp_path / "out", bits=5)
        with pytest.raises(ConfigError, match="group size 7"):
            quantize_checkpoint(str(tiny), tmp_path / "out", group_size=7)

    def test_calibration_missing_or_not_wanted(self, tiny: Path, text: Path, tmp_path: Path) -> None:
        with pytest.raises(ConfigError, match="give a plain text file"):
            quantize_checkpoint(str(tiny), tmp_path / "out", method="gptq", group_size=32)
        with pytest.raises(ConfigError, match="does not look at any text"):
            quantize_checkpoint(str(tiny), tmp_path / "out", method="rtn", group_size=32, calibration=text)

    def test_too_little_text_and_too_long_sequences(self, tiny: Path, text: Path, tmp_path: Path) -> None:
        options: dict[str, Any] = {"method": "gptq", "group_size": 16, "calibration": text}
        with pytest.raises(ConfigError, match="1200 tokens"):
            quantize_checkpoint(str(tiny), tmp_path / "out", samples=100, sequence_length=40, **options)
        with pytest.raises(ConfigError, match="64 positions"):
            quantize_checkpoint(str(tiny), tmp_path / "out", samples=1, sequence_length=65, **options)

    def test_unknown_method(self, tiny: Path, tmp_path: Path) -> None:
        with pytest.raises(ConfigError, match="supported: rtn, gptq"):
            quantize_checkpoint(str(tiny), tmp_path / "out", method="magic")

    def test_no_model(self, tmp_path: Path) -> None:
        with pytest.raises(CheckpointError):
            quantize_checkpoint(str(tmp_path / "none"), tmp_path / "out")

    def test_a_quantized_model(self, tiny: Path, tmp_path: Path) -> None:
        given = tmp_path / "given"
        quantize_checkpoint(str(tiny), given, group_size=32)
        with pytest.raises(CheckpointError, match="quantized already"):
            quantize_checkpoint(str(given), tmp_path / "out", group_size=32)

    def test_out_exists(self, tiny: Path, tmp_path: Path) -> None:
        given = tmp_path / "given"
        given.mkdir()
        (given / "precious.txt").write_text("kept")
        with pytest.raises(UserError, match="exists"):
            quantize_checkpoint(str(tiny), given, group_size=32)
        assert (given / "precious.txt").read_text() == "kept"


def test_a_weight_that_is_not_finite_is_named(tiny: Path, tmp_path: Path) -> None:
    model = LlamaForCausalLM.from_pretrained(tiny, dtype=torch.float32)
    with torch.no_grad():
        model.get_submodule("model.layers.1.mlp.up_proj").weight[3, 5] = float("nan")
    broken = tmp_path / "broken"
    model.save_pretrained(broken)
    for file in tiny.glob("tokenizer*"):
        (broken / file.name).write_bytes(file.read_bytes())
    with pytest.raises(CheckpointError, match=r"layers\.1\.gate_up is not finite"):
        quantize_checkpoint(str(broken), tmp_path / "out", group_size=32)
    assert not (tmp_path / "out").exists()
