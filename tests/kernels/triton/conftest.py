"""Runs the Triton kernels in Triton's interpreter.

Triton decides as it and the kernels are imported, so both are imported here, before any test, with TRITON_INTERPRET
set for that moment only. What must be compiled (test_report.py) runs in a process of its own. `make test` installs
Triton; without it these tests are left out.
"""

from __future__ import annotations

import importlib.util
import os
import sys

import pytest

if "triton" in sys.modules:
    raise RuntimeError("triton was imported before its tests could choose the interpreter")
if importlib.util.find_spec("triton") is None:
    collect_ignore_glob = ["test_*.py"]
else:
    os.environ["TRITON_INTERPRET"] = "1"
    try:
        import dibit.kernels.triton.attention
        import dibit.kernels.triton.decode
        import dibit.kernels.triton.fused
        import dibit.kernels.triton.head_norm
        import dibit.kernels.triton.qlinear
        import dibit.kernels.triton.sampling
        import dibit.kernels.triton.small  # noqa: F401
    finally:
        del os.environ["TRITON_INTERPRET"]


@pytest.fixture(autouse=True)
def interpreter(monkeypatch: pytest.MonkeyPatch) -> None:
    """Kernels look the switch up again when they are called."""
    monkeypatch.setenv("TRITON_INTERPRET", "1")
