"""What an unfinished run has finished: its settings, then a line per block. Lies beside the shards until the end.

A block's line is on disk before its weights are declared complete, so a block that can be reused always has its
report. A line cut short by a crash is the last one, and is dropped.
"""

from __future__ import annotations

import dataclasses
import json
import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from dibit.engine.errors import ConfigError
from dibit.quantize.report import SiteReport, TrainingReport

JOURNAL_NAME = "quantize_journal.jsonl"


@dataclass(frozen=True)
class FinishedBlock:
    """What is noted of a block.

    sites     their reports
    floats    checksums, by name, of norms and biases that were written in place of the source's
    training  how the training went; None without any
    """

    sites: tuple[SiteReport, ...]
    floats: Mapping[str, int] = field(default_factory=dict)
    training: TrainingReport | None = None

    @classmethod
    def from_line(cls, line: Mapping[str, Any]) -> FinishedBlock:
        training = line["training"]
        return cls(
            tuple(SiteReport.from_dict(site) for site in line["sites"]),
            line["floats"],
            None if training is None else TrainingReport.from_dict(training),
        )


MAX_SHOWN = 100


class Journal:
    """The journal in `directory`, begun or continued.

    Raises ConfigError when it was begun with other settings: the blocks of two settings do not make a model.
    """

    def __init__(self, directory: Path, settings: Mapping[str, Any]) -> None:
        self.path = directory / JOURNAL_NAME
        self.blocks: dict[int, FinishedBlock] = {}
        settings = json.loads(json.dumps(settings))
        lines = _lines(self.path)
        if lines:
            check_same(lines[0], settings, directory)
            for line in lines[1:]:
                self.blocks[line["layer"]] = FinishedBlock.from_line(line)
        # Rewritten rather than appended to, so that a line cut short does not stay in front of the next one.
        kept = [settings, *(_line(layer, block) for layer, block in self.blocks.items())]
        aside = self.path.with_suffix(".new")
        aside.write_text("".join(json.dumps(line) + "\n" for line in kept), encoding="utf-8")
        aside.replace(self.path)

    def add(self, layer: int, block: FinishedBlock) -> None:
        """Note a block; on disk when this returns."""
        self.blocks[layer] = block
        with self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(_line(layer, block)) + "\n")
            file.flush()
            os.fsync(file.fileno())


def stored_settings(directory: Path) -> Mapping[str, Any]:
    """Settings of the run whose journal lies in `directory`; empty when there is none."""
    lines = _lines(directory / JOURNAL_NAME)
    return lines[0] if lines else {}


def _lines(path: Path) -> list[Any]:
    if not path.exists():
        return []
    lines = []
    for text in path.read_text(encoding="utf-8", errors="replace").splitlines():
        try:
            lines.append(json.loads(text))
        except json.JSONDecodeError:
            break
    return lines


def _line(layer: int, block: FinishedBlock) -> dict[str, Any]:
    return {"layer": layer, **dataclasses.asdict(block)}


def check_same(found: Mapping[str, Any], settings: Mapping[str, Any], directory: Path) -> None:
    """Raises ConfigError when settings differ from those of the interrupted run in `directory`."""
    different = sorted(key for key in {*found, *settings} if found.get(key) != settings.get(key))
    if different:
        changes = "; ".join(
            f"{key}: {_short(found.get(key))} then, {_short(settings.get(key))} now" for key in different
        )
        raise ConfigError(
            f"{directory} holds an interrupted run with other settings ({changes}); "
            "repeat the call with those to continue it, or delete the directory to begin anew"
        )


def _short(value: Any) -> str:
    """A plan or the scores of many blocks would drown the rest of the message."""
    text = str(value)
    return text if len(text) <= MAX_SHOWN else f"{text[:MAX_SHOWN]}..."
