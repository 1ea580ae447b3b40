"""Tokens guessed ahead of the model, several of which one step then verifies: prompt lookup, and how many are worth it.

Prompt lookup (Saxena 2023; vLLM's "ngram"): the request's last few tokens are looked for earlier in its own text, and
what followed them there is proposed. It costs no model, and pays where output repeats input: summaries, edits of code.
A draft model (draft_model.py) costs a smaller model's steps. verification.py says which guesses stand.

How many to propose is decided by what was measured: a drafted token's chance to be accepted, per request, against the
time that drafts add to a step (step_cost.py). Where none pays, one proposal in RETRY_STEPS is still tried.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Protocol

from dibit.engine.step_cost import StepCost

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt

    from dibit.engine.request import Request

RETRY_STEPS = 32
RETRY_DRAFTS = 2
# Trials older than some 1 / (1 - MEMORY) proposals no longer count.
MEMORY = 0.9
_PRIOR_ACCEPTED, _PRIOR_TRIALS = 1.0, 1.5


@dataclass(slots=True)
class Drafting:
    """What is remembered of one request: where its n-grams went on, and how its drafts fared.

    ngrams      the place after each n-gram's last occurrence, without those that end the text; `num_indexed` tokens
                of the text have been looked at
    drafted     tokens proposed so far; `accepted` of them were what the model said
    computed    tokens of the text whose keys and values a draft model has in its cache; those of the first
                `known_blocks` blocks can be found again
    """

    ngrams: dict[tuple[int, ...], int] = field(default_factory=dict)
    num_indexed: int = 0
    drafted: int = 0
    accepted: int = 0
    idle: int = 0
    computed: int = 0
    known_blocks: int = 0
    _accepted: float = 0.0
    _trials: float = 0.0

    @property
    def acceptance(self) -> float:
        """Chance of a drafted token, if all before it were accepted."""
        return (self._accepted + _PRIOR_ACCEPTED) / (self._trials + _PRIOR_TRIALS)

    def book(self, *, drafted: int, accepted: int) -> None:
        self.drafted += drafted
        self.accepted += accepted
        self._accepted = MEMORY * self._accepted + accepted
        self._trials = MEMORY * self._trials + min(accepted + 1, drafted)
        if self.computed:
            # A draft model has read every draft but the last.
            self.computed += min(accepted, drafted - 1)

    def lose_blocks(self) -> None:
        """The request's KV blocks are another's now."""
        self.computed = self.known_blocks = 0


@dataclass(frozen=True, slots=True)
class Odds:
    """What a token was drawn from: ids [n], ascending, and their probabilities [n], which sum to 1."""

    ids: npt.NDArray[np.intp]
    probabilities: npt.NDArray[np.floating[Any]]


@dataclass(frozen=True, slots=True)
class Asked:
    """A request for which `count` tokens are to be drafted; it has the KV blocks for them."""

    request: Request
    count: int


@dataclass(frozen=True, slots=True)
class Proposal:
    """Tokens that may follow a request's, and what each was drawn from; no odds where they are certain: any function of
    what comes before, the request's own draws included."""

    tokens: tuple[int, ...] = ()
    odds: tuple[Odds, ...] = ()


class Drafter(Protocol):
    """Guesses. `spent_s` are the seconds that the last `propose` took, where that is worth to know."""

    spent_s: float

    def available(self, request: Request, most: int) -> int:
        """How many tokens, at most `most`, it could propose."""
        ...

    def propose(self, asked: Sequence[Asked], *, catch_up_tokens: int) -> list[Proposal]:
        """A proposal for each, of at most the tokens asked for; before, it may read `catch_up_tokens` of texts that it
        has not seen yet, and that is not in spent_s."""
        ...


class PromptLookup:
    """Proposes what followed the longest n-gram, of `longest` to `shortest` tokens, that ends the text."""

    def __init__(self, shortest: int, longest: int) -> None:
        self.shortest = shortest
        self.longest = longest
        self.spent_s = 0.0

    def available(self, request: Request, most: int) -> int:
        return most if self._place(request.drafting, request.token_ids) is not None else 0

    def propose(self, asked: Sequence[Asked], *, catch_up_tokens: int = 0) -> list[Proposal]:
        return [Proposal(self.look_up(ask.request.drafting, ask.request.token_ids, ask.count)) for ask in asked]

    def look_up(self, drafting: Drafting, token_ids: list[int], count: int) -> tuple[int, ...]:
        """`count` tokens that may follow, or none. `token_ids` has only grown since the last call."""
        place, total = self._place(drafting, token_ids), len(token_ids)
        if place is None:
            return ()
        # What ends the text repeats: past the end it goes on with what it has just proposed.
        drafts: list[int] = []
        for i in range(place, place + count):
            drafts.append(token_ids[i] if i < total else drafts[i - total])
        return tuple(drafts)

    def _place(self, drafting: Drafting, token_ids: list[int]) -> int | None:
        total = len(token_ids)
        for end in range(drafting.num_indexed, total):
            for n in range(self.shortest, min(self.longest, end) + 1):
                drafting.ngrams[tuple(token_ids[end - n : end])] = end
        drafting.num_indexed = total
        for n in range(min(self.longest, total - 1), self.shortest - 1, -1):
            place = drafting.ngrams.get(tuple(token_ids[total - n :]))
            if place is not None:
                return place
        return None


def allot(able: Sequence[tuple[Drafting, int]], cost: StepCost, *, decodes: int) -> list[int]:
    """How many tokens to draft for each of some sequences, given with the most that each may get, among `decodes` that
    decode: what gives most tokens a second. None as long as it is not known what a step without drafts takes.

    A sequence's n-th draft counts if all before it do, so its gains fall; the best n drafts of all sequences are the
    n highest gains.
    """
    quiet_s = cost.decode_s(decodes)
    if quiet_s is None:
        return [0] * len(able)
    if cost.draft_s(1) is None:
        return [most for _, most in able]
    gains = [(drafting.acceptance**place, i) for i, (drafting, most) in enumerate(able) for place in range(1, most + 1)]
    gains.sort(reverse=True)
    best, best_rate, expected = 0, decodes / quiet_s, 0.0
    for count, (gain, _) in enumerate(gains, start=1):
        expected += gain
        rate = (decodes + expected) / (quiet_s + (cost.draft_s(count) or 0.0))
        if rate > best_rate:
            best, best_rate = count, rate
    counts = [0] * len(able)
    for _, i in gains[:best]:
        counts[i] += 1
    return [_or_retry(drafting, count, most) for count, (drafting, most) in zip(counts, able, strict=True)]


def _or_retry(drafting: Drafting, count: int, most: int) -> int:
    if count:
        drafting.idle = 0
        return count
    drafting.idle += 1
    if drafting.idle < RETRY_STEPS:
        return 0
    drafting.idle = 0
    return min(most, RETRY_DRAFTS)
