"""The thread pool's one dangerous moment, at which chance would arrive once in a million ranges."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import pytest

HERE = Path(__file__).parent
CSRC = HERE.parents[1] / "kernels" / "csrc"


def test_a_late_thread_takes_no_piece_of_a_range_that_is_being_written(tmp_path: Path) -> None:
    compiler = shutil.which("c++") or shutil.which("g++")
    if compiler is None:
        pytest.skip("no C++ compiler")
    if not CSRC.is_dir():
        pytest.skip("no sources of the C++ kernels")
    program = tmp_path / "pool_race"
    flags = ["-std=c++17", "-O1", "-pthread", f"-I{CSRC}"]
    subprocess.run([compiler, *flags, str(HERE / "pool_race.cpp"), "-o", str(program)], check=True, timeout=120)
    try:
        done = subprocess.run([program], capture_output=True, text=True, timeout=30, check=False)
    except subprocess.TimeoutExpired:
        pytest.fail("a piece was counted twice, and the caller waits for ever")
    assert (done.stdout.strip(), done.returncode) == ("once", 0)
