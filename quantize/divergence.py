"""How far a quantized model's predictions are from the float model's: the Kullback-Leibler divergence of every token.

Perplexity only looks at the token that came next, and errors in both directions cancel in it. KL(float || quantized)
compares the whole distributions, is zero only when they are equal, and tells small differences apart with little text.

    KL = sum over the vocabulary of p (log p - log q),  p of the reference, q of the model

Both models run through the serving runtime, over the same windows as in evaluate.py, side by side: a chunk of one, the
same chunk of the other. So no logits are stored, and memory holds both models and the logits of two chunks. A float
reference may instead have run before, block by block (reference.py); then memory holds its head beside the model.
"""

from __future__ import annotations

import math
import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor

from dibit.engine.config import SamplingParams
from dibit.engine.errors import ConfigError, EngineFault, UserError
from dibit.engine.llm import LLM
from dibit.engine.request import FinishReason
from dibit.engine.runner import ModelRunner, set_threads
from dibit.engine.tokenizer import Tokenizer
from dibit.quantize.evaluate import text_windows
from dibit.quantize.reference import StreamedReference, StreamedSide

# Rows that are compared at a time: a few MB for any vocabulary, so that they stay in the cache.
ROWS = 16


@dataclass(frozen=True)
class Divergence:
    """KL(reference || model) in nats over the predicted tokens of all windows.

    kl_mean, kl_error   mean, and its standard error if tokens were independent
    kl_median, kl_p90, kl_p99, kl_p999, kl_max  its distribution over tokens
    top1_agreement      share of tokens for which both find the same next token likeliest
    ppl, reference_ppl  perplexity of each, as `perplexity` has it
    probability_rms     root mean square difference of the probability of the token that came next
    tokens, windows, context  what was predicted: context - 1 tokens of each window
    window_kl           mean of each window
    seconds             time it took, both models
    """

    kl_mean: float
    kl_error: float
    kl_median: float
    kl_p90: float
    kl_p99: float
    kl_p999: float
    kl_max: float
    top1_agreement: float
    ppl: float
    reference_ppl: float
    probability_rms: float
    tokens: int
    windows: int
    context: int
    window_kl: tuple[float, ...]
    seconds: float


@dataclass(frozen=True)
class Compared:
    """Of each row: KL, whether the likeliest tokens agree, and the log-probabilities of the target under both."""

    kl: Tensor
    agree: Tensor
    reference: Tensor
    model: Tensor


def compare(reference: Tensor, model: Tensor, targets: Tensor) -> Compared:
    """Logits of both, float32 [n, V], and the tokens that came next, int64 [n]."""
    found = []
    for start in range(0, reference.shape[0], ROWS):
        rows = slice(start, start + ROWS)
        p, q = (torch.log_softmax(logits[rows], dim=-1) for logits in (reference, model))
        own = targets[rows, None]
        agree = p.argmax(dim=-1) == q.argmax(dim=-1)
        at_target = p.gather(1, own)[:, 0], q.gather(1, own)[:, 0]
        # Rounding may leave a sum of equal distributions just below zero.
        kl = (p.exp() * (p - q)).sum(dim=-1).clamp_(min=0)
        found.append((kl, agree, *at_target))
    return Compared(*(torch.cat(column) for column in zip(*found, strict=True)))


def divergence(
    model: LLM,
    reference: LLM | StreamedReference,
    text: Path,
    *,
    context: int = 2048,
    max_windows: int | None = None,
    progress: Callable[[int, int, float], None] | None = None,
) -> Divergence:
    """Divergence of `model` from `reference` on the UTF-8 file `text`. `progress(done, windows, mean so far)`.

    A streamed reference was made for the same text, context and number of windows.

    Raises UserError when the text is not readable or too short, ConfigError when the two have not one vocabulary.
    """
    began = time.perf_counter()
    windows = text_windows(reference.tokenizer, text, context=context, max_windows=max_windows)
    if text_windows(model.tokenizer, text, context=context, max_windows=max_windows) != windows:
        raise ConfigError("the model and the reference cut the text into different tokens; they need one tokenizer")
    other = StreamedSide(reference) if isinstance(reference, StreamedReference) else _LlmSide(reference)
    sides: tuple[Side, Side] = (other, _LlmSide(model))
    vocab = [side.vocab for side in sides]
    if vocab[0] != vocab[1]:
        raise ConfigError(f"the reference has {vocab[0]} tokens and the model {vocab[1]}; they need one vocabulary")
    found: list[Compared] = []
    for i, window in enumerate(windows):
        found.append(_window(sides, window))
        if progress is not None:
            progress(i + 1, len(windows), math.fsum(float(one.kl.mean()) for one in found) / len(found))
    return _summary(found, context=context, seconds=time.perf_counter() - began)


def _summary(found: Sequence[Compared], *, context: int, seconds: float) -> Divergence:
    kl = torch.cat([one.kl for one in found]).double()
    p, q = (torch.cat([getattr(one, name) for one in found]).double() for name in ("reference", "model"))
    ordered = kl.sort().values
    at = [float(ordered[min(len(ordered) - 1, int(share * len(ordered)))]) for share in (0.5, 0.9, 0.99, 0.999)]
    return Divergence(
        kl_mean=float(kl.mean()),
        kl_error=float(kl.std()) / math.sqrt(len(kl)) if len(kl) > 1 else math.nan,
        kl_median=at[0],
        kl_p90=at[1],
        kl_p99=at[2],
        kl_p999=at[3],
        kl_max=float(ordered[-1]),
        top1_agreement=float(torch.cat([one.agree for one in found]).double().mean()),
        ppl=math.exp(-float(q.mean())),
        reference_ppl=math.exp(-float(p.mean())),
        probability_rms=float((q.exp() - p.exp()).square().mean().sqrt()),
        tokens=len(kl),
        windows=len(found),
        context=context,
        window_kl=tuple(float(one.kl.double().mean()) for one in found),
        seconds=seconds,
    )


def _window(sides: tuple[Side, Side], window: Sequence[int]) -> Compared:
    targets = torch.tensor(window[1:])
    parts: list[Compared] = []
    done = 0
    for side in sides:
        side.begin(window)
    try:
        while done < len(targets):
            # Whoever is behind goes on, so that little waits to be compared.
            min(sides, key=lambda side: side.ready).step()
            count = min(side.ready for side in sides)
            if count:
                first, second = (side.take(count) for side in sides)
                parts.append(compare(first, second, targets[done : done + count]))
                done += count
    finally:
        for side in sides:
            side.end()
    names = ("kl", "agree", "reference", "model")
    return Compared(*(torch.cat([getattr(part, name) for part in parts]) for name in names))


class Side(Protocol):
    """One of the two models, and its logits that wait for the other's."""

    @property
    def tokenizer(self) -> Tokenizer: ...
    @property
    def vocab(self) -> int: ...
    @property
    def ready(self) -> int:
        """Rows of logits that wait."""
        ...

    def begin(self, window: Sequence[int]) -> None: ...
    def step(self) -> None:
        """Some more rows."""
        ...

    def take(self, count: int) -> Tensor:
        """The first `count` rows that wait."""
        ...

    def end(self) -> None: ...


@dataclass(eq=False)
class _LlmSide:
    """A model that is loaded."""

    llm: LLM
    _waiting: deque[Tensor] = field(default_factory=deque)
    _count: int = 0

    @property
    def tokenizer(self) -> Tokenizer:
        return self.llm.tokenizer

    @property
    def vocab(self) -> int:
        return self.runner.decoder.sizes.vocab

    @property
    def runner(self) -> ModelRunner:
        runner = self.llm.core.runner
        if not isinstance(runner, ModelRunner):
            raise UserError(f"logits cannot be read from a {type(runner).__name__}")
        return runner

    @property
    def ready(self) -> int:
        """Rows of logits that wait."""
        return sum(rows.shape[0] for rows in self._waiting)

    @property
    def _id(self) -> str:
        return f"window-{self._count}"

    def begin(self, window: Sequence[int]) -> None:
        self._count += 1
        self._waiting.clear()
        self.runner.listener = self._hear
        params = SamplingParams(max_tokens=0, prompt_logprobs=0, temperature=0.0)
        self.llm.core.add_request(self._id, window, params)

    def step(self) -> None:
        # The pools of threads belong to the process: the model that was loaded last has set them for itself.
        set_threads(self.llm.config, self.runner.decoder)
        before = self.ready
        for output in self.llm.core.step():
            if output.finish_reason is FinishReason.ERROR:
                raise EngineFault(output.error or "a window could not be computed")
        if self.ready == before:
            raise EngineFault("a step of the engine brought no logits")

    def take(self, count: int) -> Tensor:
        """The first `count` rows that wait."""
        taken = []
        while count:
            rows = self._waiting.popleft()
            if rows.shape[0] > count:
                self._waiting.appendleft(rows[count:])
                rows = rows[:count]
            taken.append(rows)
            count -= rows.shape[0]
        return taken[0] if len(taken) == 1 else torch.cat(taken)

    def end(self) -> None:
        self.llm.core.abort(self._id)
        self.runner.listener = None
        self._waiting.clear()

    def _hear(self, request_id: str, first: int, logits: Tensor) -> None:
        self._waiting.append(logits.detach().to("cpu", torch.float32, copy=True))
