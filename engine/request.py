"""One request inside the engine: what was asked, how far it is, which KV blocks it holds.

Two counters say everything: `num_tokens` (prompt and output so far) and `num_computed` (tokens whose keys and values
are in the cache). The scheduler's one rule is to let the second catch up with the first.
"""

from __future__ import annotations

import enum
from dataclasses import dataclass, field

from dibit.engine.config import SamplingParams
from dibit.engine.speculation import Drafting


class Status(enum.Enum):
    WAITING = "waiting"
    RUNNING = "running"
    FINISHED = "finished"


class FinishReason(enum.Enum):
    STOP = "stop"
    LENGTH = "length"
    ABORT = "abort"
    ERROR = "error"


@dataclass(frozen=True, slots=True)
class TokenLogprob:
    """Log-probability of a token at its position, with the `top` most likely tokens there (most likely first).

    rank is 1 for the most likely token.
    """

    token_id: int
    logprob: float
    rank: int
    top: tuple[tuple[int, float], ...] = ()


@dataclass(frozen=True, slots=True)
class Begun:
    """The next `count` tokens have been through the first `layers` layers of the model."""

    count: int
    layers: int


@dataclass(eq=False, slots=True)
class Request:
    """State of one sequence. `seed` is always set: the caller's, or one drawn on arrival.

    Requests share cached prefixes only under the same `cache_salt`. `num_cached` counts the prompt tokens that were
    found in the cache on entry; `block_keys` are the prefix-cache keys of the leading full blocks, as far as known,
    and `num_indexed` of the blocks held are findable (or known to have a findable twin).
    """

    id: str
    prompt_ids: tuple[int, ...]
    params: SamplingParams
    max_tokens: int
    seed: int
    eos_ids: frozenset[int] = frozenset()
    cache_salt: str = ""
    arrival_s: float = 0.0

    status: Status = Status.WAITING
    finish_reason: FinishReason | None = None
    stop_reason: str | int | None = None
    token_ids: list[int] = field(default_factory=list)
    num_computed: int = 0
    begun: Begun | None = None
    num_cached: int = 0
    block_ids: list[int] = field(default_factory=list)
    block_keys: list[bytes] = field(default_factory=list)
    num_indexed: int = 0
    num_preemptions: int = 0
    drafting: Drafting = field(default_factory=Drafting)

    def __post_init__(self) -> None:
        if not self.token_ids:
            self.token_ids = list(self.prompt_ids)

    @property
    def num_tokens(self) -> int:
        return len(self.token_ids)

    @property
    def num_prompt(self) -> int:
        return len(self.prompt_ids)

    @property
    def num_output(self) -> int:
        return len(self.token_ids) - len(self.prompt_ids)

    @property
    def output_ids(self) -> list[int]:
        return self.token_ids[len(self.prompt_ids) :]

    @property
    def decodes(self) -> bool:
        """Whether all that is left to compute is the token that was drawn last."""
        return self.num_output > 0 and self.num_tokens - self.num_computed == 1

    @property
    def finished(self) -> bool:
        return self.status is Status.FINISHED
