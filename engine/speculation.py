"""Tokens guessed ahead of the model, several of which one step then verifies: prompt lookup, and how many are worth it.

Prompt lookup (Saxena 2023; vLLM's "ngram"): the request's last few tokens are looked for earlier in its own text, and
what followed them there is proposed. It costs no model, and pays where output repeats input: summaries, edits of code.

The proposal is certain, so that the rejection rule of Leviathan et al. 2023 (arXiv 2211.17192) comes down to this: draw
a token from the model's distribution at each place, as would be done without a proposal, and go on while it is the
proposed one. With the same draws, the tokens are those of no speculation, greedy or sampled.

How many to propose is decided by what was measured: a drafted token's chance to be accepted, per request, against the
time that drafts add to a step (step_cost.py). Where none pays, one proposal in RETRY_STEPS is still tried.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from dibit.engine.step_cost import StepCost

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
    """

    ngrams: dict[tuple[int, ...], int] = field(default_factory=dict)
    num_indexed: int = 0
    drafted: int = 0
    accepted: int = 0
    idle: int = 0
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


@dataclass(frozen=True, slots=True)
class PromptLookup:
    """Proposes what followed the longest n-gram, of `longest` to `shortest` tokens, that ends the text."""

    shortest: int
    longest: int

    def propose(self, drafting: Drafting, token_ids: list[int], count: int) -> tuple[int, ...]:
        """`count` tokens that may follow, or none. `token_ids` has only grown since the last call."""
        total = len(token_ids)
        for end in range(drafting.num_indexed, total):
            for n in range(self.shortest, min(self.longest, end) + 1):
                drafting.ngrams[tuple(token_ids[end - n : end])] = end
        drafting.num_indexed = total
        for n in range(min(self.longest, total - 1), self.shortest - 1, -1):
            place = drafting.ngrams.get(tuple(token_ids[total - n :]))
            if place is not None:
                # What ends the text repeats: past the end it goes on with what it has just proposed.
                drafts: list[int] = []
                for i in range(place, place + count):
                    drafts.append(token_ids[i] if i < total else drafts[i - total])
                return tuple(drafts)
        return ()


def worthwhile(drafting: Drafting, cost: StepCost, *, decodes: int, drafts: int, most: int) -> int:
    """How many tokens to draft for one of `decodes` sequences, beside `drafts` of others: what gives most tokens a
    second. 0 as long as it is not known what a step without drafts takes."""
    quiet_s = cost.decode_s(decodes)
    if quiet_s is None or most < 1:
        return 0
    already_s = (cost.draft_s(drafts) or 0.0) if drafts else 0.0
    best, best_rate = 0, decodes / quiet_s
    expected, chance = 0.0, 1.0
    for count in range(1, most + 1):
        chance *= drafting.acceptance
        expected += chance
        added_s = cost.draft_s(drafts + count)
        if added_s is None:
            return most
        rate = (decodes + expected) / (quiet_s + max(0.0, added_s - already_s))
        if rate > best_rate:
            best, best_rate = count, rate
    if best:
        drafting.idle = 0
        return best
    drafting.idle += 1
    if drafting.idle < RETRY_STEPS:
        return 0
    drafting.idle = 0
    return min(most, RETRY_DRAFTS)
