"""Writing one .safetensors file so that it is either whole under its name, or not there.

The file is written aside, forced to disk and renamed; tensors pass through one at a time.
"""

from __future__ import annotations

import contextlib
import errno
import json
import os
import struct
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, BinaryIO

import torch
from torch import Tensor

from dibit.engine.checkpoint.safetensors_file import TYPES
from dibit.engine.errors import CheckpointError

_NAMES = {dtype: name for name, dtype in TYPES.items()}
_CHUNK = 1 << 24


def write_shard(
    path: Path, layout: Mapping[str, tuple[torch.dtype, Sequence[int]]], read: Callable[[str], Tensor]
) -> int:
    """Write the tensors of `layout`, each fetched by `read` when its turn comes.

    returns  CRC-32 of the file
    Raises CheckpointError, leaving nothing behind, when the disk is full or fails.
    """
    # Wide types first keeps every tensor aligned to its element size.
    names = sorted(layout, key=lambda name: -layout[name][0].itemsize)
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    position = 0
    for name in names:
        dtype, shape = layout[name]
        end = position + dtype.itemsize * _product(shape)
        header[name] = {"dtype": _NAMES[dtype], "shape": list(shape), "data_offsets": [position, end]}
        position = end
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    with writing(path, position + len(text) + 8) as file:
        crc = _write(file, struct.pack("<Q", len(text)) + text, 0)
        for name in names:
            tensor = read(name)
            if (tensor.dtype, tuple(tensor.shape)) != (layout[name][0], tuple(layout[name][1])):
                raise ValueError(f"{name} became {tensor.dtype} {tuple(tensor.shape)} between layout and writing")
            if tensor.numel():
                crc = _write(file, tensor.contiguous().reshape(-1).view(torch.uint8).numpy().data, crc)
    return crc


def write_text(path: Path, text: str) -> None:
    """Replace a small file, atomically and durably. Raises CheckpointError."""
    data = text.encode()
    with writing(path, len(data)) as file:
        file.write(data)


def checksum(path: Path) -> int:
    """CRC-32 of a file."""
    crc = 0
    with path.open("rb") as file:
        while chunk := file.read(_CHUNK):
            crc = zlib.crc32(chunk, crc)
    return crc


@contextlib.contextmanager
def writing(path: Path, nbytes: int) -> Iterator[BinaryIO]:
    """A file that takes the name `path` when the block ends well, and vanishes when it does not."""
    aside = path.with_name(path.name + ".new")
    try:
        with aside.open("wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        aside.replace(path)
        sync_directory(path.parent)
    except BaseException as error:
        with contextlib.suppress(OSError):
            aside.unlink(missing_ok=True)
        if isinstance(error, OSError):
            raise write_error(error, path, nbytes) from error
        raise


def write_error(error: OSError, path: Path, nbytes: int) -> CheckpointError:
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        return CheckpointError(
            f"no space left on the disk of {path.parent} while writing {path.name} ({nbytes / 1e6:.1f} MB); "
            "free some and repeat the command, what was finished is kept"
        )
    return CheckpointError(f"cannot write {path}: {error.strerror or error}")


def sync_directory(path: Path) -> None:
    """Force a directory's entries to disk; a rename is durable only then."""
    fd = os.open(path, os.O_RDONLY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


def _write(file: BinaryIO, data: bytes | memoryview, crc: int) -> int:
    file.write(data)
    return zlib.crc32(data, crc)


def _product(shape: Sequence[int]) -> int:
    count = 1
    for size in shape:
        count *= size
    return count
