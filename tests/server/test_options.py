from __future__ import annotations

import dataclasses

import pytest

from dibit.engine.config import EngineConfig
from dibit.engine.errors import ConfigError
from dibit.server.options import field_helps, parse_assignments, parse_bytes, parse_integers


@pytest.mark.parametrize(
    ("text", "expected"),
    [("1000", 1000), ("2k", 2000), ("512MB", 512_000_000), ("1.5GiB", 3 * 2**29), (" 1 Ti ", 2**40)],
)
def test_parse_bytes(text: str, expected: int) -> None:
    assert parse_bytes(text) == expected


@pytest.mark.parametrize("text", ["", "GB", "-1", "1 parsec", "1e9", "i", "5ib0"])
def test_parse_bytes_refuses(text: str) -> None:
    with pytest.raises(ConfigError, match="not a size"):
        parse_bytes(text)


def test_parse_integers() -> None:
    assert parse_integers("1, 8,32") == [1, 8, 32]
    with pytest.raises(ConfigError, match="1,8,32"):
        parse_integers("1;8")


def test_every_engine_setting_has_help() -> None:
    helps = field_helps(EngineConfig)
    assert set(helps) == {field.name for field in dataclasses.fields(EngineConfig)}
    assert "at most kv_memory_share of free memory" in helps["kv_bytes"], "a continued line is joined"


@dataclasses.dataclass(frozen=True)
class Settings:
    damp: float = 0.01
    steps: int = 3
    fast: bool = False


def test_parse_assignments() -> None:
    assert parse_assignments(Settings, ["damp=0.5", "fast=true", "steps=7"]) == {"damp": 0.5, "fast": True, "steps": 7}


@pytest.mark.parametrize("text", ["damp", "speed=1", "steps=1.5", "fast=maybe"])
def test_parse_assignments_refuses(text: str) -> None:
    with pytest.raises(ConfigError):
        parse_assignments(Settings, [text])
