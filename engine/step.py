"""What passes between the scheduler and whatever computes: a step's work, and its result.

`Runner` is the seam: the real one owns a model and a KV cache, a fake one makes scheduler, engine and server tests
instant and free of torch.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Protocol

from dibit.engine.request import Request, TokenLogprob
from dibit.engine.speculation import Odds


@dataclass(frozen=True, slots=True)
class Chunk:
    """Tokens [start, start + count) of a request, to be computed in this step, and after them `drafts`, tokens that are
    not the request's (yet). Blocks for all of them are already allotted. Only a chunk that samples has drafts. `odds`
    is what each of them was drawn from, or empty.

    A prompt's chunk may be computed over several steps, in each the layers [first_layer, last_layer): last_layer None
    is the end, and with it the chunk is done."""

    request: Request
    start: int
    count: int
    drafts: tuple[int, ...] = ()
    odds: tuple[Odds, ...] = ()
    first_layer: int = 0
    last_layer: int | None = None

    @property
    def whole(self) -> bool:
        """Whether the step computes all layers."""
        return self.first_layer == 0 and self.last_layer is None

    def share(self, num_layers: int) -> float:
        """The part of the model's layers that the step computes."""
        return ((num_layers if self.last_layer is None else self.last_layer) - self.first_layer) / num_layers

    @property
    def stop(self) -> int:
        return self.start + self.count

    @property
    def samples(self) -> bool:
        """Whether the chunk ends at the request's last known token, so that a next one is drawn. A request that
        wants no output (max_tokens 0: its prompt is only scored) draws none."""
        return self.last_layer is None and self.stop == self.request.num_tokens and self.request.max_tokens > 0


@dataclass(frozen=True, slots=True)
class Step:
    """Chunks of different requests, and the seconds that their drafts took already."""

    chunks: tuple[Chunk, ...]
    drafting_s: float = 0.0

    @property
    def num_tokens(self) -> int:
        return sum(chunk.count + len(chunk.drafts) for chunk in self.chunks)


@dataclass(frozen=True, slots=True)
class Sampled:
    """The next token of a request; `logprob` when the request asked for it."""

    token_id: int
    logprob: TokenLogprob | None = None


@dataclass(frozen=True, slots=True)
class StepResult:
    """By request id: the sampled token of every chunk that samples, and the log-probabilities of the prompt tokens
    start + 1 .. stop (as far as they are prompt) of every chunk that is done and whose request asked for
    prompt_logprobs. `further` has the tokens after the sampled one, one for each leading draft that is what was drawn
    in its place."""

    sampled: dict[str, Sampled]
    prompt_logprobs: dict[str, tuple[TokenLogprob, ...]] = field(default_factory=dict)
    failed: dict[str, str] = field(default_factory=dict)
    further: dict[str, tuple[Sampled, ...]] = field(default_factory=dict)


def joined(results: Sequence[StepResult]) -> StepResult:
    """The result of steps of different requests, as of one."""
    whole = StepResult({})
    for result in results:
        whole.sampled.update(result.sampled)
        whole.prompt_logprobs.update(result.prompt_logprobs)
        whole.failed.update(result.failed)
        whole.further.update(result.further)
    return whole


@dataclass(frozen=True, slots=True)
class StepCounts:
    """How steps were computed so far: replayed from a tape, or not, by what kept them from it; and rows of replayed
    steps whose token was chosen after the tape, by what it needed besides a draw."""

    taped: int = 0
    untaped: tuple[tuple[str, int], ...] = ()
    beside: tuple[tuple[str, int], ...] = ()


class Runner(Protocol):
    """Computes steps. Raises on failure; the engine then isolates the guilty request by running halves."""

    @property
    def num_blocks(self) -> int:
        """KV blocks there are."""
        ...

    @property
    def block_size(self) -> int:
        """Tokens in a KV block."""
        ...

    @property
    def max_model_len(self) -> int:
        """Longest sequence, in tokens."""
        ...

    @property
    def num_layers(self) -> int:
        """Layers that a prompt's chunk may be cut into; 1 where it must be computed at once."""
        ...

    @property
    def step_counts(self) -> StepCounts: ...

    def execute(self, step: Step) -> StepResult: ...
