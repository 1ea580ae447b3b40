"""The GPU bench: a machine without a GPU is told so; checks fail where kernels fail; on a GPU, they pass."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch

from dibit.kernels.triton import availability


def test_without_a_gpu_it_says_so_and_writes_nothing(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    reason = availability.unavailable()
    assert reason is not None
    done = subprocess.run(
        [sys.executable, "-c", "import torch; torch.cuda.is_available = lambda: False\n"
         "from dibit.bench.gpu import main; raise SystemExit(main(['--out', '/nowhere/x.json']))"],
        capture_output=True,
        text=True,
        check=False,
    )  # fmt: skip
    assert done.returncode == 2, done.stderr
    assert f"gpu: {reason}" in done.stderr


@pytest.mark.gpu
def test_every_kernel_passes_on_this_gpu() -> None:
    """In a process of its own: this one may have imported the kernels for the interpreter."""
    done = subprocess.run(
        [sys.executable, "-m", "dibit.bench.gpu", "--checks-only"], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
