"""Packed weights on disk, so that the next start maps them instead of making them again.

A file holds the weights of one model as the cpu backend computes with them. It is named by a digest of all that they
depend on: the checkpoint's identity, the settings that change what is packed, the layout's version. Processes that
serve one model map one file, so its pages are in memory once.

The invariant: what is mapped is what packing would give now. A file is written aside and renamed when it is complete;
its index and every weight in it carry a CRC-32, checked before use, so that a file that a crash or a disk left damaged
is made again, never computed with. The cache is an optimisation: whatever goes wrong with it is one line in the log.

    magic | weights, each part on a 64-byte boundary | index (JSON) | offset, length and CRC of the index | magic
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import logging
import mmap
import os
import shutil
import struct
import time
import zlib
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, BinaryIO

import torch
from torch import Tensor

from dibit.engine.errors import ConfigError
from dibit.kernels.formats import Format, FormatError
from dibit.kernels.native import usable_cores
from dibit.kernels.qlinear_cpu import LAYOUT_VERSION, CpuQWeight, assemble

log = logging.getLogger(__name__)

SUFFIX = ".packed"
MAGIC = b"dibitpk1"
ALIGNMENT = 64
# Least recently used files beyond this are removed, and nothing is written that would leave the disk less than this.
LIMIT_BYTES = 64 << 30
SPARE_BYTES = 1 << 30
ABANDONED_S = 3600.0
_TAIL = struct.Struct("<QQI8s")
_TYPES = {"uint8": torch.uint8, "float16": torch.float16, "float32": torch.float32}
_PARTS = ("codes", "zeros", "scales")


@dataclass(frozen=True)
class CacheEntry:
    """A file of the cache: of which model, how large, when it was last used (Unix time)."""

    path: str
    model: str
    nbytes: int
    used: float


def default_directory() -> Path:
    """$DIBIT_CACHE_DIR, or dibit/packed in the user's cache directory (XDG).

    Raises ConfigError for a user without a home directory, as containers have.
    """
    if given := os.environ.get("DIBIT_CACHE_DIR"):
        return Path(given)
    if base := os.environ.get("XDG_CACHE_HOME"):
        return Path(base) / "dibit" / "packed"
    try:
        return Path.home() / ".cache" / "dibit" / "packed"
    except RuntimeError as error:
        raise ConfigError("this user has no home directory to keep packed weights in; give --cache-dir") from error


class PackedCache:
    """Weights of one model by name, mapped where there is a file of them, else collected into a new one.

    `get` before `put`; `finish` when the model is complete, `abandon` when it never will be. After an error on either
    side it does nothing more. One thread.
    """

    def __init__(self, directory: Path, *, key: str, model: str) -> None:
        digest = hashlib.sha256(f"{MAGIC!r} {LAYOUT_VERSION} {key}".encode()).hexdigest()[:32]
        self.path = directory / f"{digest}{SUFFIX}"
        self.mapped_bytes = 0
        self._model = model
        self._found: dict[str, CpuQWeight] = {}
        self._missed = False
        self._writer: _Writer | None = None
        self._off = False
        self._open()

    def get(self, name: str, shape: tuple[int, int], format: Format) -> CpuQWeight | None:
        """The weight [N, K] under this name, or None when it is to be made."""
        found = self._found.get(name)
        if found is not None and found.shape == shape and found.format == format:
            return found
        self._missed = True
        return None

    def put(self, name: str, weight: CpuQWeight) -> None:
        """Keep a weight that `get` did not have."""
        if self._off or self._found:
            return
        try:
            if self._writer is None:
                self._writer = _Writer(self.path)
            self._writer.add(name, weight)
        except OSError as error:
            self._give_up(error)

    def finish(self) -> None:
        """All weights were got or put: a new file becomes visible, and the cache is brought down to its limit."""
        if self._found and self._missed:
            self._remove_foreign()
        if self._writer is None:
            return
        try:
            self._writer.finish(self._model)
            self._writer = None
            trim(self.path.parent, keep=self.path)
        except OSError as error:
            self._give_up(error)

    def abandon(self) -> None:
        """Leaves nothing of a file that was begun."""
        if self._writer is not None:
            self._writer.abandon()
        self._writer, self._off = None, True

    def _remove_foreign(self) -> None:
        log.warning("packed weights in %s are not those of this model; it is removed", self.path)
        try:
            self.path.unlink(missing_ok=True)
        except OSError as error:
            log.warning("%s cannot be removed: %s", self.path, error.strerror)

    def _give_up(self, error: OSError) -> None:
        log.warning("packed weights are not kept for the next start: %s (--cache-dir, --no-cache)", error)
        self.abandon()

    def _open(self) -> None:
        started_s = time.monotonic()
        try:
            self._found, self.mapped_bytes = _read(self.path)
            os.utime(self.path)
        except FileNotFoundError:
            return
        except (OSError, ValueError, KeyError, TypeError, FormatError) as error:
            if not self._found:
                log.warning("packed weights in %s are made again: %s", self.path, error)
            return
        log.info("packed weights mapped from %s in %.2f s", self.path, time.monotonic() - started_s)


def entries(directory: Path) -> list[CacheEntry]:
    """What the cache holds, most recently used first; a file that cannot be read is "damaged"."""
    found = []
    for path in directory.glob(f"*{SUFFIX}") if directory.is_dir() else ():
        try:
            about = path.stat()
            with path.open("rb") as file:
                model = str(_index(file, about.st_size)["model"])
        except FileNotFoundError:
            continue
        except (OSError, ValueError, KeyError, TypeError):
            model = "damaged"
        found.append(CacheEntry(str(path), model, about.st_size, about.st_mtime))
    return sorted(found, key=lambda entry: -entry.used)


def clear(directory: Path) -> list[CacheEntry]:
    """Removes every file of the cache, and returns what they were. Processes that have one mapped keep it.

    Raises ConfigError for one that cannot be removed.
    """
    removed = entries(directory)
    try:
        for entry in removed:
            Path(entry.path).unlink(missing_ok=True)
        for path in directory.glob(f"*{SUFFIX}.*.part") if directory.is_dir() else ():
            path.unlink(missing_ok=True)
    except OSError as error:
        raise ConfigError(f"{error.filename} cannot be removed: {error.strerror}; remove it by hand") from error
    return removed


def trim(directory: Path, *, keep: Path, limit_bytes: int = LIMIT_BYTES) -> None:
    """Removes the least recently used files beyond the limit, never `keep`, and what killed processes left."""
    held = 0
    for entry in entries(directory):
        held += entry.nbytes
        if held > limit_bytes and entry.path != str(keep):
            log.info("removing packed weights of %s, last used of what exceeds the cache's limit", entry.model)
            Path(entry.path).unlink(missing_ok=True)
    for path in directory.glob(f"*{SUFFIX}.*.part"):
        if time.time() - path.stat().st_mtime > ABANDONED_S:
            path.unlink(missing_ok=True)


class _Writer:
    def __init__(self, path: Path) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        self._path = path
        self._aside = path.with_name(f"{path.name}.{os.getpid()}.part")
        self._file = self._aside.open("wb")
        self._file.write(MAGIC)
        self._weights: dict[str, Any] = {}

    def add(self, name: str, weight: CpuQWeight) -> None:
        if shutil.disk_usage(self._path.parent).free < weight.nbytes + SPARE_BYTES:
            raise OSError(f"the disk of {self._path.parent} has less than {SPARE_BYTES >> 30} GiB to spare")
        parts = {part: self._append(getattr(weight, part)) for part in _PARTS}
        self._weights[name] = {"n": weight.n, "k": weight.k, "format": asdict(weight.format), **parts}

    def _append(self, tensor: Tensor) -> dict[str, Any]:
        self._file.write(bytes(-self._file.tell() % ALIGNMENT))
        offset = self._file.tell()
        data = memoryview(tensor.numpy().view("uint8").data).cast("B")
        self._file.write(data)
        dtype = str(tensor.dtype).removeprefix("torch.")
        return {"offset": offset, "shape": list(tensor.shape), "dtype": dtype, "crc": zlib.crc32(data)}

    def finish(self, model: str) -> None:
        index = json.dumps({"model": model, "layout": LAYOUT_VERSION, "weights": self._weights}).encode()
        offset = self._file.tell()
        self._file.write(index)
        self._file.write(_TAIL.pack(offset, len(index), zlib.crc32(index), MAGIC))
        self._file.close()
        self._aside.replace(self._path)

    def abandon(self) -> None:
        # What is still buffered may have no room.
        with contextlib.suppress(OSError):
            self._file.close()
        self._aside.unlink(missing_ok=True)


def _index(file: BinaryIO, size: int) -> dict[str, Any]:
    """The index of an open file of this size. Raises ValueError for what is no complete file of the cache."""
    if size < len(MAGIC) + _TAIL.size or file.read(len(MAGIC)) != MAGIC:
        raise ValueError("it is not a file of this cache")
    file.seek(size - _TAIL.size)
    offset, length, crc, magic = _TAIL.unpack(file.read(_TAIL.size))
    if magic != MAGIC or offset + length + _TAIL.size != size:
        raise ValueError("it is incomplete")
    file.seek(offset)
    text = file.read(length)
    if zlib.crc32(text) != crc:
        raise ValueError("its index is damaged")
    index: dict[str, Any] = json.loads(text)
    return index


def _read(path: Path) -> tuple[dict[str, CpuQWeight], int]:
    """Every weight of a file, mapped and checked, and the bytes mapped."""
    with path.open("rb") as file:
        size = os.fstat(file.fileno()).st_size
        index = _index(file, size)
        # Private: a page is shared with everyone until somebody writes to it, which nobody does.
        mapped = mmap.mmap(file.fileno(), 0, flags=mmap.MAP_PRIVATE, prot=mmap.PROT_READ | mmap.PROT_WRITE)
    view = memoryview(mapped)

    def part(name: str, about: dict[str, Any]) -> Tensor:
        dtype, shape = _TYPES[about["dtype"]], torch.Size(about["shape"])
        start, nbytes = about["offset"], shape.numel() * dtype.itemsize
        if start < 0 or start % ALIGNMENT or start + nbytes > size:
            raise ValueError(f"{name} lies outside of it")
        if zlib.crc32(view[start : start + nbytes]) != about["crc"]:
            raise ValueError(f"{name} is damaged")
        return torch.frombuffer(mapped, dtype=dtype, count=shape.numel(), offset=start).view(shape)

    def weight(item: tuple[str, dict[str, Any]]) -> tuple[str, CpuQWeight]:
        name, about = item
        codes, zeros, scales = (part(name, about[kind]) for kind in _PARTS)
        return name, assemble(codes, zeros, scales, n=about["n"], k=about["k"], format=Format(**about["format"]))

    # Checksums let go of the interpreter's lock: the pages are read with every core.
    with ThreadPoolExecutor(min(4, usable_cores())) as threads:
        return dict(threads.map(weight, index["weights"].items())), size
