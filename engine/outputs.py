"""What comes out of the engine: frozen values, safe to hand to any thread."""

from __future__ import annotations

from dataclasses import dataclass

from dibit.engine.request import FinishReason, TokenLogprob


@dataclass(frozen=True, slots=True)
class RequestOutput:
    """News of one request: normally one new token. Joined, a request's outputs are its whole result.

    text             what became certain with it; "" while a character or a stop string is incomplete
    token_ids        new tokens (none on an abort, an error, or when only the prompt was scored)
    logprobs         one entry per new token if asked for
    prompt_logprobs  once, in the output after the prompt was computed, if asked for: every prompt token but the first
    finish_reason    set exactly when `finished`
    stop_reason      the stop string or stop token id that ended it; None for the model's own end
    num_cached       prompt tokens taken from the prefix cache
    error            root cause, exactly when finish_reason is ERROR
    """

    request_id: str
    text: str = ""
    token_ids: tuple[int, ...] = ()
    logprobs: tuple[TokenLogprob, ...] | None = None
    prompt_logprobs: tuple[TokenLogprob, ...] | None = None
    finished: bool = False
    finish_reason: FinishReason | None = None
    stop_reason: str | int | None = None
    num_prompt: int = 0
    num_output: int = 0
    num_cached: int = 0
    error: str | None = None


def merge(outputs: list[RequestOutput]) -> RequestOutput:
    """Consecutive outputs of one request as one."""
    if len(outputs) == 1:
        return outputs[0]
    last = outputs[-1]
    logprobs = [entry for output in outputs for entry in output.logprobs or ()]
    return RequestOutput(
        request_id=last.request_id,
        text="".join(output.text for output in outputs),
        token_ids=tuple(token for output in outputs for token in output.token_ids),
        logprobs=tuple(logprobs) if any(output.logprobs is not None for output in outputs) else None,
        prompt_logprobs=next((o.prompt_logprobs for o in outputs if o.prompt_logprobs is not None), None),
        finished=last.finished,
        finish_reason=last.finish_reason,
        stop_reason=last.stop_reason,
        num_prompt=last.num_prompt,
        num_output=last.num_output,
        num_cached=last.num_cached,
        error=last.error,
    )


@dataclass(frozen=True, slots=True)
class Usage:
    prompt_tokens: int
    completion_tokens: int
    cached_tokens: int


@dataclass(frozen=True, slots=True)
class Completion:
    """The whole result of a request. finish_reason is "stop", "length", "abort" or "error" (then `error` says why)."""

    text: str
    token_ids: tuple[int, ...]
    finish_reason: str
    usage: Usage
    stop_reason: str | int | None = None
    logprobs: tuple[TokenLogprob, ...] | None = None
    prompt_logprobs: tuple[TokenLogprob, ...] | None = None
    error: str | None = None

    @classmethod
    def of(cls, outputs: list[RequestOutput]) -> Completion:
        """From all outputs of a finished request."""
        whole = merge(outputs)
        assert whole.finish_reason is not None
        return cls(
            text=whole.text,
            token_ids=whole.token_ids,
            finish_reason=whole.finish_reason.value,
            usage=Usage(whole.num_prompt, whole.num_output, whole.num_cached),
            stop_reason=whole.stop_reason,
            logprobs=whole.logprobs,
            prompt_logprobs=whole.prompt_logprobs,
            error=whole.error,
        )


@dataclass(frozen=True, slots=True)
class SpeculationStats:
    """Counters of guessed tokens.

    drafts       sequences of guesses that a step verified
    drafted      tokens in them; `accepted` of them were what the model said, accepted_at by their place in the draft
    emitted      tokens that those steps brought: the accepted ones and one more of each draft, up to a request's end
    drafting_s   seconds that a draft model took for them
    """

    drafts: int = 0
    drafted: int = 0
    accepted: int = 0
    emitted: int = 0
    accepted_at: tuple[int, ...] = ()
    drafting_s: float = 0.0


@dataclass(frozen=True, slots=True)
class EngineStats:
    """A snapshot. Counters (all but the first group) only grow; tokens unless said otherwise.

    running, waiting        requests
    num_blocks, free_blocks KV blocks; free ones may still hold a findable prefix (cached_blocks counts all findable)
    backlog_tokens          to be computed before every request decodes
    prefill_tok_s           measured speed of steps that compute prompts; 0 before the first
    prefix_queries, _hits   looked up on entry, and found, in the prefix cache
    prompt_tokens           of requests whose prompt was computed; generation_tokens were sampled
    finished, aborted, failed   requests, by how they ended; `cut` of the finished ones reached their length
    taped_steps, untaped_steps, beside_tape   as in step.StepCounts
    """

    running: int
    waiting: int
    num_blocks: int
    free_blocks: int
    cached_blocks: int
    backlog_tokens: int
    prefill_tok_s: float

    prefix_queries: int
    prefix_hits: int
    preemptions: int
    prompt_tokens: int
    generation_tokens: int
    finished: int
    aborted: int
    failed: int
    steps: int
    cut: int = 0
    taped_steps: int = 0
    untaped_steps: tuple[tuple[str, int], ...] = ()
    beside_tape: tuple[tuple[str, int], ...] = ()
    speculation: SpeculationStats = SpeculationStats()
