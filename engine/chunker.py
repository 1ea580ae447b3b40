"""How much of a prompt goes into a step, so that those who are being answered are not held up.

Beside requests that decode, prompts add at most (max_itl_ratio - 1) times what a step takes without them, as far as
that was measured (step_cost.py), and as much for each of the prompts where they are more than the requests that
decode: one prompt may not hold up four answers, and one answer not twenty prompts. A step of itl_slo_ms is always
fine: twice as long as 5 ms is nothing that a reader sees. A prompt that would take longer is computed in chunks, and a
chunk a few layers a step (layered prefill): cutting it into fewer tokens instead would read its keys and values, which
grow with it, again for every few tokens. What a slice computes is kept by the runner until the next one.

At least one layer of MIN_CHUNK_TOKENS tokens goes into a step, so that prompts get on. Where layers cannot be cut it is
so many tokens through all of them. One step in QUIET_EVERY goes without prompts, so that what such a step takes is
known while a long prompt goes on.
"""

from __future__ import annotations

import math

from dibit.engine.request import Begun, Request
from dibit.engine.step import Chunk
from dibit.engine.step_cost import StepCost

# Kernels take about as long for fewer.
MIN_CHUNK_TOKENS = 16
QUIET_EVERY = 24
# A chunk is sized for so many slices: the fewer there are the more is lost to rounding, the more there are the longer
# the chunk, which is not of use to its request before its end.
SLICES = 4
# Chunks are chosen by what is known when they begin; the next slices should still fit when they turn out dearer.
HEADROOM = 0.95


class Chunker:
    """`begin_step`, then `cut` for one request after another while there are some and `open`.

    max_ratio   times as long as without it that a prompt may make a step; 0: no bound
    slo_s       seconds that a step may take besides
    num_layers  that chunks may be cut into
    """

    def __init__(self, cost: StepCost, *, max_ratio: float, slo_s: float = 0.0, num_layers: int) -> None:
        self.cost = cost
        self.max_ratio = max_ratio
        self.slo_s = slo_s
        self.num_layers = num_layers
        self.quiet = False
        self._left_s = math.inf
        self._cut_any = self._cut_short = False
        self._steps_beside = 0

    def begin_step(self, *, decodes: int, prompts: int) -> None:
        """A step of `decodes` sequences that decode beside `prompts` that could be computed in it."""
        self._steps_beside = self._steps_beside + 1 if self._cut_any else 0
        self._cut_any = self._cut_short = False
        self._left_s = math.inf
        if not self.max_ratio or not decodes or not prompts:
            self.quiet = False
            self._steps_beside = 0
            return
        # Never twice in a row: a step that fails, or that no time passes in, teaches nothing.
        self.quiet = not self.quiet and (self._steps_beside >= QUIET_EVERY or not self.cost.knows(decodes))
        quiet_s = self.cost.decode_s(decodes)
        if quiet_s is not None:
            share_s = (self.max_ratio - 1.0) * quiet_s * max(1.0, prompts / decodes)
            self._left_s = max(share_s, self.slo_s - quiet_s)

    @property
    def open(self) -> bool:
        """Whether another prompt may have tokens in this step."""
        if self.quiet or self._cut_short:
            return False
        return not self._cut_any or self.tokens(0) * self.num_layers >= MIN_CHUNK_TOKENS

    def tokens(self, context: float) -> float:
        """Tokens with `context` keys before them that still fit into the step; inf: there is no bound."""
        if self._left_s == math.inf:
            return math.inf
        token_s = self.cost.prompt_token_s(context)
        if token_s is None:
            return 0.0
        return self._left_s / token_s if token_s > 0 else math.inf

    def cut(self, request: Request, *, budget: int) -> Chunk:
        """The next tokens of a request, at most `budget`, or the next layers of those that have begun."""
        self._cut_any = True
        start, left = request.num_computed, request.num_tokens - request.num_computed
        chunk = self._cut(request, min(left, budget))
        self._cut_short = chunk.last_layer is not None or chunk.count < left
        if self._left_s != math.inf:
            token_s = self.cost.prompt_token_s(start + chunk.count / 2) or 0.0
            self._left_s = max(0.0, self._left_s - token_s * chunk.count * chunk.share(self.num_layers))
        return chunk

    def _cut(self, request: Request, most: int) -> Chunk:
        start, begun = request.num_computed, request.begun
        if begun is None:
            tokens = self.tokens(start + most / 2)
            if most <= tokens:
                return Chunk(request, start, most)
            tokens = self.tokens(start)
            if self.num_layers == 1:
                return Chunk(request, start, min(most, max(MIN_CHUNK_TOKENS, int(tokens))))
            at_once = -(-self.num_layers // SLICES)
            count = max(MIN_CHUNK_TOKENS, int(HEADROOM * tokens * self.num_layers / at_once))
            begun = Begun(min(most, count), 0)
        missing = self.num_layers - begun.layers
        fits = self.num_layers * self.tokens(start + begun.count / 2) / begun.count
        if fits >= missing:
            return Chunk(request, start, begun.count, first_layer=begun.layers)
        slices = -(-missing // max(1, int(fits)))
        last = begun.layers + -(-missing // slices)
        return Chunk(
            request,
            start,
            begun.count,
            first_layer=begun.layers,
            last_layer=None if last == self.num_layers else last,
        )
