"""Finding the C++ library, choosing its instruction set, its threads, and what happens without it."""

from __future__ import annotations

import ctypes
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from dibit.kernels import native, qlinear_cpu
from dibit.kernels.formats import Format, QTensor

PROGRAM = "from dibit.kernels import native; print(native.isa())"


@pytest.fixture
def fresh_library() -> Iterator[None]:
    """Forgets the loaded library before and after."""
    native.library.cache_clear()
    yield
    native.library.cache_clear()


@pytest.mark.parametrize("wanted", ["portable", "avx2", "avx512", "amx"])
def test_the_environment_lowers_the_instruction_set(wanted: str, isas: tuple[str, ...]) -> None:
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM],
        env={**os.environ, "DIBIT_ISA": wanted},
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stdout.strip() == (wanted if wanted in isas else isas[-1])


def test_instruction_sets_can_be_switched(isas: tuple[str, ...]) -> None:
    assert isas[0] == "portable"
    for name in isas:
        native.set_isa(name)
        assert native.isa() == name
    with pytest.raises(native.NativeError, match="'mmx' is not one of portable, avx2, avx512, amx"):
        native.set_isa("mmx")


def test_threads_are_what_was_asked_for(isas: tuple[str, ...]) -> None:
    for count in (1, 4, 2, 1):
        native.set_threads(count)
        assert native.threads() == count
    with pytest.raises(ValueError, match="0 threads"):
        native.set_threads(0)


def test_more_threads_than_cores_still_finish(isas: tuple[str, ...]) -> None:
    fmt = Format(bits=2, group_size=64)
    w = qlinear_cpu.pack(
        QTensor(
            torch.randint(0, 4, (2048, 256), dtype=torch.uint8),
            torch.zeros(2048, 4, dtype=torch.uint8),
            torch.ones(2048, 4),
            fmt,
        )
    )
    x = torch.randn(1, 256)
    want = qlinear_cpu.qlinear(x, w)
    native.set_threads(8)
    for _ in range(200):
        assert torch.equal(qlinear_cpu.qlinear(x, w), want)


@pytest.mark.parametrize(("threads", "rounds"), [(3, 3000), (8, 1000)])
def test_ranges_of_changing_sizes_are_each_computed_once(isas: tuple[str, ...], threads: int, rounds: int) -> None:
    """A thread that comes late to one range must not take a piece of the next by the numbers of the first.

    It takes a thread that loses its core at the wrong moment: more threads than cores, and many tries.
    """
    fmt = Format(bits=4, group_size=32)
    weights = []
    for n in (32, 512, 64, 1024, 96, 256):
        w = torch.randn(n, 512)
        weights.append(qlinear_cpu.pack(fmt.encode(w, *fmt.ranges(w))))
    x = torch.randn(8, 512)
    wanted = [qlinear_cpu.qlinear(x, w) for w in weights]
    native.set_threads(threads)
    for _ in range(rounds):
        for w, want in zip(weights, wanted, strict=True):
            assert torch.equal(qlinear_cpu.qlinear(x, w), want)


def test_reading_counts_every_word(isas: tuple[str, ...]) -> None:
    data = torch.arange(1 << 16, dtype=torch.int64)
    read = native.function("dibit_read", native.POINTER, native.INT, ctypes.POINTER(ctypes.c_uint64))
    total = ctypes.c_uint64()
    for threads in (1, 3):
        native.set_threads(threads)
        read(data.data_ptr(), data.nbytes, ctypes.byref(total))
        assert total.value == int(data.sum())


def test_a_missing_library_is_explained(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, fresh_library: None) -> None:
    monkeypatch.setattr(native, "LIBRARY", tmp_path / "_cpu.abi3.so")
    reason = native.unavailable()
    assert reason is not None
    assert "not built" in reason
    assert "make build" in reason


def test_a_damaged_library_is_explained(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, fresh_library: None) -> None:
    damaged = tmp_path / "_cpu.abi3.so"
    damaged.write_bytes(b"\x7fELF" + bytes(60))
    monkeypatch.setattr(native, "LIBRARY", damaged)
    reason = native.unavailable()
    assert reason is not None
    assert "do not load" in reason


def test_a_library_of_another_version_is_refused(
    isas: tuple[str, ...], monkeypatch: pytest.MonkeyPatch, fresh_library: None
) -> None:
    built = native.ABI_VERSION
    monkeypatch.setattr(native, "ABI_VERSION", 999)
    assert native.unavailable() == f"the C++ kernels are of version {built}, not 999; rebuild with `make build`"


def test_a_refused_call_names_the_entry_point(isas: tuple[str, ...]) -> None:
    call = native.function("dibit_qlinear", *qlinear_cpu._QLINEAR_TYPES)
    with pytest.raises(native.NativeError, match=r"dibit_qlinear refused its arguments \(status 1\)"):
        call(ctypes.byref(qlinear_cpu.QWeightStruct()), None, 1, None, 0, None)


def test_usable_cores() -> None:
    assert 1 <= native.usable_cores() <= (os.cpu_count() or 1)
