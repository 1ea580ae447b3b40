"""The journal of a run: survives being cut short, and refuses to mix settings."""

from __future__ import annotations

from pathlib import Path

import pytest

from dibit.engine.errors import ConfigError
from dibit.quantize.journal import FinishedBlock, Journal
from dibit.quantize.report import SiteReport, TrainingReport

SETTINGS = {"method": "gptq", "sizes": (1, 2)}


def site(name: str) -> SiteReport:
    return SiteReport(name, "int4-g64", "gptq", None, 0.1, 0.2, float("nan"), 1.5)


def block(*names: str) -> FinishedBlock:
    training = TrainingReport(
        steps=3,
        losses=((1, 0.5), (3, float("nan"))),
        validation=((0, 0.6),),
        best_step=0,
        baseline=0.7,
        skipped=1,
        restarts=0,
        notes=("one",),
        seconds=0.1,
        tokens_per_s=9.0,
    )
    return FinishedBlock(tuple(site(name) for name in names), {"a.weight": 17}, training)


def test_blocks_are_found_again(tmp_path: Path) -> None:
    journal = Journal(tmp_path, SETTINGS)
    journal.add(0, block("layers.0.qkv", "layers.0.o"))
    journal.add(1, block("layers.1.qkv"))
    found = Journal(tmp_path, SETTINGS).blocks
    assert [[report.site for report in found[i].sites] for i in found] == [
        ["layers.0.qkv", "layers.0.o"],
        ["layers.1.qkv"],
    ]
    assert repr(found[0]) == repr(block("layers.0.qkv", "layers.0.o"))


@pytest.mark.parametrize("lost", [1, 40])
def test_a_line_cut_short_is_dropped(tmp_path: Path, lost: int) -> None:
    journal = Journal(tmp_path, SETTINGS)
    journal.add(0, block("layers.0.qkv"))
    journal.add(1, block("layers.1.qkv"))
    journal.path.write_bytes(journal.path.read_bytes()[: -1 - lost])
    again = Journal(tmp_path, SETTINGS)
    assert list(again.blocks) == [0]
    again.add(1, block("again"))
    assert Journal(tmp_path, SETTINGS).blocks[1].sites[0].site == "again"


def test_other_settings_are_named(tmp_path: Path) -> None:
    Journal(tmp_path, SETTINGS).add(0, block("layers.0.qkv"))
    with pytest.raises(ConfigError, match="method: gptq then, rtn now"):
        Journal(tmp_path, {**SETTINGS, "method": "rtn"})
    assert list(Journal(tmp_path, SETTINGS).blocks) == [0]
