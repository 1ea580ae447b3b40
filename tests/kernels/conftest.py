"""Fixtures for the C++ kernels: which build and instruction sets are tried here, and putting threads and ISA back."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from dibit.kernels import native

ISAS = ("portable", "avx2", "avx512", "amx")

# Another build of the kernels, such as that of `make sanitize`. Before anything loads the library.
if "DIBIT_TEST_LIBRARY" in os.environ:
    native.LIBRARY = Path(os.environ["DIBIT_TEST_LIBRARY"])


def available_isas() -> tuple[str, ...]:
    """The instruction sets of this machine, plainest first; empty when the library is not built."""
    if native.unavailable() is not None:
        return ()
    chosen = native.isa()
    found = []
    for name in ISAS:
        try:
            native.set_isa(name)
        except native.NativeError:
            continue
        found.append(name)
    native.set_isa(chosen)
    return tuple(found)


@pytest.fixture
def isas() -> Iterator[tuple[str, ...]]:
    """Skips without the library; whatever ISA and thread count a test sets are put back."""
    reason = native.unavailable()
    if reason is not None:
        pytest.skip(reason)
    chosen, threads = native.isa(), native.threads()
    yield available_isas()
    native.set_isa(chosen)
    native.set_threads(threads)


@pytest.fixture(params=["avx512", "avx2", "portable"])
def isa(request: pytest.FixtureRequest, isas: tuple[str, ...]) -> str:
    """Runs the test once per body of the vector kernels (csrc/vec.h)."""
    if request.param not in isas:
        pytest.skip(f"no {request.param} on this machine")
    native.set_isa(request.param)
    return str(request.param)
