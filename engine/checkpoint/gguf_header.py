"""The header of a GGUF file: metadata and the table of tensors, read without touching a weight.

Every count and length is checked against what the file has left before anything is allocated, keys and tensor names
are unique, and every tensor lies inside the file. Format: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md
"""

from __future__ import annotations

import math
import os
import struct
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

from dibit.engine.errors import CheckpointError

MAGIC = b"GGUF"
VERSIONS = (2, 3)
MAX_HEADER_BYTES = 512_000_000
MAX_KEYS = 65_536
MAX_TENSORS = 1_000_000
MAX_DIMENSIONS = 4
_SCALARS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
_STRING, _ARRAY = 8, 9


@dataclass(frozen=True)
class GgufValue:
    """One metadata entry; `contents()` is the number, bool, string, or list of them."""

    value: Any

    def contents(self) -> Any:
        return self.value


@dataclass(frozen=True)
class GgufTensor:
    """shape is outermost first, [N, K] for a linear; offset counts from the start of the file."""

    name: str
    shape: tuple[int, ...]
    type_id: int
    type_name: str
    offset: int
    nbytes: int


@dataclass(frozen=True)
class GgufHeader:
    fields: Mapping[str, GgufValue]
    tensors: tuple[GgufTensor, ...]


def read_header(path: Path) -> GgufHeader:
    """Raises CheckpointError when the file is no GGUF file, or its header and its length do not agree."""
    try:
        with path.open("rb") as file:
            return _Reader(file, path).header()
    except OSError as error:
        raise CheckpointError(f"cannot read {path}: {error.strerror or error}") from error


class _Reader:
    def __init__(self, file: BinaryIO, path: Path) -> None:
        self.file = file
        self.path = path
        self.size = os.fstat(file.fileno()).st_size
        self.position = 0

    def header(self) -> GgufHeader:
        magic = self.take(4)
        if magic != MAGIC:
            raise CheckpointError(f"{self.path} begins with {magic!r}, not {MAGIC!r}: it is no GGUF file")
        version = self.number("I")
        if version not in VERSIONS:
            hint = "it is big-endian" if version & 0xFFFF == 0 else "convert it again with a current llama.cpp"
            raise CheckpointError(f"{self.path} is GGUF version {version}; supported: 2 and 3, little-endian ({hint})")
        tensor_count = self.count("Q", MAX_TENSORS, "tensors")
        key_count = self.count("Q", MAX_KEYS, "metadata entries")
        fields: dict[str, GgufValue] = {}
        for _ in range(key_count):
            key = self.string()
            if key in fields:
                raise self.damaged(f"has the metadata key {key!r} twice")
            fields[key] = GgufValue(self.value(self.number("I")))
        rows = [self.tensor_row() for _ in range(tensor_count)]
        alignment = fields["general.alignment"].value if "general.alignment" in fields else 32
        if not isinstance(alignment, int) or alignment < 1 or alignment & (alignment - 1):
            raise self.damaged(f"has alignment {alignment!r}, no power of two")
        start = math.ceil(self.position / alignment) * alignment
        return GgufHeader(fields, self.tensors(rows, start, alignment))

    def tensor_row(self) -> tuple[str, tuple[int, ...], int, int]:
        name = self.string()
        dims = self.count("I", MAX_DIMENSIONS, f"dimensions of tensor {name!r}")
        shape = tuple(self.number("Q") for _ in range(dims))
        return name, shape[::-1], self.number("I"), self.number("Q")

    def tensors(
        self, rows: list[tuple[str, tuple[int, ...], int, int]], start: int, alignment: int
    ) -> tuple[GgufTensor, ...]:
        import gguf

        tensors: dict[str, GgufTensor] = {}
        end = start
        for name, shape, type_id, offset in sorted(rows, key=lambda row: row[3]):
            if name in tensors:
                raise self.damaged(f"has the tensor {name!r} twice")
            try:
                kind = gguf.GGMLQuantizationType(type_id)
                block, block_bytes = gguf.GGML_QUANT_SIZES[kind]
            except (ValueError, KeyError):
                raise CheckpointError(
                    f"tensor {name} of {self.path} has type number {type_id}, which the installed gguf package does "
                    "not know; update it (`pip install -U gguf`) or convert the model to another type"
                ) from None
            columns = shape[-1] if shape else 1
            if columns % block:
                raise self.damaged(f"has tensor {name} with rows of {columns}, not in whole blocks of {block}")
            nbytes = math.prod(shape) // block * block_bytes
            if offset % alignment or start + offset < end:
                raise self.damaged(f"has tensor {name} at offset {offset}, misaligned or on top of another")
            end = start + offset + nbytes
            if end > self.size:
                raise CheckpointError(
                    f"{self.path} is cut short: tensor {name} ends at byte {end}, the file at {self.size}; "
                    "download it again"
                )
            tensors[name] = GgufTensor(name, shape, type_id, kind.name, start + offset, nbytes)
        return tuple(tensors.values())

    def value(self, kind: int) -> Any:
        if kind in _SCALARS:
            return self.number(_SCALARS[kind])
        if kind == _STRING:
            return self.string()
        if kind != _ARRAY:
            raise self.damaged(f"has a metadata value of unknown type {kind}")
        item = self.number("I")
        if item == _STRING:
            return [self.string() for _ in range(self.count("Q", self.left // 8, "strings in a list"))]
        if item not in _SCALARS:
            raise CheckpointError(f"{self.path} has a metadata list of lists (type {item}), which is not supported")
        code = _SCALARS[item]
        count = self.count("Q", self.left // struct.calcsize(f"<{code}"), "numbers in a list")
        return list(struct.unpack(f"<{count}{code}", self.take(count * struct.calcsize(f"<{code}"))))

    def string(self) -> str:
        data = self.take(self.count("Q", self.left, "bytes in a string"))
        try:
            return data.decode("utf-8")
        except UnicodeDecodeError:
            # Vocabularies of some models hold tokens that are no UTF-8 by themselves.
            return data.decode("utf-8", errors="replace")

    def count(self, code: str, most: int, what: str) -> int:
        value = int(self.number(code))
        if value > most:
            raise self.damaged(f"claims {value} {what}; at most {most} can be there")
        return value

    def number(self, code: str) -> Any:
        return struct.unpack(f"<{code}", self.take(struct.calcsize(f"<{code}")))[0]

    @property
    def left(self) -> int:
        return min(self.size, MAX_HEADER_BYTES) - self.position

    def take(self, count: int) -> bytes:
        data = self.file.read(count) if count <= self.left else b""
        if len(data) < count:
            raise CheckpointError(f"{self.path} ends inside its header; the download was cut short, repeat it")
        self.position += count
        return data

    def damaged(self, what: str) -> CheckpointError:
        return CheckpointError(f"{self.path} {what}; the file is damaged, download it again")
