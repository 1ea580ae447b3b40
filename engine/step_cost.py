"""What a step costs, learned from the steps that were run: seconds, by what was in them.

Three figures that follow the load of the machine: a step that only decodes, by its number of sequences (the median of
the last few, so that one that was held up does not count); a prompt token beyond that, as token + key * context,
since attention looks at every key before it; and what drafts add to a step, by their number. A token's share of a
step's fixed costs counts as the token's.

The two parts of a prompt token are moved by every observation along the line through the origin on which it lies
(Kaczmarz 1937, damped): where prompts are being computed the prediction follows like a running mean, and what was
learned at other lengths of context stays.

Plain arithmetic on the times it is told: the same times give the same answers.
"""

from __future__ import annotations

from collections import deque

SMOOTHING = 0.25
QUIET_SAMPLES = 5
STALE = 0.75
# Contexts are counted in this many tokens, so that both parts of a prompt token's cost move at a like pace.
CONTEXT_UNIT = 1024


class StepCost:
    """Learns by `observe`; answers None where nothing like the question was seen."""

    def __init__(self) -> None:
        self._quiet_s: dict[int, deque[float]] = {}
        self._token_s = self._key_s = 0.0
        self._knows_prompts = False
        self._draft_s: dict[int, float] = {}

    def observe(
        self, elapsed_s: float, *, decodes: int, prompt_tokens: float, context: float = 0.0, drafts: int = 0
    ) -> None:
        """A step of `decodes` sequences that decode, with `drafts` drafted tokens among them, and `prompt_tokens` that
        saw `context` keys on average. A token that went through a part of the layers is that part of a token."""
        if elapsed_s <= 0:
            return
        if not prompt_tokens and not drafts:
            self._quiet_s.setdefault(decodes, deque(maxlen=QUIET_SAMPLES)).append(elapsed_s)
            return
        quiet_s = self.decode_s(decodes) if decodes else 0.0
        if quiet_s is None:
            return
        if elapsed_s < STALE * quiet_s:
            # More was done in less time: what is known is of a slower machine.
            self._quiet_s.pop(decodes, None)
            return
        beyond_s = max(elapsed_s - quiet_s, 0.0)
        if prompt_tokens and not drafts:
            self._learn_prompt(beyond_s / prompt_tokens, context / CONTEXT_UNIT)
        elif drafts and not prompt_tokens:
            last_s = self._draft_s.get(drafts)
            self._draft_s[drafts] = beyond_s if last_s is None else last_s + SMOOTHING * (beyond_s - last_s)

    def knows(self, decodes: int) -> bool:
        """Whether a step was seen in which just so many sequences decode and nothing else."""
        return decodes in self._quiet_s

    def decode_s(self, decodes: int) -> float | None:
        """Seconds of a step in which `decodes` sequences decode and nothing else: the nearest number that was seen."""
        if not self._quiet_s:
            return None
        seen = sorted(self._quiet_s[min(self._quiet_s, key=lambda seen: (abs(seen - decodes), seen))])
        return seen[len(seen) // 2]

    def prompt_token_s(self, context: float) -> float | None:
        """Seconds that a prompt token which sees `context` keys adds to a step."""
        if not self._knows_prompts:
            return None
        return self._token_s + self._key_s * context / CONTEXT_UNIT

    def draft_s(self, drafts: int) -> float | None:
        """Seconds that `drafts` drafted tokens add to a step: in proportion to the nearest number that was seen, but
        fewer never for less, since a verifying step's fixed costs are among them."""
        if not self._draft_s:
            return None
        near = min(self._draft_s, key=lambda seen: (abs(seen - drafts), seen))
        return self._draft_s[near] * max(1.0, drafts / near)

    def _learn_prompt(self, token_s: float, units: float) -> None:
        if not self._knows_prompts:
            # Of small models about right, of large ones on the safe side.
            self._token_s = self._key_s = token_s / (1.0 + units)
        error_s = token_s - (self._token_s + self._key_s * units)
        step_s = SMOOTHING * error_s / (1.0 + units * units)
        self._token_s = max(self._token_s + step_s, 0.0)
        self._key_s = max(self._key_s + step_s * units, 0.0)
        self._knows_prompts = True
