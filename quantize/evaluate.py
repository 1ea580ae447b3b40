"""Perplexity through the serving runtime: the same engine, cache and kernels that answer requests.

The protocol of the weight-quantization papers (GPTQ, Frantar et al. 2022, and all after it): the text is tokenized
once, cut into windows of `context` tokens that do not overlap, each window is scored alone, and

    perplexity = exp(mean over windows of the mean negative log-likelihood of tokens 2..context)

A remainder shorter than a window is left out. No beginning-of-sequence token is put before each window; the
tokenizer's own goes before the text once, if it has one.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from dibit.engine.errors import UserError
from dibit.engine.llm import LLM


@dataclass(frozen=True)
class Perplexity:
    """ppl over `windows` windows of `context` tokens; `tokens` were predicted (context - 1 of each window)."""

    ppl: float
    tokens: int
    windows: int
    context: int
    window_nll: tuple[float, ...]


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
    if context < 2:
        raise UserError(f"a context of {context} tokens predicts nothing; use at least 2")
    try:
        content = text.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"cannot read {text} as UTF-8 text: {error}") from error
    ids = llm.tokenizer.encode(content)
    windows = len(ids) // context
    if max_windows is not None:
        windows = min(windows, max_windows)
    if windows == 0:
        raise UserError(f"{text} has {len(ids)} tokens, fewer than one window of {context}; use a smaller --ctx")
    losses: list[float] = []
    for i in range(windows):
        scores = llm.score(ids[i * context : (i + 1) * context])
        losses.append(-math.fsum(scores) / len(scores))
        if progress is not None:
            progress(i + 1, windows, math.exp(math.fsum(losses) / len(losses)))
    return Perplexity(
        ppl=math.exp(math.fsum(losses) / windows),
        tokens=windows * (context - 1),
        windows=windows,
        context=context,
        window_nll=tuple(losses),
    )
