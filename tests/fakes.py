"""Stand-ins for the model and the tokenizer: engine and server tests run in milliseconds and without torch.

`FakeRunner` keeps a real paged cache. What it stores at a position depends on the position before, as it finds it
through the request's block table, and the next token on everything it reads back: a wrong block table, a block shared
between different prefixes or a token that was never computed gives a different token, or an error.
"""

from __future__ import annotations

import dataclasses
import math
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Unpack

from dibit.engine.config import EngineConfig
from dibit.engine.core import EngineCore
from dibit.engine.detokenizer import IncrementalDetokenizer
from dibit.engine.errors import RequestError
from dibit.engine.request import Request, TokenLogprob
from dibit.engine.step import Chunk, Sampled, Step, StepCounts, StepResult
from dibit.engine.tokenizer import ChatOptions

BOS, EOS = 256, 257
VOCAB = 258
PRINTABLE = range(32, 127)


class ByteTokenizer:
    """A `Tokenizer` whose tokens are the 256 bytes, BOS and EOS."""

    eos_ids = frozenset({EOS})
    vocab_size = VOCAB

    def encode(self, text: str, *, add_special_tokens: bool = True) -> list[int]:
        return [BOS] * add_special_tokens + list(text.encode())

    def decode(self, ids: Sequence[int], *, skip_special_tokens: bool = True) -> str:
        keep = [i for i in ids if not skip_special_tokens or i < 256]
        return b"".join(self.token_bytes(i) for i in keep).decode("utf-8", "replace")

    def apply_chat_template(
        self,
        messages: Sequence[Mapping[str, Any]],
        **options: Unpack[ChatOptions],
    ) -> list[int]:
        return self.encode(self.chat_text(messages, **options))

    def chat_text(
        self,
        messages: Sequence[Mapping[str, Any]],
        *,
        add_generation_prompt: bool = True,
        continue_final_message: bool = False,
        tools: Sequence[Mapping[str, Any]] | None = None,
        template_args: Mapping[str, Any] | None = None,
    ) -> str:
        """ "role: content" lines. Refuses roles it does not know, as real templates do."""
        for message in messages:
            if message["role"] not in ("system", "user", "assistant", "tool"):
                raise RequestError(f"the model's chat template has no role {message['role']!r}", param="messages")
        text = "".join(f"{message['role']}: {message['content']}\n" for message in messages)
        if continue_final_message:
            return text.removesuffix("\n")
        return text + ("assistant: " if add_generation_prompt else "")

    def token_text(self, token_id: int) -> str:
        return self.token_bytes(token_id).decode("utf-8", "replace")

    def token_bytes(self, token_id: int) -> bytes:
        return {BOS: b"<s>", EOS: b"</s>"}.get(token_id) or bytes([token_id])

    def text_bytes(self, token_id: int, *, first: bool) -> bytes | None:
        return bytes([token_id]) if token_id < 256 else None

    def stream(
        self, prompt_ids: Sequence[int], *, stop: Sequence[str] = (), include_stop: bool = False
    ) -> IncrementalDetokenizer:
        return IncrementalDetokenizer(self, prompt_ids, stop, include_stop=include_stop)


class FakeRunner:
    """A `Runner` whose next token is a hash of the prefix, as read from the cache: printable ASCII, never EOS.

    reply         says this (bytes, or token ids with EOS where wanted) instead, then starts over
    step_delay_s  every step takes that long
    num_layers    that chunks may be cut into; a slice that is not the next one of its chunk, or the last one again, is
                  an error
    on_execute    called with every step before it is computed; may raise
    bad_ids       requests that make every step raise in which they take part
    failing_rows  requests that fail by themselves (`StepResult.failed`), with the message
    """

    def __init__(
        self,
        *,
        num_blocks: int = 64,
        block_size: int = 4,
        max_model_len: int = 256,
        num_layers: int = 1,
        reply: Sequence[int] | None = None,
        step_delay_s: float = 0.0,
        on_execute: Callable[[Step], None] | None = None,
    ) -> None:
        self.num_blocks = num_blocks
        self.block_size = block_size
        self.max_model_len = max_model_len
        self.num_layers = num_layers
        self.reply = reply
        self.step_delay_s = step_delay_s
        self.on_execute = on_execute
        self.bad_ids: set[str] = set()
        self.failing_rows: dict[str, str] = {}
        self.steps: list[Step] = []
        self.num_computed_tokens = 0
        self.step_counts = StepCounts()
        self._sliced: tuple[Request, int, int] | None = None
        self._layers: set[int] = set()
        self._cache: list[list[int | None]] = [[None] * block_size for _ in range(num_blocks)]

    def execute(self, step: Step) -> StepResult:
        self.steps.append(step)
        assert step.chunks
        assert len({chunk.request.id for chunk in step.chunks}) == len(step.chunks)
        if self.step_delay_s:
            time.sleep(self.step_delay_s)
        if self.on_execute is not None:
            self.on_execute(step)
        if bad := self.bad_ids & {chunk.request.id for chunk in step.chunks}:
            raise RuntimeError(f"cannot compute {sorted(bad)}")
        for chunk in step.chunks:
            if not chunk.whole:
                self._slice(chunk)
            if chunk.last_layer is None:
                self._compute(chunk)
        further: dict[str, tuple[Sampled, ...]] = {}
        sampled: dict[str, Sampled] = {}
        prompt_logprobs: dict[str, tuple[TokenLogprob, ...]] = {}
        failed: dict[str, str] = {}
        for chunk in step.chunks:
            request = chunk.request
            if request.id in self.failing_rows:
                failed[request.id] = self.failing_rows[request.id]
                continue
            if chunk.last_layer is not None:
                continue
            states = [self._read(request, position) for position in range(chunk.stop)]
            if chunk.samples:
                token = next_token(request, states, reply=self.reply)
                top = request.params.logprobs
                sampled[request.id] = Sampled(token, None if top is None else fake_logprob(token, top=top))
            if chunk.drafts:
                further[request.id] = self._verify(chunk, sampled[request.id])
            if (top := request.params.prompt_logprobs) is not None:
                targets = request.prompt_ids[chunk.start + 1 : chunk.stop + 1]
                prompt_logprobs[request.id] = tuple(fake_logprob(target, top=top) for target in targets)
        return StepResult(sampled, prompt_logprobs, failed, further)

    def _verify(self, chunk: Chunk, first: Sampled) -> tuple[Sampled, ...]:
        ahead = dataclasses.replace(chunk.request, token_ids=list(chunk.request.token_ids))
        found = [first]
        for draft in chunk.drafts:
            if found[-1].token_id != draft:
                break
            ahead.token_ids.append(draft)
            states = [self._read(ahead, position) for position in range(ahead.num_tokens)]
            found.append(Sampled(next_token(ahead, states, reply=self.reply)))
        return tuple(found[1:])

    def _slice(self, chunk: Chunk) -> None:
        sliced = (chunk.request, chunk.start, chunk.count)
        if chunk.first_layer == 0:
            self._sliced, self._layers = sliced, {0}
        assert self._sliced is not None
        assert (self._sliced[0] is chunk.request, self._sliced[1:]) == (True, sliced[1:]), "another chunk began since"
        assert chunk.first_layer in self._layers, f"layer {chunk.first_layer} after {self._layers}"
        if chunk.last_layer is not None:
            assert chunk.first_layer < chunk.last_layer < self.num_layers
            self._layers = {chunk.first_layer, chunk.last_layer}

    def _compute(self, chunk: Chunk) -> None:
        request = chunk.request
        self.num_computed_tokens += chunk.count + len(chunk.drafts)
        tokens = [*request.token_ids[: chunk.stop], *chunk.drafts]
        for position in range(chunk.start, len(tokens)):
            before = self._read(request, position - 1) if position else 0
            row = self._cache[request.block_ids[position // self.block_size]]
            row[position % self.block_size] = hash((before, tokens[position]))

    def _read(self, request: Request, position: int) -> int:
        state = self._cache[request.block_ids[position // self.block_size]][position % self.block_size]
        assert state is not None, f"{request.id}: position {position} was never computed"
        return state


def next_token(request: Request, states: Sequence[int], *, reply: Sequence[int] | None = None) -> int:
    if reply is not None:
        return reply[request.num_output % len(reply)]
    drawn = () if request.params.greedy else (request.seed, request.num_output)
    return PRINTABLE[hash((*states, *drawn)) % len(PRINTABLE)]


def solo_tokens(prompt_ids: Sequence[int], count: int) -> list[int]:
    """What a FakeRunner's greedy request generates when nothing goes wrong, computed without any cache."""
    tokens = list(prompt_ids)
    while len(tokens) < len(prompt_ids) + count:
        states: list[int] = []
        for token in tokens:
            states.append(hash((states[-1] if states else 0, token)))
        tokens.append(PRINTABLE[hash(tuple(states)) % len(PRINTABLE)])
    return tokens[len(prompt_ids) :]


def fake_logprob(token: int, *, top: int) -> TokenLogprob:
    """Always the most likely one; the alternatives are the ids after it, each half as likely as the one before."""
    likely = [((token + i) % VOCAB, math.log(0.5) * (i + 1)) for i in range(top)]
    return TokenLogprob(token, math.log(0.5), 1, tuple(likely))


def fake_core(runner: FakeRunner | None = None, **settings: Any) -> EngineCore:
    """A core over a FakeRunner; keywords are EngineConfig fields."""
    return EngineCore(runner or FakeRunner(), ByteTokenizer(), EngineConfig(**settings))
