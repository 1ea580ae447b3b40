"""Files that call themselves GGUF and are broken: refused with a reason, whatever is wrong."""

from __future__ import annotations

import struct
from pathlib import Path

import pytest

from dibit.engine.checkpoint import open_checkpoint
from dibit.engine.errors import CheckpointError


def header(version: int = 3, tensors: int = 0, keys: int = 0, body: bytes = b"") -> bytes:
    return b"GGUF" + struct.pack("<IQQ", version, tensors, keys) + body


def key(name: str, kind: int, value: bytes) -> bytes:
    return struct.pack("<Q", len(name)) + name.encode() + struct.pack("<I", kind) + value


def row(name: str, *, dims: tuple[int, ...] = (32,), kind: int = 0, offset: int = 0) -> bytes:
    return (
        struct.pack("<Q", len(name))
        + name.encode()
        + struct.pack(f"<I{len(dims)}Q", len(dims), *dims)
        + struct.pack("<IQ", kind, offset)
    )


BROKEN: dict[str, tuple[bytes, str]] = {
    "empty": (b"", "ends inside its header"),
    "another-format": (b"PK\x03\x04" * 20, "it is no GGUF file"),
    "version-1": (header(1), "version 1; supported: 2 and 3"),
    "big-endian": (header(0x03000000), "big-endian"),
    "many-keys": (header(keys=1 << 60), "claims .* metadata entries"),
    "many-tensors": (header(tensors=1 << 60), "claims .* tensors"),
    "long-key": (header(keys=1, body=struct.pack("<Q", 1 << 62)), "bytes in a string"),
    "long-list": (header(keys=1, body=key("a", 9, struct.pack("<IQ", 4, 1 << 40))), "numbers in a list"),
    "long-strings": (header(keys=1, body=key("a", 9, struct.pack("<IQ", 8, 1 << 40))), "strings in a list"),
    "list-of-lists": (header(keys=1, body=key("a", 9, struct.pack("<IQ", 9, 1))), "list of lists"),
    "unknown-value": (header(keys=1, body=key("a", 77, b"")), "unknown type 77"),
    "key-twice": (header(keys=2, body=key("a", 0, b"\1") * 2), "twice"),
    "many-dimensions": (header(tensors=1, body=row("t", dims=(1,) * 9)), "dimensions"),
    "tensor-twice": (header(tensors=2, body=row("t") + row("t", offset=128)) + bytes(512), "twice"),
    "unknown-tensor-type": (header(tensors=1, body=row("t", kind=999)) + bytes(512), "type number 999"),
    "half-a-block": (header(tensors=1, body=row("t", dims=(33,), kind=8)) + bytes(512), "whole blocks of 32"),
    "on-top": (header(tensors=2, body=row("t") + row("u", offset=64)) + bytes(512), "on top of another"),
    "misaligned": (header(tensors=1, body=row("t", offset=8)) + bytes(512), "misaligned"),
    "outside": (header(tensors=1, body=row("t", offset=1 << 40)) + bytes(512), "cut short"),
    "overflow": (header(tensors=1, body=row("t", dims=(1 << 32, 1 << 32))) + bytes(512), "cut short"),
    "alignment": (header(keys=1, body=key("general.alignment", 4, struct.pack("<I", 24))), "no power of two"),
    "no-architecture": (header(), "architecture None"),
}


@pytest.mark.parametrize("case", BROKEN)
def test_a_broken_file_is_refused(tmp_path: Path, case: str) -> None:
    data, message = BROKEN[case]
    path = tmp_path / "m.gguf"
    path.write_bytes(data)
    with pytest.raises(CheckpointError, match=message):
        open_checkpoint(path)
