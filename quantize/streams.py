"""The hidden states of the calibration text between two blocks, in memory or in a file.

A stream holds every segment at one depth of the model and is advanced in place, batch by batch. Above a size it lives
in a file mapped into memory. The file has no name from the start, so that nothing is left behind however the process
ends; its room is reserved at once, so that a full disk is an error here and not a crash at some later write.
"""

from __future__ import annotations

import copy
import mmap
import os
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor

from dibit.engine.errors import ConfigError
from dibit.engine.models.decoder import Block

StreamType = Literal["float32", "float16"]
STREAM_TYPES: dict[str, torch.dtype] = {"float32": torch.float32, "float16": torch.float16}


@dataclass(frozen=True)
class StreamConfig:
    """How the hidden states of the calibration text are kept.

    stream_type   element type
    memory_bytes  a larger stream goes to a file beside the output
    """

    stream_type: StreamType = "float32"
    memory_bytes: int = 4 << 30

    def __post_init__(self) -> None:
        if self.stream_type not in STREAM_TYPES:
            raise ConfigError(f"stream_type is {self.stream_type!r}; supported: {', '.join(STREAM_TYPES)}")


class HiddenStates:
    """[samples, length, hidden], kept as `config` says, read and written as float32.

    directory  where the file goes when the stream is too large for memory
    """

    def __init__(self, samples: int, length: int, hidden: int, *, config: StreamConfig, directory: Path) -> None:
        dtype = STREAM_TYPES[config.stream_type]
        self.shape = (samples, length, hidden)
        self._config, self._directory = config, directory
        nbytes = samples * length * hidden * dtype.itemsize
        self.in_file = nbytes > config.memory_bytes
        self._data = _mapped(nbytes, directory).view(dtype) if self.in_file else torch.empty(self.shape, dtype=dtype)
        self._data = self._data.view(self.shape)

    def batches(self, size: int) -> Iterator[tuple[int, Tensor]]:
        """(first segment, float32 [<= size, length, hidden]) over the whole stream; the tensors are copies."""
        for start in range(0, self.shape[0], size):
            # Always fresh memory: what follows must not depend on how a stream is kept.
            yield start, self._data[start : start + size].to(torch.float32, copy=True)

    def rows(self, segments: Tensor) -> Tensor:
        """The segments of those numbers, float32, a copy."""
        return self._data[segments].to(torch.float32)

    def empty_like(self) -> HiddenStates:
        """Another stream, to be written, kept in the same way."""
        return HiddenStates(*self.shape, config=self._config, directory=self._directory)

    def first(self, segments: int) -> HiddenStates:
        """The first segments, not copied."""
        view = copy.copy(self)
        view._data = self._data[:segments]
        view.shape = (view._data.shape[0], *self.shape[1:])
        return view

    def embed(self, embedding: Tensor, tokens: Tensor) -> None:
        """Write what enters the first block: rows of `embedding` [vocab, hidden] for tokens [samples, length]."""
        for i in range(self.shape[0]):
            self.write(i, embedding[tokens[i : i + 1]])

    def write(self, start: int, x: Tensor) -> None:
        """Replace the segments from `start` on. Raises ConfigError when float16 cannot hold them."""
        kept = x.to(self._data.dtype)
        if kept.dtype == torch.float16 and not torch.equal(torch.isfinite(kept), torch.isfinite(x)):
            raise ConfigError(
                f"the hidden states reach {float(x.abs().max()):.3g}, more than float16 holds (65504); "
                "keep the streams as float32"
            )
        self._data[start : start + x.shape[0]] = kept


def advance(
    stream: HiddenStates, block: Block, cos: Tensor, sin: Tensor, *, batch: int, into: HiddenStates | None = None
) -> None:
    """Write the outputs of a block to another stream; without one, over its inputs."""
    for start, x in stream.batches(batch):
        (stream if into is None else into).write(start, block.dense(x, cos, sin))


def _mapped(nbytes: int, directory: Path) -> Tensor:
    with tempfile.TemporaryFile(dir=directory) as file:
        try:
            os.posix_fallocate(file.fileno(), 0, nbytes)
        except OSError as error:
            raise ConfigError(
                f"no room for {nbytes / 2**30:.1f} GiB of hidden states in {directory} ({error.strerror}); "
                "free some, take fewer or shorter samples, or keep the streams as float16"
            ) from error
        # The mapping outlives the descriptor, and the tensor keeps the mapping.
        return torch.frombuffer(mmap.mmap(file.fileno(), nbytes), dtype=torch.uint8)
