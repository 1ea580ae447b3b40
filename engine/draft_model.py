"""A second, smaller model that guesses what the first one will say; the first one then verifies all of it in a step.

Both see the same block tables: the keys and values of a token lie in one block of either cache, so that the scheduler
knows of one pool. The draft model reads a text only once it is to guess how it goes on, and then what it has not read
yet: the token or two since its last guess, or, in bounded pieces that are not part of any step's time, everything.
Blocks that it has read are known by their content (the prefix cache's keys), whoever read them.

A guess is drawn as the request will draw, from the draft model's logits: greedy, or with the request's own numbers
where it has a seed. Without a seed it is drawn by itself, with its odds (verification.py). What goes wrong here costs
no request anything but speed.
"""

from __future__ import annotations

import dataclasses
import logging
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from torch import Tensor

from dibit.engine.config import EngineConfig
from dibit.engine.errors import ConfigError
from dibit.engine.memory_plan import CacheSize
from dibit.engine.models.decoder import Decoder
from dibit.engine.request import Request
from dibit.engine.runner import ModelRunner
from dibit.engine.sampler import Highest, sample
from dibit.engine.speculation import Asked, Odds, Proposal
from dibit.engine.step import Chunk, Sampled, Step
from dibit.engine.tokenizer import Tokenizer
from dibit.engine.verification import guess

log = logging.getLogger(__name__)

# Odds have no more tokens than this: those of a guess are kept until it is judged.
MOST_ODDS = 256
MAX_FAILURES = 3


@dataclass(slots=True)
class _Guessing:
    """A request as it would go on.

    ahead  the request with the tokens guessed so far; greedy where guesses have odds
    drawn  the same with the parameters that odds are of, or None
    """

    asked: Asked
    ahead: Request
    drawn: Request | None
    tokens: list[int] = field(default_factory=list)
    odds: list[Odds] = field(default_factory=list)
    ended: bool = False

    @property
    def wants(self) -> bool:
        return not self.ended and len(self.tokens) < self.asked.count


class DraftModel:
    """Implements speculation.Drafter.

    num_blocks     of the cache, those of the model that it guesses for
    max_model_len  of that model; the draft model's own limit may be lower, longer texts then have no drafts
    vocab_size     ids that may be guessed: 0 to vocab_size - 1
    clock          seconds, for spent_s
    """

    def __init__(
        self,
        decoder: Decoder,
        config: EngineConfig,
        *,
        num_blocks: int,
        max_model_len: int,
        vocab_size: int,
        clock: Callable[[], float] = time.perf_counter,
    ) -> None:
        if decoder.sizes.vocab < vocab_size:
            raise ConfigError(
                f"the draft model has {decoder.sizes.vocab} tokens and the model {vocab_size}: it cannot read all of "
                "its texts. A draft model must have the same vocabulary"
            )
        size = CacheSize.of(
            decoder.sizes,
            config,
            quantized=decoder.quantized,
            num_blocks=num_blocks,
            max_model_len=min(max_model_len, decoder.sizes.max_positions),
        )
        self.runner = ModelRunner(decoder, config, size=size, choose=self._choose)
        self.spent_s = 0.0
        self._clock = clock
        self._vocab_size = vocab_size
        self._failures = 0
        self._guessing: dict[str, _Guessing] = {}
        # What was read into a block, by the key of the block's content and all before it.
        self._known: dict[int, bytes] = {}

    def available(self, request: Request, most: int) -> int:
        if self._failures >= MAX_FAILURES:
            return 0
        return max(0, min(most, self.runner.max_model_len - request.num_tokens))

    def propose(self, asked: Sequence[Asked], *, catch_up_tokens: int) -> list[Proposal]:
        self.spent_s = 0.0
        try:
            ready = self._catch_up([ask.request for ask in asked], catch_up_tokens)
            started_s = self._clock()
            found = self._guess([ask for ask in asked if ask.request.id in ready])
            self.spent_s = self._clock() - started_s
            self._failures = 0
        except Exception:
            self._failures += 1
            log.exception("the draft model failed; this step goes without drafts")
            if self._failures == MAX_FAILURES:
                log.error("the draft model failed %d times in a row: there are no more drafts", MAX_FAILURES)
            for ask in asked:
                self._forget(ask.request)
            found = {}
        return [found.get(ask.request.id, Proposal()) for ask in asked]

    def _catch_up(self, requests: Sequence[Request], budget: int) -> set[str]:
        """Reads what was not read of texts, all but the last two tokens, up to `budget`; who is ready to go on."""
        ready: set[str] = set()
        chunks: list[Chunk] = []
        for request in requests:
            self._take_known(request)
            computed = request.drafting.computed
            missing = request.num_tokens - computed - 1
            if missing > 1:
                count = min(missing, budget)
                if count:
                    chunks.append(Chunk(self._reader(request), computed, count))
                    budget -= count
                if count < missing:
                    continue
            ready.add(request.id)
        if chunks:
            self._forget_blocks(chunks)
            self.runner.execute(Step(tuple(chunks)))
            for request in requests:
                for chunk in chunks:
                    if chunk.request.id == request.id:
                        request.drafting.computed = chunk.stop
                        self._mark_known(request)
        return ready

    def _guess(self, asked: Sequence[Asked]) -> dict[str, Proposal]:
        self._guessing = {ask.request.id: self._begin(ask) for ask in asked}
        chunks = []
        for ask in asked:
            request = ask.request
            self._mark_known(request)
            start = request.drafting.computed
            ahead = self._guessing[request.id].ahead
            chunks.append(Chunk(ahead, start, request.num_tokens - start))
        while chunks:
            self._forget_blocks(chunks)
            result = self.runner.execute(Step(tuple(chunks)))
            for chunk in chunks:
                guessing = self._guessing[chunk.request.id]
                token = result.sampled.get(chunk.request.id)
                if token is None or token.token_id >= self._vocab_size:
                    guessing.ended = True
                else:
                    guessing.tokens.append(token.token_id)
                    guessing.ahead.token_ids.append(token.token_id)
                    guessing.ended = token.token_id in chunk.request.eos_ids
            # Computed are the request's own tokens; how many of the guesses are will be known when they were judged.
            chunks = [
                Chunk(guessing.ahead, guessing.ahead.num_tokens - 1, 1)
                for guessing in self._guessing.values()
                if guessing.wants
            ]
        for ask in asked:
            ask.request.drafting.computed = ask.request.num_tokens
        found = {
            name: Proposal(tuple(guessing.tokens), tuple(guessing.odds)) for name, guessing in self._guessing.items()
        }
        self._guessing = {}
        return found

    def _begin(self, ask: Asked) -> _Guessing:
        ahead = self._reader(ask.request)
        params = ahead.params
        if params.greedy or params.seed is not None:
            return _Guessing(ask, ahead, None)
        top_k = min(params.top_k, MOST_ODDS) if params.top_k > 0 else MOST_ODDS
        drawn = dataclasses.replace(ahead, params=dataclasses.replace(params, top_k=top_k))
        # Both have one list of tokens.
        greedy = dataclasses.replace(ahead, params=dataclasses.replace(params, temperature=0.0))
        return _Guessing(ask, greedy, drawn)

    def _reader(self, request: Request) -> Request:
        """A copy that may go on by itself, in the same blocks."""
        params = request.params
        if params.prompt_logprobs is not None:
            params = dataclasses.replace(params, prompt_logprobs=None)
        return dataclasses.replace(request, params=params, token_ids=list(request.token_ids))

    def _choose(
        self, logits: Tensor, requests: Sequence[Request], *, highest: Highest | None = None
    ) -> list[Sampled | Exception]:
        found = sample(logits, requests, highest=highest)
        for row, request in enumerate(requests):
            guessing = self._guessing.get(request.id)
            if guessing is None or guessing.drawn is None or isinstance(found[row], Exception):
                continue
            drawn = guess(logits[row, : self._vocab_size], guessing.drawn)
            if isinstance(drawn, Exception):
                found[row] = drawn
            else:
                found[row] = Sampled(drawn[0])
                guessing.odds.append(drawn[1])
        return found

    def _take_known(self, request: Request) -> None:
        """Skips blocks that another request, or this one before it lost its blocks, has read."""
        drafting, size = request.drafting, self.runner.block_size
        # The last token is always read: the first guess follows from it.
        full = min(len(request.block_keys), (request.num_tokens - 1) // size)
        while drafting.computed % size == 0 and (block := drafting.computed // size) < full:
            if self._known.get(request.block_ids[block]) != request.block_keys[block]:
                return
            drafting.computed += size
            drafting.known_blocks = block + 1

    def _mark_known(self, request: Request) -> None:
        drafting = request.drafting
        full = min(len(request.block_keys), drafting.computed // self.runner.block_size)
        for block in range(drafting.known_blocks, full):
            self._known[request.block_ids[block]] = request.block_keys[block]
        drafting.known_blocks = max(drafting.known_blocks, full)

    def _forget_blocks(self, chunks: Sequence[Chunk]) -> None:
        """Blocks that are about to be written to."""
        size = self.runner.block_size
        for chunk in chunks:
            for block in range(chunk.start // size, (chunk.stop - 1) // size + 1):
                self._known.pop(chunk.request.block_ids[block], None)

    def _forget(self, request: Request) -> None:
        request.drafting.lose_blocks()
        for block in request.block_ids:
            self._known.pop(block, None)


def check_vocabulary(tokenizer: Tokenizer, draft: Tokenizer, *, name: str) -> None:
    """Raises ConfigError unless both read every id alike, special tokens included; `name` is the draft model's."""
    if tokenizer.vocab_size != draft.vocab_size:
        raise ConfigError(
            f"the draft model {name} has {draft.vocab_size} tokens in its vocabulary and the model "
            f"{tokenizer.vocab_size}; a draft model must have the same tokenizer"
        )
    for token_id in range(tokenizer.vocab_size):
        own, other = tokenizer.token_text(token_id), draft.token_text(token_id)
        if own != other:
            raise ConfigError(
                f"token {token_id} is {own!r} in the model and {other!r} in the draft model {name}; "
                "a draft model must have the same tokenizer"
            )
