"""The loop's body: requests in, one step, outputs out. Synchronous; no threads, no sockets, no asyncio.

Invariants: every request that was submitted ends in exactly one output with `finished`; a failure in the runner ends
only the requests that cause it, since a failing step is run again in halves (a chunk's computation and its draw do not
depend on its batch-mates, so the others get the tokens they would have got); an error that is nobody's fault raises
EngineDead with its cause, now and on every later call.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from dibit.engine import isolation
from dibit.engine.admission import Admission
from dibit.engine.blocks import BlockPool
from dibit.engine.config import EngineConfig, SamplingParams
from dibit.engine.detokenizer import IncrementalDetokenizer
from dibit.engine.errors import EngineDead, RequestError
from dibit.engine.isolation import describe
from dibit.engine.messages import Add
from dibit.engine.outputs import EngineStats, RequestOutput
from dibit.engine.request import FinishReason, Request, TokenLogprob
from dibit.engine.scheduler import Advance, Scheduler
from dibit.engine.speculation import Drafter
from dibit.engine.step import Chunk, Runner, Sampled, Step, StepResult
from dibit.engine.tokenizer import Tokenizer

logger = logging.getLogger(__name__)

# Steps in a row in which every request failed singly, after which the runner is tried on a request of our own.
TOTAL_FAILURES_BEFORE_PROBE = 3
_RATE_SMOOTHING = 0.3


@dataclass(eq=False, slots=True)
class _Ticket:
    """A request in the core, and what is remembered of it."""

    request: Request
    detokenizer: IncrementalDetokenizer
    prompt_logprobs: list[TokenLogprob] = field(default_factory=list)
    prompt_done: bool = False


class EngineCore:
    """Scheduler, runner and tokenizer at work. Used by one thread.

    drafter  what guesses tokens ahead (None: what the settings name)
    clock  seconds, from anywhere; steps are timed by it, and what they take decides how many tokens of prompts go into
           the next ones
    """

    def __init__(
        self,
        runner: Runner,
        tokenizer: Tokenizer,
        config: EngineConfig,
        *,
        drafter: Drafter | None = None,
        clock: Callable[[], float] = time.perf_counter,
    ) -> None:
        self._clock = clock
        self.runner = runner
        self.tokenizer = tokenizer
        self.config = config
        self.pool = BlockPool(runner.num_blocks, runner.block_size)
        self.scheduler = Scheduler(self.pool, config, num_layers=runner.num_layers, drafter=drafter)
        self.max_model_len = min(runner.max_model_len, runner.num_blocks * runner.block_size)
        self.admission = Admission(self.max_model_len, tokenizer.vocab_size)
        self.dead: str | None = None
        self._tickets: dict[str, _Ticket] = {}
        self._total_failures = 0
        self._prefill_tok_s = 0.0
        self._prompt_tokens = self._generation_tokens = self._steps = 0
        self._ended = dict.fromkeys(FinishReason, 0)

    @property
    def has_work(self) -> bool:
        return self.scheduler.has_work

    def prepare(
        self, request_id: str, prompt_ids: Sequence[int], params: SamplingParams, *, cache_salt: str = ""
    ) -> Add:
        """A request for `submit`, checked. Raises RequestError (ContextLengthError when it can never fit)."""
        return self.admission.admit(request_id, prompt_ids, params, cache_salt=cache_salt)

    def submit(self, add: Add) -> None:
        """Queues an admitted request. Raises RequestError when its id is in use."""
        self._raise_if_dead()
        if add.request_id in self._tickets:
            raise RequestError(f"request id {add.request_id!r} is in use; choose another", param="request_id")
        request = Request(
            id=add.request_id,
            prompt_ids=add.prompt_ids,
            params=add.params,
            max_tokens=add.max_tokens,
            seed=add.seed,
            eos_ids=frozenset() if add.params.ignore_eos else self.tokenizer.eos_ids,
            cache_salt=add.cache_salt,
            arrival_s=time.monotonic(),
        )
        self._tickets[request.id] = _Ticket(request, self._detokenizer(request))
        self.scheduler.add(request)

    def add_request(
        self, request_id: str, prompt_ids: Sequence[int], params: SamplingParams, *, cache_salt: str = ""
    ) -> None:
        """`prepare` and `submit`."""
        self.submit(self.prepare(request_id, prompt_ids, params, cache_salt=cache_salt))

    def abort(self, request_id: str) -> RequestOutput | None:
        """Ends a request now, freeing what it holds; its last output. None when it is unknown, or has ended."""
        ticket = self._tickets.get(request_id)
        if ticket is None:
            return None
        return self._end(ticket, FinishReason.ABORT, text=ticket.detokenizer.flush())

    def step(self) -> list[RequestOutput]:
        """Runs one step and says what it brought; [] when there is nothing to do. Raises EngineDead."""
        self._raise_if_dead()
        outputs: list[RequestOutput] = []
        step = self.scheduler.schedule()
        if not step.chunks:
            return outputs
        started_s = self._clock()
        result = self._execute(step)
        self._steps += 1
        if not result.failed:
            self._measure(step, self._clock() - started_s + step.drafting_s)
        advances = self.scheduler.commit(step, result)
        for request_id, error in result.failed.items():
            if request_id in self._tickets:
                outputs.append(self._fail(self._tickets[request_id], error))
        for advance in advances:
            ticket = self._tickets[advance.request.id]
            try:
                output = self._advance(ticket, advance, result.prompt_logprobs.get(advance.request.id, ()))
            except Exception as error:
                logger.exception("request %s failed while its text was made", advance.request.id)
                output = self._fail(ticket, describe(error))
            if output is not None:
                outputs.append(output)
            if not advance.request.finished:
                outputs += self._advance_further(ticket, advance.further)
        return outputs

    def stats(self) -> EngineStats:
        scheduler, counts = self.scheduler, self.runner.step_counts
        return EngineStats(
            running=len(scheduler.running),
            waiting=len(scheduler.waiting),
            num_blocks=self.pool.num_blocks,
            free_blocks=self.pool.num_free,
            cached_blocks=self.pool.num_cached,
            backlog_tokens=scheduler.backlog_tokens,
            prefill_tok_s=self._prefill_tok_s,
            prefix_queries=scheduler.prefix_queries,
            prefix_hits=scheduler.prefix_hits,
            preemptions=scheduler.num_preemptions,
            prompt_tokens=self._prompt_tokens,
            generation_tokens=self._generation_tokens,
            finished=self._ended[FinishReason.STOP] + self._ended[FinishReason.LENGTH],
            cut=self._ended[FinishReason.LENGTH],
            aborted=self._ended[FinishReason.ABORT],
            failed=self._ended[FinishReason.ERROR],
            steps=self._steps,
            taped_steps=counts.taped,
            untaped_steps=counts.untaped,
            beside_tape=counts.beside,
            speculation=scheduler.speculation.snapshot(),
        )

    def _advance(
        self, ticket: _Ticket, advance: Advance, prompt_logprobs: tuple[TokenLogprob, ...]
    ) -> RequestOutput | None:
        """Books what a step brought a request: its output, ended by the first stop condition that holds."""
        request, params = ticket.request, ticket.request.params
        scored: tuple[TokenLogprob, ...] | None = None
        if not ticket.prompt_done:
            if params.prompt_logprobs is not None:
                # A request preempted in its prompt computes a part of it again: take what is new only.
                known = len(ticket.prompt_logprobs) - advance.chunk.start
                ticket.prompt_logprobs += prompt_logprobs[known:]
            if advance.chunk.stop < request.num_prompt:
                return None
            ticket.prompt_done = True
            self._prompt_tokens += request.num_prompt
            if params.prompt_logprobs is not None:
                scored, ticket.prompt_logprobs = tuple(ticket.prompt_logprobs), []
                if len(scored) != request.num_prompt - 1:
                    raise RuntimeError(f"{len(scored)} log-probabilities for {request.num_prompt} prompt tokens")
        if request.max_tokens == 0:
            return self._end(ticket, FinishReason.LENGTH, prompt_logprobs=scored)
        if advance.sampled is None:
            return None
        return self._say(ticket, advance.sampled, scored)

    def _advance_further(self, ticket: _Ticket, further: tuple[Sampled, ...]) -> list[RequestOutput]:
        """Books the tokens that came of drafts, up to the one that ends the request."""
        outputs: list[RequestOutput] = []
        for sampled in further:
            self.scheduler.accept(ticket.request, sampled)
            try:
                outputs.append(self._say(ticket, sampled))
            except Exception as error:
                logger.exception("request %s failed while its text was made", ticket.request.id)
                outputs.append(self._fail(ticket, describe(error)))
            if outputs[-1].finished:
                return outputs
        return outputs

    def _say(self, ticket: _Ticket, sampled: Sampled, scored: tuple[TokenLogprob, ...] | None = None) -> RequestOutput:
        """The output of a new token, the last one of its request."""
        self._generation_tokens += 1
        logprobs = None if sampled.logprob is None else (sampled.logprob,)
        reason, text = self._check_stop(ticket, sampled.token_id)
        ids = (sampled.token_id,)
        if reason is None:
            return self._output(ticket, text=text, token_ids=ids, logprobs=logprobs, prompt_logprobs=scored)
        return self._end(ticket, reason, text=text, token_ids=ids, logprobs=logprobs, prompt_logprobs=scored)

    def _check_stop(self, ticket: _Ticket, token: int) -> tuple[FinishReason | None, str]:
        """Whether a request ends with its new token, and the text that became certain."""
        request, params = ticket.request, ticket.request.params
        if request.num_output >= params.min_tokens and (token in request.eos_ids or token in params.stop_token_ids):
            request.stop_reason = token if token in params.stop_token_ids else None
            return FinishReason.STOP, ticket.detokenizer.flush()
        text = ticket.detokenizer.push(token)
        if ticket.detokenizer.stopped is not None:
            request.stop_reason = ticket.detokenizer.stopped
            return FinishReason.STOP, text
        if request.num_output >= request.max_tokens:
            return FinishReason.LENGTH, text + ticket.detokenizer.flush()
        if params.stop and 0 < params.min_tokens == request.num_output:
            ticket.detokenizer = self._detokenizer(request)
        return None, text

    def _detokenizer(self, request: Request) -> IncrementalDetokenizer:
        """What turns the request's next tokens into text; it looks for stop strings from min_tokens on."""
        params = request.params
        return self.tokenizer.stream(
            request.token_ids,
            stop=params.stop if request.num_output >= params.min_tokens else (),
            include_stop=params.include_stop_str_in_output,
        )

    def _execute(self, step: Step) -> StepResult:
        """The step's result; what raises is narrowed down to the requests that make it raise."""
        try:
            found = isolation.execute(self.runner, step)
        except (MemoryError, EngineDead) as error:
            raise self._die(error) from error
        if len(found.raised) < len(step.chunks):
            self._total_failures = 0
        else:
            self._total_failures += 1
            if self._total_failures >= TOTAL_FAILURES_BEFORE_PROBE:
                self._probe(step.chunks[0], found.raised[step.chunks[0].request.id])
        return found.result

    def _probe(self, failed: Chunk, cause: BaseException) -> None:
        """Tells bad requests from a broken runner: EngineDead(cause) unless it computes a token of our own.

        It writes to the block that the failed chunk would have written to: nobody else holds that one, and its
        request is at its end.
        """
        block = failed.request.block_ids[failed.start // self.pool.block_size]
        probe = Request("probe", (0,), SamplingParams(temperature=0.0, max_tokens=1), 1, 0, block_ids=[block])
        try:
            self.runner.execute(Step((Chunk(probe, 0, 1),)))
        except Exception:
            raise self._die(cause) from cause

    def _die(self, cause: BaseException) -> EngineDead:
        self.dead = str(cause) if isinstance(cause, EngineDead) else f"the engine has stopped: {describe(cause)}"
        return EngineDead(self.dead)

    def _raise_if_dead(self) -> None:
        if self.dead is not None:
            raise EngineDead(self.dead)

    def _measure(self, step: Step, elapsed_s: float) -> None:
        decodes = sum(chunk.request.decodes for chunk in step.chunks)
        drafts = sum(len(chunk.drafts) for chunk in step.chunks)
        tokens = keys = 0.0
        for chunk in step.chunks:
            if not chunk.request.decodes:
                share = chunk.count * chunk.share(self.runner.num_layers)
                tokens += share
                keys += share * (chunk.start + chunk.count / 2)
        context = keys / tokens if tokens else 0.0
        self.scheduler.cost.observe(elapsed_s, decodes=decodes, prompt_tokens=tokens, context=context, drafts=drafts)
        if tokens and elapsed_s > 0:
            rate = tokens / elapsed_s
            last = self._prefill_tok_s or rate
            self._prefill_tok_s = last + _RATE_SMOOTHING * (rate - last)

    def _fail(self, ticket: _Ticket, error: str) -> RequestOutput:
        return self._end(ticket, FinishReason.ERROR, error=error)

    def _end(
        self,
        ticket: _Ticket,
        reason: FinishReason,
        *,
        text: str = "",
        token_ids: tuple[int, ...] = (),
        logprobs: tuple[TokenLogprob, ...] | None = None,
        prompt_logprobs: tuple[TokenLogprob, ...] | None = None,
        error: str | None = None,
    ) -> RequestOutput:
        """The one way out: everything a request holds is freed here."""
        request = ticket.request
        self.scheduler.finish(request, reason)
        del self._tickets[request.id]
        self._ended[reason] += 1
        if reason in (FinishReason.ABORT, FinishReason.ERROR):
            logger.info("request %s ended: %s after %d tokens", request.id, reason.value, request.num_output)
        return self._output(
            ticket, text=text, token_ids=token_ids, logprobs=logprobs, prompt_logprobs=prompt_logprobs, error=error
        )

    def _output(
        self,
        ticket: _Ticket,
        *,
        text: str,
        token_ids: tuple[int, ...],
        logprobs: tuple[TokenLogprob, ...] | None,
        prompt_logprobs: tuple[TokenLogprob, ...] | None,
        error: str | None = None,
    ) -> RequestOutput:
        request = ticket.request
        return RequestOutput(
            request_id=request.id,
            text=text,
            token_ids=token_ids,
            logprobs=logprobs,
            prompt_logprobs=prompt_logprobs,
            finished=request.finished,
            finish_reason=request.finish_reason,
            stop_reason=request.stop_reason,
            num_prompt=request.num_prompt,
            num_output=request.num_output,
            num_cached=request.num_cached,
            error=error,
        )
