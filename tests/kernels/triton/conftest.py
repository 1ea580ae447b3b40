"""Runs the Triton kernels in Triton's interpreter.

Triton decides as it and the kernels are imported, so both are imported here, before any test, with TRITON_INTERPRET
set for that moment only. What must be compiled (test_report.py) runs in a process of its own.
"""

from __future__ import annotations

import os
import sys

import pytest

if "triton" in sys.modules:
    raise RuntimeError("triton was imported before its tests could choose the interpreter")
os.environ["TRITON_INTERPRET"] = "1"
try:
    import dibit.kernels.triton.attention
    import dibit.kernels.triton.qlinear
    import dibit.kernels.triton.small  # noqa: F401
finally:
    del os.environ["TRITON_INTERPRET"]


@pytest.fixture(autouse=True)
def interpreter(monkeypatch: pytest.MonkeyPatch) -> None:
    """Kernels look the switch up again when they are called."""
    monkeypatch.setenv("TRITON_INTERPRET", "1")
