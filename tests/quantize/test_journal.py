"""The journal of a run: survives being cut short, and refuses to mix settings."""

from __future__ import annotations

from pathlib import Path

import pytest

from dibit.engine.errors import ConfigError
from dibit.quantize.journal import Journal
from dibit.quantize.report import SiteReport

SETTINGS = {"method": "gptq", "sizes": (1, 2)}


def site(name: str) -> SiteReport:
    return SiteReport(name, "int4-g64", "gptq", None, 0.1, 0.2, float("nan"), 1.5)


def test_blocks_are_found_again(tmp_path: Path) -> None:
    journal = Journal(tmp_path, SETTINGS)
    journal.add(0, [site("layers.0.qkv"), site("layers.0.o")])
    journal.add(1, [site("layers.1.qkv")])
    found = Journal(tmp_path, SETTINGS).blocks
    assert [[report.site for report in reports] for reports in found.values()] == [
        ["layers.0.qkv", "layers.0.o"],
        ["layers.1.qkv"],
    ]
    assert repr(found[0][0]) == repr(site("layers.0.qkv"))


@pytest.mark.parametrize("lost", [1, 40])
def test_a_line_cut_short_is_dropped(tmp_path: Path, lost: int) -> None:
    journal = Journal(tmp_path, SETTINGS)
    journal.add(0, [site("layers.0.qkv")])
    journal.add(1, [site("layers.1.qkv")])
    journal.path.write_bytes(journal.path.read_bytes()[: -1 - lost])
    again = Journal(tmp_path, SETTINGS)
    assert list(again.blocks) == [0]
    again.add(1, [site("again")])
    assert Journal(tmp_path, SETTINGS).blocks[1][0].site == "again"


def test_other_settings_are_named(tmp_path: Path) -> None:
    Journal(tmp_path, SETTINGS).add(0, [site("layers.0.qkv")])
    with pytest.raises(ConfigError, match="method: gptq then, rtn now"):
        Journal(tmp_path, {**SETTINGS, "method": "rtn"})
    assert list(Journal(tmp_path, SETTINGS).blocks) == [0]
