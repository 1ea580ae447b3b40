"""Reading JSON that nobody vouches for: bounded in size and depth, one value per key, always an object."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from typing import Any

from dibit.engine.errors import CheckpointError

MAX_JSON_BYTES = 100_000_000


def parse_object(data: bytes, what: str) -> dict[str, Any]:
    """`what` names the source in messages. Raises CheckpointError on anything but one well-formed object."""
    try:
        value = json.loads(data.decode("utf-8"), object_pairs_hook=lambda pairs: _unique(pairs, what))
    except RecursionError:
        raise CheckpointError(f"{what} is nested too deeply to be what it claims; download it again") from None
    except UnicodeDecodeError as error:
        raise CheckpointError(f"{what} is not UTF-8 text ({error}); download it again") from error
    except ValueError as error:
        if isinstance(error, CheckpointError):
            raise
        raise CheckpointError(f"{what} is not valid JSON ({error}); download it again") from error
    if not isinstance(value, dict):
        raise CheckpointError(f"{what} holds a JSON {type(value).__name__}; expected an object")
    return value


def read_object(path: Path, *, max_bytes: int = MAX_JSON_BYTES) -> dict[str, Any]:
    try:
        with path.open("rb") as file:
            data = file.read(max_bytes + 1)
    except OSError as error:
        raise CheckpointError(f"cannot read {path}: {error.strerror or error}") from error
    if len(data) > max_bytes:
        raise CheckpointError(f"{path} is larger than {max_bytes} bytes; that is no model's JSON file")
    return parse_object(data, str(path))


def _unique(pairs: list[tuple[str, Any]], what: str) -> dict[str, Any]:
    result = dict(pairs)
    if len(result) != len(pairs):
        twice = Counter(key for key, _ in pairs).most_common(1)[0][0]
        raise CheckpointError(f"{what} has the key {twice!r} twice; the file is damaged, download it again")
    return result
