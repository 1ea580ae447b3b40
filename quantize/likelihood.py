"""What task suites ask of a model, answered by the serving runtime: how likely a continuation is, a text as a whole,
and what the model writes until a stop string.

Multiple-choice tasks compare continuations of one context by their log-likelihood. Requests go to the engine many at a
time and are batched there. A prompt that is too long loses tokens at its beginning, as task suites expect.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from dibit.engine.config import SamplingParams
from dibit.engine.errors import EngineFault, UserError
from dibit.engine.llm import LLM
from dibit.engine.outputs import Completion
from dibit.engine.tokenizer import HFTokenizer, Tokenizer

# Requests that are handed to the engine at a time: more than run together, few enough to tell how far it is.
GROUP = 64

Progress = Callable[[int, int], None]


@dataclass(frozen=True)
class Continuation:
    """How likely are these tokens after those? Both have at least one."""

    context: tuple[int, ...]
    tokens: tuple[int, ...]


@dataclass(frozen=True)
class Likelihood:
    """logprob  natural logarithm of the probability of all tokens of a continuation
    greedy   whether each of them is the likeliest one in its place
    """

    logprob: float
    greedy: bool


@dataclass(frozen=True)
class Writing:
    """A text to be continued: its tokens, and how."""

    prompt: tuple[int, ...]
    params: SamplingParams


def likelihoods(llm: LLM, asked: Sequence[Continuation], *, progress: Progress | None = None) -> list[Likelihood]:
    """Of each continuation. Raises UserError for one without tokens or context, EngineFault when one fails."""
    for one in asked:
        if not one.context or not one.tokens:
            raise UserError("a continuation needs at least one token, and one before it")
        if len(one.tokens) >= llm.max_model_len:
            raise UserError(
                f"a continuation has {len(one.tokens)} tokens, and the context has {llm.max_model_len}, one of them "
                "for what comes before; raise --max-model-len"
            )
    params = SamplingParams(max_tokens=0, prompt_logprobs=0, temperature=0.0)
    keys = [((*one.context, *one.tokens)[-llm.max_model_len :], len(one.tokens)) for one in asked]
    # Many tasks ask for the same text again.
    lengths: dict[tuple[int, ...], set[int]] = {}
    for prompt, length in keys:
        lengths.setdefault(prompt, set()).add(length)
    distinct = sorted(lengths, key=lambda prompt: (-len(prompt), prompt))
    found: dict[tuple[tuple[int, ...], int], Likelihood] = {}
    for start in range(0, len(distinct), GROUP):
        group = distinct[start : start + GROUP]
        for prompt, scored in zip(group, llm.generate(group, params), strict=True):
            for length in lengths[prompt]:
                found[prompt, length] = _likelihood(scored, length)
        if progress is not None:
            progress(min(start + GROUP, len(distinct)), len(distinct))
    return [found[key] for key in keys]


def _likelihood(scored: Completion, length: int) -> Likelihood:
    """Of the last `length` tokens."""
    if scored.prompt_logprobs is None:
        raise EngineFault(scored.error or "a prompt was not scored")
    entries = scored.prompt_logprobs[-length:]
    return Likelihood(math.fsum(entry.logprob for entry in entries), all(entry.rank == 1 for entry in entries))


def text_likelihoods(llm: LLM, texts: Sequence[Sequence[int]], *, progress: Progress | None = None) -> list[float]:
    """Log-probability of each text, every token predicted once, the first from `first_token`.

    A text longer than the context is cut into pieces that fill it, each after the last token of the piece before.
    """
    length = llm.max_model_len - 1
    asked: list[Continuation] = []
    owners: list[int] = []
    for i, tokens in enumerate(texts):
        previous = first_token(llm.tokenizer)
        for start in range(0, len(tokens), length):
            piece = tuple(tokens[start : start + length])
            asked.append(Continuation((previous,), piece))
            owners.append(i)
            previous = piece[-1]
    totals = [0.0] * len(texts)
    for i, found in zip(owners, likelihoods(llm, asked, progress=progress), strict=True):
        totals[i] += found.logprob
    return totals


def write(llm: LLM, asked: Sequence[Writing], *, progress: Progress | None = None) -> list[str]:
    """What follows each prompt, stop strings left out. Raises UserError where nothing of a prompt would be left."""
    prompts = []
    for one in asked:
        room = llm.max_model_len - (one.params.max_tokens or 0)
        if room < 1:
            raise UserError(
                f"{one.params.max_tokens} tokens are to be written, and the context has {llm.max_model_len}; "
                "ask for fewer, or raise --max-model-len"
            )
        prompts.append(one.prompt[-room:])
    texts: list[str] = []
    for start in range(0, len(asked), GROUP):
        params = [one.params for one in asked[start : start + GROUP]]
        for done in llm.generate(prompts[start : start + GROUP], params):
            if done.error is not None:
                raise EngineFault(done.error)
            texts.append(done.text)
        if progress is not None:
            progress(len(texts), len(asked))
    return texts


def first_token(tokenizer: Tokenizer) -> int:
    """What a text is predicted from when nothing comes before it: what the tokenizer puts there, else its BOS, else
    an end of text."""
    begun = tokenizer.encode("")
    if begun:
        return begun[0]
    known = tokenizer.bos_id if isinstance(tokenizer, HFTokenizer) else None
    if known is None and not tokenizer.eos_ids:
        raise UserError("the tokenizer has neither a first nor an end token to predict a text from")
    return min(tokenizer.eos_ids) if known is None else known
