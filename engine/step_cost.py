"""What a step costs, learned from the steps that were run: seconds, by what was in them.

Three figures, each an exponentially weighted mean, so that it follows the load of the machine: a step that only
decodes, by its number of sequences; a prompt token beyond that; and the time of a step that verifies drafts over that
of one without, by the number of drafts. A prompt token's share of a step's fixed costs counts as the token's, so a
chunk chosen by it is at first too small or too large, and right after a few steps: with cost f + s * n beyond the
decode's, the next n is allowance * n / (f + s * n), which approaches (allowance - f) / s from either side.

Plain arithmetic on the times it is told: the same times give the same answers.
"""

from __future__ import annotations

SMOOTHING = 0.2
# A chunk smaller than this costs nearly what this costs, so that less would only starve the prompt.
MIN_CHUNK_TOKENS = 16


class StepCost:
    """Learns by `observe`; answers None where nothing like the question was seen."""

    def __init__(self) -> None:
        self._decode_s: dict[int, float] = {}
        self._prompt_token_s: float | None = None
        self._draft_s: dict[int, float] = {}

    def observe(self, elapsed_s: float, *, decodes: int, prompt_tokens: int, drafts: int = 0) -> None:
        """A step of `decodes` sequences that decode, with `drafts` drafted tokens among them, and `prompt_tokens`."""
        if elapsed_s <= 0:
            return
        if not prompt_tokens and not drafts:
            self._decode_s[decodes] = _mean(self._decode_s.get(decodes), elapsed_s)
            return
        quiet_s = self.decode_s(decodes) if decodes else 0.0
        if quiet_s is None:
            return
        beyond_s = max(elapsed_s - quiet_s, 0.0)
        if prompt_tokens and not drafts:
            self._prompt_token_s = _mean(self._prompt_token_s, beyond_s / prompt_tokens)
        elif drafts and not prompt_tokens:
            self._draft_s[drafts] = _mean(self._draft_s.get(drafts), beyond_s)

    def decode_s(self, decodes: int) -> float | None:
        """Seconds of a step in which `decodes` sequences decode and nothing else: the nearest number that was seen."""
        if not self._decode_s:
            return None
        return self._decode_s[min(self._decode_s, key=lambda seen: (abs(seen - decodes), seen))]

    def draft_s(self, drafts: int) -> float | None:
        """Seconds that `drafts` drafted tokens add to a step: in proportion to the nearest number that was seen, but
        fewer never for less, since a verifying step's fixed costs are among them."""
        if not self._draft_s:
            return None
        near = min(self._draft_s, key=lambda seen: (abs(seen - drafts), seen))
        return self._draft_s[near] * max(1.0, drafts / near)

    def chunk_tokens(self, *, decodes: int, max_ratio: float) -> int | None:
        """Prompt tokens beside `decodes` sequences that keep a step within max_ratio times what it takes without
        them, MIN_CHUNK_TOKENS at least; None: no bound is known, or none is needed."""
        quiet_s = self.decode_s(decodes)
        if not decodes or quiet_s is None or not self._prompt_token_s:
            return None
        return max(MIN_CHUNK_TOKENS, int((max_ratio - 1.0) * quiet_s / self._prompt_token_s))


def _mean(last: float | None, new: float) -> float:
    return new if last is None else last + SMOOTHING * (new - last)
