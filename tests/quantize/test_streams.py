"""Hidden states between blocks: what is written is read back, in memory or in a file that leaves no trace."""

from __future__ import annotations

import errno
import os
from pathlib import Path

import pytest
import torch

from dibit.engine.errors import ConfigError
from dibit.quantize.streams import HiddenStates, StreamConfig, StreamType


@pytest.mark.parametrize("memory_bytes", [0, 1 << 20])
@pytest.mark.parametrize("stream_type", ["float32", "float16"])
def test_what_is_written_is_read(tmp_path: Path, memory_bytes: int, stream_type: StreamType) -> None:
    config = StreamConfig(stream_type=stream_type, memory_bytes=memory_bytes)
    stream = HiddenStates(5, 3, 7, config=config, directory=tmp_path)
    assert stream.in_file == (memory_bytes == 0)
    assert list(tmp_path.iterdir()) == []
    x = torch.randn(5, 3, 7).half().float()
    stream.write(0, x[:4])
    stream.write(4, x[4:])
    starts, found = zip(*stream.batches(2), strict=True)
    assert starts == (0, 2, 4)
    assert torch.equal(torch.cat(found), x)
    found[0].fill_(9.0)
    assert torch.equal(next(stream.batches(5))[1], x)


def test_float16_says_when_it_overflows(tmp_path: Path) -> None:
    stream = HiddenStates(1, 1, 2, config=StreamConfig(stream_type="float16"), directory=tmp_path)
    with pytest.raises(ConfigError, match="keep the streams as float32"):
        stream.write(0, torch.tensor([[[1.0, 7e4]]]))


def test_no_room_is_said_at_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(fd: int, offset: int, length: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "posix_fallocate", full)
    with pytest.raises(ConfigError, match="No space left"):
        HiddenStates(4, 4, 4, config=StreamConfig(memory_bytes=0), directory=tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_an_unknown_type_is_refused() -> None:
    with pytest.raises(ConfigError, match="float32, float16"):
        StreamConfig(stream_type="int8")  # type: ignore[arg-type]


def test_the_first_segments_are_the_same_memory(tmp_path: Path) -> None:
    stream = HiddenStates(3, 2, 4, config=StreamConfig(), directory=tmp_path)
    stream.write(0, torch.arange(24.0).view(3, 2, 4))
    view = stream.first(2)
    assert view.shape == (2, 2, 4)
    stream.write(1, torch.zeros(1, 2, 4))
    assert torch.equal(torch.cat([x for _, x in view.batches(1)]), stream.rows(torch.tensor([0, 1])))
    assert stream.first(5).shape == stream.shape == (3, 2, 4)
