"""Calibration segments: deterministic, from the text, disjoint, and refused with numbers when there are too few."""

from __future__ import annotations

from pathlib import Path

import pytest

from dibit.engine.errors import ConfigError
from dibit.quantize import calibration as module
from dibit.quantize.calibration import Calibration, load_segments


def encode(text: str) -> list[int]:
    return [ord(c) for c in text]


@pytest.fixture
def text(tmp_path: Path) -> Path:
    path = tmp_path / "text.txt"
    path.write_text("".join(chr(0x100 + i) for i in range(1003)))
    return path


def test_segments_are_disjoint_runs_of_the_text(text: Path) -> None:
    found = load_segments(Calibration(text, samples=9, sequence_length=100, seed=3), encode)
    assert found.tokens.shape == (9, 100)
    assert found.text_tokens == 1003
    steps = found.tokens[:, 1:] - found.tokens[:, :-1]
    assert bool((steps == 1).all())
    assert len(set(found.tokens.flatten().tolist())) == 900


def test_the_seed_decides(text: Path) -> None:
    def draw(seed: int) -> list[list[int]]:
        drawn: list[list[int]] = load_segments(
            Calibration(text, samples=4, sequence_length=50, seed=seed), encode
        ).tokens.tolist()
        return drawn

    assert draw(7) == draw(7)
    assert len({str(draw(seed)) for seed in range(5)}) == 5


def test_all_of_the_text_can_be_used(text: Path) -> None:
    found = load_segments(Calibration(text, samples=1, sequence_length=1003), encode)
    assert found.tokens.tolist() == [encode(text.read_text())]


@pytest.mark.parametrize(
    ("samples", "length", "expected"),
    [(11, 100, ["1003 tokens", "10 segments of 100", "1100 tokens", "at most 10 samples"]), (1, 2048, ["0 segments"])],
)
def test_too_little_text_is_refused_with_numbers(text: Path, samples: int, length: int, expected: list[str]) -> None:
    with pytest.raises(ConfigError) as caught:
        load_segments(Calibration(text, samples=samples, sequence_length=length), encode)
    for part in expected:
        assert part in str(caught.value)


def test_missing_and_binary_files_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="cannot be read"):
        load_segments(Calibration(tmp_path / "none.txt"), encode)
    with pytest.raises(ConfigError, match="cannot be read"):
        load_segments(Calibration(tmp_path), encode)
    (tmp_path / "binary").write_bytes(b"\xff\xfe\x00" * 100)
    with pytest.raises(ConfigError, match="not UTF-8"):
        load_segments(Calibration(tmp_path / "binary"), encode)


def test_a_huge_file_is_cut_at_a_character(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "MAX_TEXT_BYTES", 101)
    path = tmp_path / "huge.txt"
    path.write_text("é" * 200)
    found = load_segments(Calibration(path, samples=1, sequence_length=50), encode)
    assert found.text_tokens == 50
    assert set(found.tokens.flatten().tolist()) == {ord("é")}


@pytest.mark.parametrize("field", ["samples", "sequence_length"])
def test_sizes_must_be_positive(text: Path, field: str) -> None:
    with pytest.raises(ConfigError, match=field):
        Calibration(text, **{field: 0})
