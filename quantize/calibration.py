"""Calibration text: a plain text file becomes a fixed set of token segments.

The text is tokenized once as a whole, cut into segments of `sequence_length` tokens that do not overlap, from a
random phase, and `samples` of them are drawn without replacement. The same file, tokenizer and seed give the same
segments on every machine.
"""

from __future__ import annotations

import hashlib
import random
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from dibit.engine.errors import ConfigError

# Tokenizing much more than this takes minutes and adds nothing: segments are a few million tokens at the very most.
MAX_TEXT_BYTES = 64 << 20


@dataclass(frozen=True)
class Calibration:
    """`samples` segments of `sequence_length` tokens of the text file `text`, drawn with `seed`."""

    text: Path
    samples: int = 128
    sequence_length: int = 2048
    seed: int = 0

    def __post_init__(self) -> None:
        for name in ("samples", "sequence_length"):
            if getattr(self, name) < 1:
                raise ConfigError(f"calibration {name} is {getattr(self, name)}; it must be at least 1")


@dataclass(frozen=True)
class Segments:
    """tokens int64 [samples, sequence_length]; sha256 of the text that was read; how many tokens it had."""

    tokens: Tensor
    text_sha256: str
    text_tokens: int


def load_segments(calibration: Calibration, encode: Callable[[str], list[int]]) -> Segments:
    """The calibration segments. At most the first 64 MiB of the file are read.

    Raises ConfigError when the file is missing, is not UTF-8, or holds too few tokens.
    """
    path, length = calibration.text, calibration.sequence_length
    try:
        with path.open("rb") as file:
            raw = file.read(MAX_TEXT_BYTES + 1)
    except OSError as error:
        raise ConfigError(f"the calibration text {path} cannot be read: {error.strerror or error}") from error
    cut = len(raw) > MAX_TEXT_BYTES
    try:
        # A cut may fall inside a character; anywhere else a broken one means that this is no text.
        content = raw[:MAX_TEXT_BYTES].decode("utf-8", errors="ignore" if cut else "strict")
    except UnicodeDecodeError as error:
        raise ConfigError(f"the calibration text {path} is not UTF-8 text ({error}); give a plain text file") from error
    ids = encode(content)
    available = len(ids) // length
    if available < calibration.samples:
        advice = f"ask for at most {available} samples, " if available else ""
        raise ConfigError(
            f"the calibration text {path} has {len(ids)} tokens, enough for {available} segments of {length}; "
            f"{calibration.samples} were asked for ({calibration.samples * length} tokens): "
            f"{advice}choose a shorter sequence length, or give more text"
        )
    rng = random.Random(calibration.seed)
    phase = rng.randint(0, len(ids) - available * length)
    starts = [phase + i * length for i in rng.sample(range(available), calibration.samples)]
    tokens = torch.tensor([ids[start : start + length] for start in starts], dtype=torch.int64)
    return Segments(tokens=tokens, text_sha256=hashlib.sha256(raw).hexdigest(), text_tokens=len(ids))
