"""The identity of model files: the same after a move, another after any change."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import pytest

from dibit.engine.checkpoint.identity import SAMPLE_BYTES, SAMPLES, identity
from dibit.engine.errors import CheckpointError

LARGE = 3 * SAMPLES * SAMPLE_BYTES + 17


@pytest.fixture
def model(tmp_path: Path) -> Path:
    folder = tmp_path / "model"
    folder.mkdir()
    (folder / "config.json").write_text("{}")
    (folder / "model.safetensors").write_bytes(bytes(range(256)) * (LARGE // 256 + 1))
    return folder


def rewrite(path: Path, at: int) -> None:
    """Change one byte and put the time of the last change back."""
    before = path.stat()
    with path.open("r+b") as file:
        file.seek(at)
        byte = file.read(1)[0]
        file.seek(at)
        file.write(bytes([byte ^ 1]))
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))


def test_a_copy_with_its_times_is_the_same(model: Path, tmp_path: Path) -> None:
    shutil.copytree(model, tmp_path / "copy")
    assert identity(tmp_path / "copy") == identity(model)


@pytest.mark.parametrize("at", [0, SAMPLE_BYTES - 1, LARGE // 256 * 256 + 255])
def test_bytes_count_where_times_do_not_tell(model: Path, at: int) -> None:
    before = identity(model)
    rewrite(model / "model.safetensors", at)
    assert identity(model) != before


def test_every_byte_of_a_small_file_counts(model: Path) -> None:
    small = model / "config.json"
    small.write_text("x" * (SAMPLE_BYTES * SAMPLES))
    for at in (1, SAMPLE_BYTES, 30 * SAMPLE_BYTES + 5, SAMPLE_BYTES * SAMPLES - 1):
        before = identity(model)
        rewrite(small, at)
        assert identity(model) != before


def test_time_and_name_count(model: Path) -> None:
    before = identity(model)
    os.utime(model / "config.json", (1, 1))
    touched = identity(model)
    (model / "config.json").rename(model / "other.json")
    assert len({before, touched, identity(model)}) == 3


def test_a_missing_checkpoint_is_named(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"gone\.gguf"):
        identity(tmp_path / "gone.gguf")
