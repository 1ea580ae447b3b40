"""What an unfinished checkpoint has on disk: its parts, what is in each, and the settings it is made with.

One small JSON file beside the parts, replaced as a whole after each part is safely on disk. A part is listed only
after it is complete, so whatever is not listed is rubbish of a run that was killed.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from dibit.engine.checkpoint.json_file import read_object
from dibit.engine.checkpoint.safetensors_file import SafetensorsFile
from dibit.engine.checkpoint.shard_file import checksum, write_text
from dibit.engine.errors import CheckpointError
from dibit.kernels.formats import ZeroGrid

log = logging.getLogger(__name__)

PROGRESS_NAME = "writer_progress.json"
_VERSION = 1


@dataclass(frozen=True)
class PackedModule:
    """How a packed linear was written."""

    bits: int
    group_size: int
    symmetric: bool
    zero_grid: ZeroGrid = "integer"


@dataclass(frozen=True)
class Part:
    """A complete .safetensors file; a name in a later part replaces the same name in an earlier one."""

    file: str
    crc: int
    names: tuple[str, ...]
    modules: Mapping[str, PackedModule] = field(default_factory=dict)


def save_progress(directory: Path, settings: Mapping[str, Any], parts: list[Part]) -> None:
    content = {"version": _VERSION, "settings": settings, "parts": [asdict(part) for part in parts]}
    write_text(directory / PROGRESS_NAME, json.dumps(content))


def load_progress(directory: Path, settings: Mapping[str, Any]) -> list[Part]:
    """Parts of an earlier run that are still as they were written.

    Raises CheckpointError when that run had other settings.
    """
    path = directory / PROGRESS_NAME
    if not path.exists():
        return []
    content = read_object(path)
    if content.get("version") != _VERSION or content.get("settings") != json.loads(json.dumps(settings)):
        raise CheckpointError(
            f"{directory} holds an interrupted run with other settings or of another model; repeat the command with "
            f"those settings to continue it, delete the directory to begin anew, or choose another output directory"
        )
    try:
        parts = [_part(item) for item in content["parts"]]
    except (KeyError, TypeError) as error:
        raise CheckpointError(f"{path} is damaged; delete {directory} to begin anew") from error
    return [part for part in parts if _is_intact(directory, part)]


def _part(item: Any) -> Part:
    modules = {name: PackedModule(**module) for name, module in item["modules"].items()}
    if Path(item["file"]).name != item["file"]:
        raise KeyError(item["file"])
    return Part(item["file"], item["crc"], tuple(item["names"]), modules)


def _is_intact(directory: Path, part: Part) -> bool:
    path = directory / part.file
    try:
        file = SafetensorsFile(path)
        file.close()
        intact = set(file.entries) == set(part.names) and checksum(path) == part.crc
    except (CheckpointError, OSError):
        intact = False
    if not intact:
        log.warning("%s is not as it was written; what it held is made again", path)
    return intact
