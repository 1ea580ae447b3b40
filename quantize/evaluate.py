"""Perplexity through the serving runtime: the same engine, cache and kernels that answer requests.

The protocol of the weight-quantization papers (GPTQ, Frantar et al. 2022, and all after it): the text is tokenized
once, cut into windows of `context` tokens that do not overlap, each window is scored alone, and

    perplexity = exp(mean over windows of the mean negative log-likelihood of tokens 2..context)

A remainder shorter than a window is left out. No beginning-of-sequence token is put before each window; the
tokenizer's own goes before the text once, if it has one.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from dibit.engine.errors import UserError
from dibit.engine.llm import LLM
from dibit.engine.runner import ModelRunner
from dibit.engine.tokenizer import Tokenizer


@dataclass(frozen=True)
class Perplexity:
    """ppl over `windows` windows of `context` tokens; `tokens` were predicted (context - 1 of each window).

    seconds, scoring_seconds  time it took, and the share of it in the head and the log-probabilities, which serving
                              computes for the last token of a prompt only; the rest is prefill
    tokens_per_s              tokens of the windows over `seconds`
    """

    ppl: float
    tokens: int
    windows: int
    context: int
    window_nll: tuple[float, ...]
    seconds: float
    scoring_seconds: float
    tokens_per_s: float


def text_windows(tokenizer: Tokenizer, text: Path, *, context: int, max_windows: int | None = None) -> list[list[int]]:
    """The windows of the UTF-8 file `text`, the first `max_windows` of them.

    Raises UserError when the file cannot be read or is shorter than one window.
    """
    if context < 2:
        raise UserError(f"a context of {context} tokens predicts nothing; use at least 2")
    if max_windows is not None and max_windows < 1:
        raise UserError(f"{max_windows} windows measure nothing; use at least 1")
    try:
        content = text.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"cannot read {text} as UTF-8 text: {error}") from error
    ids = tokenizer.encode(content)
    count = len(ids) // context
    if count == 0:
        raise UserError(f"{text} has {len(ids)} tokens, fewer than one window of {context}; use a smaller --ctx")
    if max_windows is not None:
        count = min(count, max_windows)
    return [list(ids[i * context : (i + 1) * context]) for i in range(count)]


def perplexity(
    llm: LLM,
    text: Path,
    *,
    context: int = 2048,
    max_windows: int | None = None,
    progress: Callable[[int, int, float], None] | None = None,
) -> Perplexity:
    """Perplexity of `llm` on the UTF-8 file `text`. `progress(done, windows, ppl so far)` after each window.

    Raises UserError when the file cannot be read or is shorter than one window.
    """
    windows = text_windows(llm.tokenizer, text, context=context, max_windows=max_windows)
    began, scored_before = time.perf_counter(), _scoring_s(llm)
    losses: list[float] = []
    for i, window in enumerate(windows):
        scores = llm.score(window)
        losses.append(-math.fsum(scores) / len(scores))
        if progress is not None:
            progress(i + 1, len(windows), math.exp(math.fsum(losses) / len(losses)))
    seconds = time.perf_counter() - began
    return Perplexity(
        ppl=math.exp(math.fsum(losses) / len(windows)),
        tokens=len(windows) * (context - 1),
        windows=len(windows),
        context=context,
        window_nll=tuple(losses),
        seconds=seconds,
        scoring_seconds=_scoring_s(llm) - scored_before,
        tokens_per_s=len(windows) * context / seconds,
    )


def _scoring_s(llm: LLM) -> float:
    runner = llm.core.runner
    return runner.scoring_s if isinstance(runner, ModelRunner) else 0.0
