"""Records the cpu ops that ordinary Python code runs, and replays them in C++ without Python in between.

    with record(workspace) as recording:
        logits = head(blocks(tokens))          # computed as always, and written down
    tape = recording.tape()
    ...new tokens into the same buffers...
    tape.run()                                 # the same calls on the same memory: `logits` holds the new result

The invariant: a tape computes what the recorded code would compute now, or there is no tape. What a call reads at run
time (contents of buffers) may change between runs; what is in its arguments (addresses, sizes) may not. Outputs
of ops come from a Workspace while recording, so that their memory is still theirs at replay. A torch op that computes
anything during the recording is not on the tape: the recording is then refused, with its name.

Whoever runs a tape keeps alive, and where they are, the tensors that the recorded code read or wrote besides.
"""

from __future__ import annotations

import array
import ctypes
import functools
import math
import threading
import weakref
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from dibit.kernels import native

ALIGNMENT = 64

_recording: Recording | None = None
_one_at_a_time = threading.Lock()


def empty(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """An uninitialized tensor on the CPU for the output of an op, shape[0] rows; the recorder's, while one records.

    While recording, the memory is taken for something else once the tensor is gone: make no views of it that outlive
    it.
    """
    if _recording is not None and _recording.thread == threading.get_ident():
        return _recording.allocate(shape, dtype)
    return torch.empty(shape, dtype=dtype)


class Workspace:
    """Memory for the outputs of recorded ops, shared by tapes that never run at the same time.

    It holds as many outputs as live at once, each with room for `max_rows` rows; pages that no tape has touched cost
    nothing. Tapes for other numbers of rows find the same memory.
    """

    def __init__(self, max_rows: int) -> None:
        self.max_rows = max_rows
        self._slots: list[_Slot] = []

    @property
    def nbytes(self) -> int:
        return sum(slot.memory.nbytes for slot in self._slots)

    def clear(self) -> None:
        """Everything handed out so far may be overwritten."""
        for slot in self._slots:
            slot.user = None

    def take(self, shape: Sequence[int], dtype: torch.dtype) -> Tensor:
        rows = shape[0]
        if not 0 < rows <= self.max_rows:
            raise ValueError(f"{rows} rows from a workspace for 1 to {self.max_rows}")
        nbytes = math.prod(shape) * dtype.itemsize
        needed = nbytes // rows * self.max_rows
        fitting = [slot for slot in self._slots if slot.free and slot.memory.nbytes >= needed]
        if fitting:
            slot = min(fitting, key=lambda slot: slot.memory.nbytes)
        else:
            slot = _Slot(needed)
            self._slots.append(slot)
        made = slot.memory[:nbytes].view(dtype).view(tuple(shape))
        slot.user = weakref.ref(made)
        return made


class _Slot:
    """Memory for one output, free when the tensor it was handed out as is gone."""

    def __init__(self, nbytes: int) -> None:
        whole = torch.empty(nbytes + ALIGNMENT, dtype=torch.uint8)
        start = -whole.data_ptr() % ALIGNMENT
        self.memory = whole[start : start + nbytes]
        self.user: weakref.ref[Tensor] | None = None

    @property
    def free(self) -> bool:
        return self.user is None or self.user() is None


class Tape:
    """Recorded calls, ready to run on any thread, one thread at a time. It keeps its workspace."""

    def __init__(
        self, words: array.array[int], names: Sequence[str], arity: Mapping[str, int], workspace: Workspace
    ) -> None:
        self.workspace = workspace
        self.names = tuple(names)
        self._words = words
        self._arity = arity
        self._address = words.buffer_info()[0]
        self._index = ctypes.c_int64(0)
        self._index_at = ctypes.byref(self._index)
        self._run = _runner()

    def __len__(self) -> int:
        return len(self.names)

    @property
    def nbytes(self) -> int:
        return len(self._words) * self._words.itemsize

    def run(self) -> None:
        """Runs every call; NativeError names the first one that is refused, and those after it are not run."""
        self._check(self._run(self._address, len(self._words), self._index_at, None))

    def first_arguments(self) -> list[tuple[str, int]]:
        """Of every call its entry point and its first argument as recorded, an address for all ops there are."""
        found, at = [], 0
        for name in self.names:
            found.append((name, self._words[at + 1]))
            at += 1 + self._arity[name]
        return found

    def run_timed(self) -> array.array[int]:
        """Like run(), and returns the nanoseconds that each call took."""
        times = array.array("q", bytes(8 * len(self)))
        self._check(self._run(self._address, len(self._words), self._index_at, times.buffer_info()[0]))
        return times

    def _check(self, status: int) -> None:
        if status != 0:
            place = self._index.value
            raise native.NativeError(
                f"{self.names[place]} refused its arguments (status {status}), op {place + 1} of a tape of {len(self)}"
            )


class Recording:
    """What was called so far. `refusal` says why there will be no tape, or is None."""

    def __init__(self, workspace: Workspace) -> None:
        self.workspace = workspace
        self.refusal: str | None = None
        self.thread = threading.get_ident()
        self._words = array.array("Q")
        self._names: list[str] = []
        self._arity: dict[str, int] = {}
        self._allocating = False

    def tape(self) -> Tape | None:
        """The tape, or None if something was done that it does not hold."""
        return None if self.refusal is not None else Tape(self._words, self._names, self._arity, self.workspace)

    def allocate(self, shape: Sequence[int], dtype: torch.dtype) -> Tensor:
        self._allocating = True
        try:
            return self.workspace.take(shape, dtype)
        finally:
            self._allocating = False

    def saw_call(self, name: str, types: tuple[Any, ...], args: tuple[Any, ...]) -> None:
        if threading.get_ident() != self.thread:
            return
        op = _op(name, len(args))
        if op < 0:
            self._refuse(name)
            return
        self._words.append(op)
        self._words.extend(_word(kind, value) for kind, value in zip(types, args, strict=True))
        self._names.append(name)
        self._arity[name] = len(args)

    def saw_torch(self, name: str) -> None:
        if not self._allocating:
            self._refuse(name)

    def _refuse(self, name: str) -> None:
        if self.refusal is None:
            self.refusal = f"{name} cannot be recorded"


class _Watch(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Tells a recording of every torch op that runs on this thread."""

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        # Otherwise torch imports its compiler at the first op seen: two seconds, 126 MB. Nothing here is ever compiled.
        return False

    def __init__(self, recording: Recording) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._recording = recording

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self._recording.saw_torch(str(func))
        return func(*args, **(kwargs or {}))


@contextmanager
def record(workspace: Workspace) -> Iterator[Recording]:
    """Writes down the cpu ops that this thread runs inside. One recording at a time: another thread's waits."""
    global _recording
    with _one_at_a_time:
        recording = Recording(workspace)
        workspace.clear()
        try:
            _recording = recording
            native.set_recorder(recording.saw_call)
            with _Watch(recording):
                yield recording
        finally:
            native.set_recorder(None)
            _recording = None


def _word(kind: Any, value: Any) -> int:
    """An argument as the 64 bits that csrc/tape.cpp reads it from."""
    if value is None:
        return 0
    if kind is native.FLOAT:
        return ctypes.c_uint32.from_buffer(ctypes.c_float(value)).value
    if isinstance(value, int):
        return value & (1 << 64) - 1
    return ctypes.addressof(value._obj)  # a ctypes.byref()


@functools.cache
def _op(name: str, arity: int) -> int:
    symbol = native.library().dibit_tape_op
    symbol.argtypes = [ctypes.c_char_p, native.INT]
    symbol.restype = ctypes.c_int
    return int(symbol(name.encode(), arity))


@functools.cache
def _runner() -> Any:
    symbol = native.library().dibit_tape_run
    symbol.argtypes = [native.POINTER, native.INT, ctypes.POINTER(native.INT), native.POINTER]
    symbol.restype = ctypes.c_int
    return symbol
