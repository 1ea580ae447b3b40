"""Requests of a serving benchmark: random text of given lengths, or prompts of a local file.

Lengths are in tokens of the server's tokenizer. Random prompts are words of its vocabulary, drawn anew for every run,
so that nothing of one comes from the prefix cache of another; the lengths are those that encoding the text gives.

File formats: ShareGPT (a JSON list of conversations; the first message is the prompt, the length of the second is
the length of the answer) and custom (JSON lines with "prompt" and perhaps "output_tokens").
"""

from __future__ import annotations

import json
import math
import random
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from dibit.engine.errors import ConfigError
from dibit.engine.tokenizer import Tokenizer

DatasetName = Literal["random", "sharegpt", "custom"]

_FITTING_ROUNDS = 10
_LEAST_WORDS = 64
# Conversations outside of these lengths are left out, as every benchmark on this data does.
_LEAST_TOKENS, _MOST_PROMPT_TOKENS, _MOST_TOKENS = 4, 1024, 2048


@dataclass(frozen=True)
class Prompt:
    """One request; `input_tokens` is 0 where it was not counted."""

    text: str
    input_tokens: int
    output_tokens: int


@dataclass(frozen=True)
class Dataset:
    """Where prompts come from.

    path           file of a sharegpt or custom dataset
    input_len      tokens of a random prompt, those that every text starts with (BOS) counted
    output_len     tokens asked for; None: what the file says
    range_ratio    random lengths are even between (1 - r) and (1 + r) times those
    prefix_len     tokens at the start of every random prompt that are the same in all; on top of input_len
    oversample     prompts of a file may be repeated when it has too few
    """

    name: DatasetName = "random"
    path: Path | None = None
    input_len: int = 1024
    output_len: int | None = 128
    range_ratio: float = 0.0
    prefix_len: int = 0
    oversample: bool = False

    def __post_init__(self) -> None:
        if (self.path is None) != (self.name == "random"):
            told = "reads no file" if self.name == "random" else "needs a file"
            raise ConfigError(f"dataset {self.name} {told}: --dataset-path goes with sharegpt and custom")
        if not 0 <= self.range_ratio < 1:
            raise ConfigError(f"range ratio {self.range_ratio}; it must be at least 0 and below 1")
        if self.input_len < 1 or self.prefix_len < 0 or (self.output_len is not None and self.output_len < 1):
            raise ConfigError("lengths must be at least one token")


def draw_prompts(dataset: Dataset, count: int, tokenizer: Tokenizer | None, *, seed: int) -> list[Prompt]:
    """`count` prompts, the same for the same seed. Raises ConfigError."""
    if dataset.name == "random":
        return _random_prompts(dataset, count, _needed(tokenizer, "random text"), seed=seed)
    assert dataset.path is not None
    if dataset.name == "sharegpt":
        tokenizer = _needed(tokenizer, "the lengths of a conversation")
        found = list(_conversations(_json(dataset.path), tokenizer, output_len=dataset.output_len))
    else:
        found = list(_custom(dataset.path, tokenizer, output_len=dataset.output_len))
    random.Random(seed).shuffle(found)
    if not found or (len(found) < count and not dataset.oversample):
        raise ConfigError(
            f"{dataset.path} has {len(found)} prompts that can be used, {count} were asked for; lower --num-prompts, "
            "or repeat prompts with --oversample (repeated ones are served from the prefix cache)"
        )
    return [found[i % len(found)] for i in range(count)]


def _needed(tokenizer: Tokenizer | None, what: str) -> Tokenizer:
    if tokenizer is None:
        raise ConfigError(
            f"{what} needs the model's tokenizer; give --tokenizer a directory, a .gguf file or a Hub id, "
            "or use --dataset-name custom"
        )
    return tokenizer


def _random_prompts(dataset: Dataset, count: int, tokenizer: Tokenizer, *, seed: int) -> list[Prompt]:
    draw = random.Random(seed)
    words = _words(tokenizer)

    def length(middle: int) -> int:
        low, high = middle * (1 - dataset.range_ratio), middle * (1 + dataset.range_ratio)
        return max(1, draw.randint(math.floor(low), math.ceil(high)))

    prefix = [draw.choice(words) for _ in range(dataset.prefix_len)]
    output_len = dataset.output_len if dataset.output_len is not None else 128
    prompts = []
    for _ in range(count):
        text, tokens = _fitted(prefix, length(dataset.input_len) + dataset.prefix_len, words, tokenizer, draw)
        prompts.append(Prompt(text, tokens, length(output_len)))
    return prompts


def _words(tokenizer: Tokenizer) -> list[str]:
    """Tokens that are a space and a word, which stay one token each when put together; any text where there are few."""
    pieces = [tokenizer.text_bytes(i, first=False) for i in range(tokenizer.vocab_size)]
    texts = [piece.decode() for piece in pieces if piece and piece.isascii()]
    words = [text for text in texts if text[0] == " " and text[1:].isalpha()]
    if len(words) < _LEAST_WORDS:
        words = [text for text in texts if text.isprintable()]
    if not words:
        raise ConfigError("the tokenizer has no tokens of plain text; use --dataset-name custom")
    return words


def _fitted(
    prefix: Sequence[str], tokens: int, words: Sequence[str], tokenizer: Tokenizer, draw: random.Random
) -> tuple[str, int]:
    """Text after `prefix` that encodes to `tokens` tokens, or nearly, and how many they are."""
    own = [draw.choice(words) for _ in range(max(1, tokens - len(prefix)))]
    best: tuple[int, str, int] | None = None
    for _ in range(_FITTING_ROUNDS):
        text = "".join([*prefix, *own])
        found = len(tokenizer.encode(text))
        if best is None or abs(found - tokens) < best[0]:
            best = (abs(found - tokens), text, found)
        if found == tokens or (found > tokens and len(own) == 1):
            break
        if found > tokens:
            del own[-min(found - tokens, len(own) - 1) :]
        else:
            own += [draw.choice(words) for _ in range(tokens - found)]
    assert best is not None
    return best[1], best[2]


def _json(path: Path) -> Any:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ConfigError(f"cannot read {path}: {error}") from error


def _conversations(data: Any, tokenizer: Tokenizer, *, output_len: int | None) -> Iterator[Prompt]:
    if not isinstance(data, list):
        raise ConfigError('a ShareGPT file is a JSON list of {"conversations": [{"from": ..., "value": ...}, ...]}')
    for entry in data:
        turns = entry.get("conversations") if isinstance(entry, dict) else None
        if not isinstance(turns, list) or len(turns) < 2:
            continue
        texts = [turn.get("value") for turn in turns[:2] if isinstance(turn, dict)]
        question, answer = texts if len(texts) == 2 else (None, None)
        if not isinstance(question, str) or not isinstance(answer, str):
            continue
        asked, answered = len(tokenizer.encode(question)), len(tokenizer.encode(answer))
        if min(asked, answered) < _LEAST_TOKENS:
            continue
        answered = answered if output_len is None else output_len
        if asked <= _MOST_PROMPT_TOKENS and asked + answered <= _MOST_TOKENS:
            yield Prompt(question, asked, answered)


def _custom(path: Path, tokenizer: Tokenizer | None, *, output_len: int | None) -> Iterator[Prompt]:
    count: Callable[[str], int] = (lambda text: 0) if tokenizer is None else (lambda text: len(tokenizer.encode(text)))
    for number, line in _lines(path):
        try:
            entry = json.loads(line)
        except ValueError as error:
            raise ConfigError(f"{path}, line {number} is not JSON: {error}") from error
        if not isinstance(entry, dict) or not isinstance(entry.get("prompt"), str):
            raise ConfigError(f'{path}, line {number} is no prompt; write {{"prompt": "...", "output_tokens": 64}}')
        tokens = entry.get("output_tokens") if output_len is None else output_len
        if not isinstance(tokens, int) or isinstance(tokens, bool) or tokens < 1:
            raise ConfigError(
                f"{path}, line {number}: output_tokens is {tokens!r}, it must be a whole number from 1; "
                "--custom-output-len sets one for all"
            )
        yield Prompt(entry["prompt"], count(entry["prompt"]), tokens)


def _lines(path: Path) -> Iterable[tuple[int, str]]:
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, ValueError) as error:
        raise ConfigError(f"cannot read {path}: {error}") from error
    return [(number, line) for number, line in enumerate(lines, start=1) if line.strip()]
