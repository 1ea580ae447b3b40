"""`dibit convert` as a person meets it."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from checkpoint_files import MODULE, gptq_config, rounded_weight, write_gptq

from dibit.engine.checkpoint.inspect import inspect_checkpoint
from dibit.kernels.formats import Format
from dibit.server.cli import main

Run = Callable[..., tuple[int, str, str]]


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Run:
    monkeypatch.setenv("OMP_WAIT_POLICY", "PASSIVE")

    def call(*words: object) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["dibit", *map(str, words)])
        with pytest.raises(SystemExit) as left:
            main()
        printed = capsys.readouterr()
        return int(left.value.code or 0), printed.out, printed.err

    return call


@pytest.fixture
def low_bit(tmp_path: Path) -> Path:
    form = Format(4, 32)
    return write_gptq(tmp_path / "low", {MODULE: rounded_weight(64, 128, form)}, gptq_config(form))


def test_a_conversion(run: Run, low_bit: Path, tmp_path: Path) -> None:
    status, out, err = run("convert", low_bit, "--to", "awq", "--out", tmp_path / "out", "--json", tmp_path / "c.json")
    assert (status, "linear 1/1" in err) == (0, True)
    assert "1 quantized linears of low (gptq int4-g32) as awq" in out
    assert json.loads((tmp_path / "c.json").read_text())["packed"] == 1
    summary = inspect_checkpoint(tmp_path / "out")
    assert summary.quantization == "awq int4-g32, asymmetric, labelled gemm"
    assert summary.parameters == 64 * 128
    assert summary.bits_per_weight == 4 + 20 / 32


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--to", "gguf"], "'gguf' is not known; supported: gptq, gptq-v1, awq, compressed-tensors"),
        (["--to", "awq", "--gptq-zero", "v3"], "'v3'; supported: auto, v1, v2"),
        ([], "--to"),
    ],
)
def test_mistakes(run: Run, low_bit: Path, tmp_path: Path, words: list[str], message: str) -> None:
    status, _, err = run("convert", low_bit, "--out", tmp_path / "out", *words)
    assert (status, message in err) == (2, True)
    assert [path.name for path in tmp_path.iterdir()] == ["low"]
