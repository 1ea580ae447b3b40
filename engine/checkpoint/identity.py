"""Which model files these are, told without reading them whole.

Two checkpoints have one identity only if their files agree in name, size, time of the last change and the bytes at
SAMPLES places, the first and last ones among them. The path is no part of it: what is moved stays what it was. Times
alone would not do, as images and archives often give every file the same one.
"""

from __future__ import annotations

import hashlib
from pathlib import Path

from dibit.engine.errors import CheckpointError

SAMPLES = 64
SAMPLE_BYTES = 4096
SUFFIXES = (".safetensors", ".gguf", ".json")


def identity(path: Path) -> str:
    """A digest in hexadecimal of the checkpoint at `path`, a directory or a file. Raises CheckpointError."""
    digest = hashlib.sha256()
    try:
        files = [path] if path.is_file() else sorted(p for p in path.iterdir() if p.suffix in SUFFIXES)
        for file in files:
            about = file.stat()
            digest.update(f"{file.name}\0{about.st_size}\0{about.st_mtime_ns}\0".encode())
            with file.open("rb", buffering=0) as stream:
                for start in _places(about.st_size):
                    stream.seek(start)
                    digest.update(stream.read(SAMPLE_BYTES))
    except OSError as error:
        raise CheckpointError(f"{error.filename or path} cannot be read: {error.strerror or error}") from error
    return digest.hexdigest()


def _places(size: int) -> list[int]:
    last = max(0, size - SAMPLE_BYTES)
    if last <= SAMPLE_BYTES * (SAMPLES - 1):
        return list(range(0, last + SAMPLE_BYTES, SAMPLE_BYTES))
    return [last * i // (SAMPLES - 1) for i in range(SAMPLES)]
