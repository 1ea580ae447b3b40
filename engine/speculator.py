"""Which of the sequences that decode get drafts, how many, and how they fared.

Only steps that do nothing but decode have drafts: beside a prompt there is no time left that they could use. One such
step in QUIET_STEPS goes without, so that what it takes stays known, and one in TRIAL_STEPS is bounded to another number
of drafts, so that it is known what other numbers take.
"""

from __future__ import annotations

from collections.abc import Sequence

from dibit.engine.outputs import SpeculationStats
from dibit.engine.speculation import Asked, Drafter, Proposal, allot
from dibit.engine.step import Chunk
from dibit.engine.step_cost import StepCost

QUIET_STEPS = 64
TRIAL_STEPS = 16


class Speculator:
    """Plain Python; a drafter may compute. Without one there are no drafts.

    max_drafts  most tokens guessed ahead of a sequence in one step
    """

    def __init__(self, drafter: Drafter | None, *, max_drafts: int) -> None:
        self._drafter = drafter
        self._max_drafts = max_drafts
        self._decode_steps = 0
        self._drafts = self._drafted = self._accepted = self._emitted = 0
        self._accepted_at = [0] * max_drafts
        self._drafting_s = 0.0

    def counts(self, chunks: Sequence[Chunk], cost: StepCost, *, budget: int) -> list[int]:
        """How many tokens to draft for each chunk of a step, at most `budget` in all."""
        counts = [0] * len(chunks)
        if self._drafter is None or not chunks or not all(chunk.request.decodes for chunk in chunks):
            return counts
        self._decode_steps += 1
        if self._decode_steps % QUIET_STEPS == 0:
            return counts
        cap = self._max_drafts
        if self._decode_steps % TRIAL_STEPS == 0:
            cap = 1 + self._decode_steps // TRIAL_STEPS % cap
        able: list[tuple[int, int]] = []
        for i, chunk in enumerate(chunks):
            request = chunk.request
            most = min(cap, budget, request.max_tokens - request.num_output - 1)
            # The step's result has no log-probabilities of tokens that drafts agree with.
            if most > 0 and request.params.logprobs is None and (most := self._drafter.available(request, most)):
                able.append((i, most))
        allotted = allot([(chunks[i].request.drafting, most) for i, most in able], cost, decodes=len(chunks))
        for (i, _), count in zip(able, allotted, strict=True):
            counts[i] = min(count, budget)
            budget -= counts[i]
        return counts

    def propose(self, asked: Sequence[Asked], *, catch_up_tokens: int) -> tuple[dict[str, Proposal], float]:
        """Proposals by request id, those that propose something, and the seconds that they took."""
        if self._drafter is None or not asked:
            return {}, 0.0
        proposals = self._drafter.propose(asked, catch_up_tokens=catch_up_tokens)
        self._drafting_s += self._drafter.spent_s
        return {ask.request.id: found for ask, found in zip(asked, proposals, strict=True)}, self._drafter.spent_s

    def book(self, chunk: Chunk, *, accepted: int) -> None:
        """What a step found of a chunk's drafts."""
        drafted = len(chunk.drafts)
        self._drafts += 1
        self._drafted += drafted
        self._accepted += accepted
        self._emitted += 1
        for place in range(accepted):
            self._accepted_at[place] += 1
        chunk.request.drafting.book(drafted=drafted, accepted=accepted)

    def emit(self) -> None:
        """A token beyond the first of a chunk with drafts has become one of its request's."""
        self._emitted += 1

    def snapshot(self) -> SpeculationStats:
        return SpeculationStats(
            drafts=self._drafts,
            drafted=self._drafted,
            accepted=self._accepted,
            emitted=self._emitted,
            accepted_at=tuple(self._accepted_at) if self._drafter is not None else (),
            drafting_s=self._drafting_s,
        )
