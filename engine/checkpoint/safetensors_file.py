"""One .safetensors file: its header checked against the file, its tensors read by position.

The header is untrusted: its length is bounded, every offset must lie inside the file, tensors may neither overlap nor
leave holes, and each range must be exactly as long as type and shape say. Tensors are read with pread into memory of
their own rather than mapped: a mapped file counts as resident memory, and one that is cut short later ends the process
with SIGBUS. Format: https://huggingface.co/docs/safetensors
"""

from __future__ import annotations

import os
import struct
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from dibit.engine.checkpoint.checkpoint import TensorInfo
from dibit.engine.checkpoint.json_file import parse_object
from dibit.engine.errors import CheckpointError

MAX_HEADER_BYTES = 100_000_000
TYPES = {
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
FLOAT_TYPES = (torch.float32, torch.float16, torch.bfloat16)
_MAX_DIMENSION = 1 << 48


@dataclass(frozen=True)
class Entry:
    """A tensor of the file; `offset` counts from the start of the file."""

    info: TensorInfo
    offset: int


class SafetensorsFile:
    """An open file. Raises CheckpointError when the header and the file do not agree."""

    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            self._fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        except OSError as error:
            raise CheckpointError(f"cannot open {path}: {error.strerror or error}") from error
        try:
            self.entries: Mapping[str, Entry] = self._read_header()
        except BaseException:
            self.close()
            raise

    def close(self) -> None:
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1

    def read(self, name: str) -> Tensor:
        entry = self.entries[name]
        buffer = torch.empty(entry.info.nbytes, dtype=torch.uint8)
        read_into(self._fd, entry.offset, buffer, f"tensor {name} of {self.path}")
        return buffer.view(entry.info.dtype).reshape(entry.info.shape)

    def _read_header(self) -> dict[str, Entry]:
        size = os.fstat(self._fd).st_size
        prefix = os.pread(self._fd, 8, 0)
        if len(prefix) < 8:
            raise CheckpointError(
                f"{self.path} has {size} bytes, too few for a safetensors file; the download was cut short, repeat it"
            )
        (length,) = struct.unpack("<Q", prefix)
        if length > MAX_HEADER_BYTES:
            raise CheckpointError(
                f"{self.path} claims a header of {length} bytes; at most {MAX_HEADER_BYTES} are accepted. "
                "It is damaged or no safetensors file"
            )
        if length > size - 8:
            raise CheckpointError(
                f"{self.path} claims a header of {length} bytes but has {size} in all; "
                "the download was cut short, repeat it"
            )
        what = f"the header of {self.path}"
        header = parse_object(os.pread(self._fd, length, 8), what)
        header.pop("__metadata__", None)
        start = 8 + length
        spans: list[tuple[int, int, str]] = []
        entries: dict[str, Entry] = {}
        for name, fields in header.items():
            begin, end, info = _entry(name, fields, what)
            spans.append((begin, end, name))
            entries[name] = Entry(info, start + begin)
        _check_layout(spans, size - start, self.path)
        return entries


def read_into(fd: int, offset: int, buffer: Tensor, what: str) -> None:
    """Fill a uint8 buffer from position `offset` of an open file. Raises CheckpointError when the file ends first."""
    view = buffer.numpy().data
    while view:
        try:
            count = os.preadv(fd, [view], offset)
        except OSError as error:
            raise CheckpointError(f"cannot read {what}: {error.strerror or error}") from error
        if count == 0:
            raise CheckpointError(f"{what} ends {len(view)} bytes early; the file changed while it was being read")
        view = view[count:]
        offset += count


def _entry(name: str, fields: Any, what: str) -> tuple[int, int, TensorInfo]:
    if not isinstance(fields, dict) or set(fields) != {"dtype", "shape", "data_offsets"}:
        raise CheckpointError(f"tensor {name} in {what} is not described by dtype, shape and data_offsets")
    kind, shape, offsets = fields["dtype"], fields["shape"], fields["data_offsets"]
    if not isinstance(kind, str) or kind not in TYPES:
        raise CheckpointError(
            f"tensor {name} in {what} has type {kind!r}; supported: {', '.join(TYPES)}. "
            "Convert the model to float32, float16 or bfloat16"
        )
    if not _naturals(shape) or not _naturals(offsets) or len(offsets) != 2:
        raise CheckpointError(
            f"tensor {name} in {what} has shape {shape!r} and offsets {offsets!r}; the file is damaged"
        )
    begin, end = offsets
    info = TensorInfo(tuple(shape), TYPES[kind], end - begin, kind)
    expected = info.numel * TYPES[kind].itemsize
    if info.nbytes != expected:
        raise CheckpointError(
            f"tensor {name} in {what} is {kind} {shape}, {expected} bytes, but its offsets span {info.nbytes}; "
            "the file is damaged"
        )
    return begin, end, info


def _naturals(values: Any) -> bool:
    return isinstance(values, list) and all(type(v) is int and 0 <= v < _MAX_DIMENSION for v in values)


def _check_layout(spans: list[tuple[int, int, str]], available: int, path: Path) -> None:
    position = 0
    for begin, end, name in sorted(spans):
        if begin != position:
            fault = "overlaps the one before it" if begin < position else "leaves a hole before it"
            raise CheckpointError(
                f"tensor {name} of {path} {fault} (offset {begin}, expected {position}); it is damaged"
            )
        position = end
    if position > available:
        raise CheckpointError(
            f"{path} is cut short: its header describes {position} bytes of tensors, {available} are there; "
            "download it again"
        )
    if position < available:
        raise CheckpointError(
            f"{path} has {available - position} bytes after its last tensor, which the format does not allow; "
            "it is damaged"
        )
