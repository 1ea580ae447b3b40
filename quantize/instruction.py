"""Questions with answers as training text: the conversation goes in, the answers alone count.

A file is a JSON array or JSON lines, each row in one of two forms:

    {"instruction": ..., "input": ..., "output": ...}                      Alpaca; "input" may be empty or absent
    {"messages": [{"role": ..., "content": ...}, ...]}                     OpenAI; every assistant message is an answer

A row becomes what the model's chat template makes of it, exactly as it would be served: an answer begins where the
prompt for its generation ends, and ends with the token that ends the turn. A template that shows an earlier answer
differently once the conversation has gone on (some drop reasoning) gets one example per answer. A model without a
template gets Alpaca's own wording, and only rows of that kind.
"""

from __future__ import annotations

import hashlib
import json
import logging
import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from dibit.engine.errors import ConfigError, RequestError
from dibit.engine.tokenizer import Tokenizer

logger = logging.getLogger(__name__)

MAX_FILE_BYTES = 1 << 30
ROLES = ("system", "user", "assistant")
FORMS = (
    'supported are rows {"instruction": ..., "input": ..., "output": ...} '
    'and {"messages": [{"role": ..., "content": ...}, ...]}'
)
_INTRO = "Below is an instruction that describes a task{}. Write a response that appropriately completes the request."

Message = Mapping[str, str]


@dataclass(frozen=True)
class Examples:
    """Training text.

    tokens    int64 [n, length], padded with 0 behind the end of a row
    counted   bool [n, length]: whether the prediction made at this token, of the next one, counts
    facts     what the examples were made of, for a report and to know them again
    """

    tokens: Tensor
    counted: Tensor
    facts: Mapping[str, int | str]

    def __post_init__(self) -> None:
        if bool(self.counted[:, -1].any()):
            raise ValueError("nothing follows the last token")

    def take(self, rows: Tensor) -> tuple[Tensor, Tensor]:
        """Tokens and counted positions of some rows, no longer than the longest of them needs."""
        counted = self.counted[rows]
        length = int(counted.any(dim=0).nonzero().max()) + 2
        return self.tokens[rows, :length], counted[:, :length]


@dataclass(frozen=True)
class Example:
    """ids, and (start, stop) of every answer in them."""

    ids: tuple[int, ...]
    answers: tuple[tuple[int, int], ...]


def load_instructions(
    path: Path, tokenizer: Tokenizer, *, has_template: bool, samples: int | None, length: int, seed: int
) -> Examples:
    """`samples` examples of at most `length` tokens from the file, in random order; None: all of them.

    An example that is too long loses its end, and one that then has no answer left, or whose answer is empty, is left
    out. Raises ConfigError naming the row for one that is not of a known form, and when nothing is left.
    """
    raw, rows = _rows(path)
    made: list[Example] = []
    cut = empty = 0
    order = list(range(len(rows)))
    random.Random(seed).shuffle(order)
    for i in order:
        if samples is not None and len(made) >= samples:
            break
        messages = _messages(rows[i], f"row {i + 1} of {path}", has_template=has_template)
        if not all(message["content"].strip() for message in messages if message["role"] == "assistant"):
            empty += 1
            continue
        try:
            found = _examples(messages, tokenizer, has_template=has_template)
        except RequestError as error:
            raise ConfigError(f"row {i + 1} of {path}: {error}") from error
        for example in found:
            answers = tuple((a, min(b, length)) for a, b in example.answers if a < length)
            cut += len(example.ids) > length
            if answers:
                made.append(Example(example.ids[:length], answers))
    if empty:
        logger.warning("%d rows of %s have an empty answer and are left out", empty, path)
    if cut:
        logger.warning("%d conversations of %s are longer than %d tokens and lose their end", cut, path, length)
    made = made if samples is None else made[:samples]
    if not made:
        raise ConfigError(
            f"{path} has {len(rows)} rows, and none with an answer within the first {length} tokens; "
            "give other rows, or a longer sequence length"
        )
    facts: dict[str, int | str] = {
        "file": str(path),
        "sha256": hashlib.sha256(raw).hexdigest(),
        "rows": len(rows),
        "samples": len(made),
        "cut": cut,
        "empty": empty,
    }
    return _padded(made, facts)


def _padded(examples: Sequence[Example], facts: Mapping[str, int | str]) -> Examples:
    length = max(len(example.ids) for example in examples)
    tokens = torch.zeros(len(examples), length, dtype=torch.int64)
    counted = torch.zeros(len(examples), length, dtype=torch.bool)
    for i, example in enumerate(examples):
        tokens[i, : len(example.ids)] = torch.tensor(example.ids)
        for start, stop in example.answers:
            # The prediction of a token is made at the one before it.
            counted[i, max(start, 1) - 1 : stop - 1] = True
    return Examples(tokens, counted, facts)


def _rows(path: Path) -> tuple[bytes, list[Any]]:
    try:
        with path.open("rb") as file:
            raw = file.read(MAX_FILE_BYTES + 1)
    except OSError as error:
        raise ConfigError(f"the instructions {path} cannot be read: {error.strerror or error}") from error
    if len(raw) > MAX_FILE_BYTES:
        raise ConfigError(f"the instructions {path} are larger than {MAX_FILE_BYTES >> 30} GiB; give a part of them")
    try:
        text = raw.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise ConfigError(f"the instructions {path} are not UTF-8 text ({error}); {FORMS}") from error
    if text.lstrip()[:1] == "[":
        try:
            rows = json.loads(text)
        except json.JSONDecodeError as error:
            raise ConfigError(f"the instructions {path} are no JSON array: {error}") from error
        return raw, list(rows)
    found = []
    for number, line in enumerate(text.split("\n"), start=1):
        if line.strip():
            try:
                found.append(json.loads(line))
            except json.JSONDecodeError as error:
                raise ConfigError(
                    f"line {number} of {path} is no JSON ({error}); give a JSON array, or one object a line"
                ) from error
    if not found:
        raise ConfigError(f"{path} has no rows; {FORMS}")
    return raw, found


def _messages(row: Any, where: str, *, has_template: bool) -> list[Message]:
    """The conversation of a row, its last message an answer."""
    if isinstance(row, dict) and "messages" in row:
        return _checked(row["messages"], where, has_template=has_template)
    if not isinstance(row, dict) or not {"instruction", "output"} <= set(row):
        shown = f"the keys {', '.join(map(str, row)) or 'none'}" if isinstance(row, dict) else type(row).__name__
        raise ConfigError(f"{where} has {shown}; {FORMS}")
    fields = {name: row.get(name) or "" for name in ("instruction", "input", "output")}
    for name, value in fields.items():
        if not isinstance(value, str):
            raise ConfigError(f"{where}: {name} is {type(value).__name__}; it must be a string")
    if has_template:
        question = "\n\n".join(filter(None, (fields["instruction"], fields["input"])))
    else:
        question = _alpaca(fields["instruction"], fields["input"])
    return [{"role": "user", "content": question}, {"role": "assistant", "content": fields["output"]}]


def _checked(messages: Any, where: str, *, has_template: bool) -> list[Message]:
    if not has_template:
        raise ConfigError(
            f"{where} has messages, and the model no chat template to show them with; "
            "put one beside the model (chat_template.jinja), or give instruction and output"
        )
    if not isinstance(messages, list) or not messages:
        raise ConfigError(f"{where}: messages is {type(messages).__name__}; it must be a list of messages")
    for message in messages:
        if not isinstance(message, dict) or not {"role", "content"} <= set(message):
            raise ConfigError(f"{where} has a message without role and content; {FORMS}")
        if message["role"] not in ROLES or not isinstance(message["content"], str):
            raise ConfigError(
                f"{where} has a message of role {message['role']!r} with content of type "
                f"{type(message['content']).__name__}; supported: text of {', '.join(ROLES)}"
            )
    answers = [i for i, message in enumerate(messages) if message["role"] == "assistant"]
    if not answers:
        raise ConfigError(f"{where} has no message of the assistant, so there is no answer to learn")
    # A question that nobody answered teaches nothing.
    return [{"role": m["role"], "content": m["content"]} for m in messages[: answers[-1] + 1]]


def _alpaca(instruction: str, context: str) -> str:
    intro = _INTRO.format(", paired with an input that provides further context" if context else "")
    shown = f"\n\n### Input:\n{context}" if context else ""
    return f"{intro}\n\n### Instruction:\n{instruction}{shown}\n\n### Response:\n"


def _examples(messages: Sequence[Message], tokenizer: Tokenizer, *, has_template: bool) -> list[Example]:
    if not has_template:
        prompt = tokenizer.encode(messages[0]["content"])
        answer = tokenizer.encode(messages[1]["content"], add_special_tokens=False)
        end = sorted(tokenizer.eos_ids)[:1]
        return [Example((*prompt, *answer, *end), ((len(prompt), len(prompt) + len(answer) + len(end)),))]
    turns = [_turn(messages[: i + 1], tokenizer) for i, m in enumerate(messages) if m["role"] == "assistant"]
    whole = turns[-1].ids
    if all(whole[: turn.answers[0][1]] == turn.ids[: turn.answers[0][1]] for turn in turns):
        return [Example(whole, tuple(answer for turn in turns for answer in turn.answers))]
    return turns


def _turn(messages: Sequence[Message], tokenizer: Tokenizer) -> Example:
    """A conversation up to an answer, which counts from where its text begins to the end of its turn."""
    prompt = tokenizer.apply_chat_template(messages[:-1])
    ids = tokenizer.apply_chat_template(messages, add_generation_prompt=False)
    # Where the prompt's last characters and the answer's first ones make one token, that token counts too.
    start = next((i for i, (a, b) in enumerate(zip(prompt, ids, strict=False)) if a != b), min(len(prompt), len(ids)))
    ends = [i for i in range(start, len(ids)) if ids[i] in tokenizer.eos_ids]
    stop = ends[-1] + 1 if ends else len(ids)
    if stop <= start:
        raise RequestError("the chat template shows no answer", param="messages")
    return Example(tuple(ids), ((start, stop),))
