"""`dibit kernels`: what it refuses. What it prints is checked in tests/kernels/triton/test_report.py."""

from __future__ import annotations

import importlib.util

import pytest
import torch

from dibit.engine.errors import ConfigError
from dibit.server.cli_kernels import kernels_report, kernels_tune


def test_a_gpu_without_figures_is_refused() -> None:
    if importlib.util.find_spec("triton") is None:
        pytest.skip("triton is not installed")
    with pytest.raises(ConfigError, match="no figures for a GPU called gtx 1080; supported: RTX 3060"):
        kernels_report(gpu=["GTX 1080", "A100"])


def test_the_interpreter_cannot_compile(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    with pytest.raises(ConfigError, match=r"cannot be compiled here: .*(unset it|needs the triton package)"):
        kernels_report()


def test_tuning_needs_a_gpu() -> None:
    if torch.cuda.is_available():
        pytest.skip("there is one")
    with pytest.raises(ConfigError, match="nothing to measure on: the triton backend needs"):
        kernels_tune("demo")
