"""What a step costs, learned from the steps that were run: seconds, by what was in them.

Three figures that follow the load of the machine: a step that only decodes, by its number of sequences (the median of
the last few, so that one that was held up does not count); a prompt token beyond that, as token + key * context,
since attention looks at every key before it; and what drafts add to a step, by their number. A token's share of a
step's fixed costs counts as the token's.

The two parts of a prompt token are a line through what was seen, by least squares, older steps counting less. How
fast the machine is changes sooner than how the two parts compare: a factor before the line follows the last few steps.

Plain arithmetic on the times it is told: the same times give the same answers.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Collection

SMOOTHING = 0.25
QUIET_SAMPLES = 5
STALE = 0.75
# Contexts are counted in this many tokens, so that both parts of a prompt token's cost are of a like size.
CONTEXT_UNIT = 1024
# Steps older than some 1 / (1 - MEMORY) no longer count for the line.
MEMORY = 0.99
# What the line was before counts as much as this many steps; what steps at one length of context leave open stays.
INERTIA = 0.05
# Of the last prediction: a line never reaches 0, from where there would be no way back in proportion.
LEAST = 0.01


class StepCost:
    """Learns by `observe`; answers None where nothing like the question was seen."""

    def __init__(self) -> None:
        self._quiet_s: dict[int, deque[float]] = {}
        self._prompt: _Line | None = None
        self._pace = 1.0
        self._draft_s: dict[int, float] = {}

    def observe(
        self, elapsed_s: float, *, decodes: int, prompt_tokens: float, context: float = 0.0, drafts: int = 0
    ) -> None:
        """A step of `decodes` sequences that decode, with `drafts` drafted tokens among them, and `prompt_tokens` that
        saw `context` keys on average. A token that went through a part of the layers is that part of a token."""
        if elapsed_s <= 0:
            return
        if not prompt_tokens and not drafts:
            samples = self._quiet_s.setdefault(decodes, deque(maxlen=QUIET_SAMPLES))
            # Steps are held up by chance, and never fast by chance.
            if samples and elapsed_s < STALE * _median(samples):
                samples.clear()
            samples.append(elapsed_s)
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
        return _median(self._quiet_s[min(self._quiet_s, key=lambda seen: (abs(seen - decodes), seen))])

    def prompt_token_s(self, context: float) -> float | None:
        """Seconds that a prompt token which sees `context` keys adds to a step."""
        return None if self._prompt is None else self._pace * self._prompt.at(context / CONTEXT_UNIT)

    def draft_s(self, drafts: int) -> float | None:
        """Seconds that `drafts` drafted tokens add to a step: in proportion to the nearest number that was seen, but
        fewer never for less, since a verifying step's fixed costs are among them."""
        if not self._draft_s:
            return None
        near = min(self._draft_s, key=lambda seen: (abs(seen - drafts), seen))
        return self._draft_s[near] * max(1.0, drafts / near)

    def _learn_prompt(self, token_s: float, units: float) -> None:
        if self._prompt is None:
            # Nothing is learned from no time at all, and the key's part is a guess: of small models about right, of
            # large ones on the safe side.
            if token_s > 0:
                self._prompt = _Line(token_s / (1.0 + units), token_s / (1.0 + units))
            return
        self._pace += SMOOTHING * (token_s / self._prompt.at(units) - self._pace)
        self._prompt.learn(units, token_s)


def _median(samples: Collection[float]) -> float:
    return sorted(samples)[len(samples) // 2]


class _Line:
    """y = level + slope * x for x >= 0, neither ever negative, through the points that it is told, in proportion: a
    point that is 10 % off counts the same wherever it lies."""

    def __init__(self, level: float, slope: float) -> None:
        self.level, self.slope = level, slope
        self._w = self._wx = self._wxx = self._wy = self._wxy = 0.0

    def at(self, x: float) -> float:
        return self.level + self.slope * x

    def learn(self, x: float, y: float) -> None:
        weight = 1.0 / self.at(x) ** 2
        self._w = MEMORY * self._w + weight
        self._wx = MEMORY * self._wx + weight * x
        self._wxx = MEMORY * self._wxx + weight * x * x
        self._wy = MEMORY * self._wy + weight * y
        self._wxy = MEMORY * self._wxy + weight * x * y
        hold = INERTIA * weight
        a, b, d = self._w + hold, self._wx, self._wxx + hold
        e, f = self._wy + hold * self.level, self._wxy + hold * self.slope
        level, slope = (d * e - b * f) / (a * d - b * b), (a * f - b * e) / (a * d - b * b)
        least = LEAST * self.at(x)
        if slope < 0:
            level, slope = e / a, 0.0
        elif level < least:
            level, slope = least, max(0.0, (f - b * least) / d)
        self.level, self.slope = max(level, least), slope
