"""The C++ library of the cpu backend: finding it, what it says of the machine, its threads.

The library (csrc/, built at install, no torch and no Python headers needed) has a plain C interface called through
ctypes: pointers and sizes in, a status out, the GIL released for the call. After a change in csrc/, rebuild with
`make build`.
"""

from __future__ import annotations

import ctypes
import functools
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

POINTER = ctypes.c_void_p
INT = ctypes.c_int64
FLOAT = ctypes.c_float

Recorder = Callable[[str, tuple[Any, ...], tuple[Any, ...]], None]
"""Told of every call through `entry` and `function` that was accepted: entry point, argument types, arguments."""

LIBRARY = Path(__file__).parent / "_cpu.abi3.so"
ABI_VERSION = 6


class NativeError(RuntimeError):
    """The C++ library is missing, does not fit this version, or refused a call."""


@functools.cache
def library() -> ctypes.CDLL:
    """The loaded library. Raises NativeError with the reason and the remedy."""
    if not LIBRARY.exists():
        raise NativeError(
            "the C++ kernels are not built (no C++ compiler when dibit was installed?); "
            "install g++ and run `pip install --force-reinstall --no-deps .` or `make build`"
        )
    try:
        lib = ctypes.CDLL(str(LIBRARY))
    except OSError as error:
        raise NativeError(f"the C++ kernels do not load ({error}); rebuild with `make build`") from error
    lib.dibit_abi_version.restype = ctypes.c_int
    lib.dibit_isa.restype = ctypes.c_char_p
    lib.dibit_threads.restype = ctypes.c_int
    lib.dibit_set_threads.argtypes = [ctypes.c_int]
    lib.dibit_set_isa.argtypes = [ctypes.c_char_p]
    lib.dibit_set_isa.restype = ctypes.c_int
    found = lib.dibit_abi_version()
    if found != ABI_VERSION:
        raise NativeError(f"the C++ kernels are of version {found}, not {ABI_VERSION}; rebuild with `make build`")
    return lib


def unavailable() -> str | None:
    """None when the library can be used, else the reason (the cpu backend's refusal in dispatch.py)."""
    try:
        library()
    except NativeError as error:
        return str(error)
    return None


@functools.cache
def entry(name: str, *argtypes: type) -> Callable[..., int]:
    """A typed entry point that returns its status: 0, or what the op's header says."""
    symbol = getattr(library(), name)
    symbol.argtypes = list(argtypes)
    symbol.restype = ctypes.c_int

    def call(*args: object) -> int:
        status: int = symbol(*args)
        if _recorder is not None and status == 0:
            _recorder(name, argtypes, args)
        return status

    return call


@functools.cache
def function(name: str, *argtypes: type) -> Callable[..., None]:
    """A typed entry point. Non-zero status becomes NativeError."""
    status_of = entry(name, *argtypes)

    def call(*args: object) -> None:
        status = status_of(*args)
        if status != 0:
            raise NativeError(f"{name} refused its arguments (status {status})")

    return call


_recorder: Recorder | None = None


def set_recorder(recorder: Recorder | None) -> None:
    """Whom to tell of calls from now on; tape.py sees to it that there is one at a time."""
    global _recorder
    _recorder = recorder


def isa() -> str:
    """Instruction set in use: "portable", "avx2", "avx512" (512 bits in attention, VNNI in qlinear, else avx2) or "amx"
    (matrix units in qlinear, else avx512)."""
    name: bytes = library().dibit_isa()
    return name.decode()


def set_isa(name: str) -> None:
    """Use the bodies of another instruction set from the next op on: "portable", "avx2", "avx512" or "amx".

    The environment's DIBIT_ISA does the same at the start. Raises NativeError for what this machine lacks.
    """
    status = library().dibit_set_isa(name.encode())
    if status != 0:
        reason = "is not one of portable, avx2, avx512, amx" if status == 1 else "is more than this machine has"
        raise NativeError(f"instruction set {name!r} {reason}")


def threads() -> int:
    """Threads that an op may use, the caller's included."""
    return int(library().dibit_threads())


def set_threads(count: int) -> None:
    """Use `count` threads (the caller plus count - 1 workers) from the next op on."""
    if count < 1:
        raise ValueError(f"{count} threads; at least 1 is needed")
    library().dibit_set_threads(count)


def usable_cores() -> int:
    """Cores this process may run on (affinity respected)."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
