"""What runs next: one rule, in plain Python.

Every request has `num_tokens` and `num_computed`; each step spends a budget of tokens so that the second catches up
with the first. Decoding, (chunked) prefill, prefix-cache hits and recomputation after preemption are all that rule.

Order of service: running requests, oldest first; then waiting ones, first come, first served. A request enters only
when some budget is left, so at most one running request still has a prompt to compute, and it is the youngest: every
other one decodes, and none of them waits behind a long prompt. How much of a prompt is computed beside them in a step
is chunker.py's to say.

A request enters with the blocks of everything it has so far, plus a small reserve, so that it is not thrown out at
once. When a running request needs a block and none is left, the youngest running one gives its blocks up and waits
again at the head of the queue; its full blocks stay findable, so most of the recomputation is a prefix-cache hit.

No starvation: the oldest running request always gets on, because it can take every other's blocks, and the caller
admits no request that would not fit into the whole pool alone.
"""

from __future__ import annotations

import dataclasses
import math
from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass

from dibit.engine.blocks import BlockPool, block_key, root_key
from dibit.engine.chunker import Chunker
from dibit.engine.config import EngineConfig
from dibit.engine.request import Begun, FinishReason, Request, Status
from dibit.engine.speculation import Asked, Drafter, PromptLookup
from dibit.engine.speculator import Speculator
from dibit.engine.step import Chunk, Sampled, Step, StepResult
from dibit.engine.step_cost import StepCost

# Share of the pool that stays free when a request enters beside running ones: room for them to grow.
RESERVE_SHARE = 0.02


@dataclass(frozen=True, slots=True)
class Advance:
    """What a step did for a request: `chunk` is computed, and `sampled` (if any) appended to its tokens. `further`
    tokens came of drafts; they are not appended yet: the caller gives them to `accept` while the request goes on."""

    request: Request
    chunk: Chunk
    sampled: Sampled | None
    further: tuple[Sampled, ...] = ()


class Scheduler:
    """Owns the queue, the running list and every request's block table.

    num_layers  that the chunks of prompts may be cut into
    """

    def __init__(
        self, pool: BlockPool, config: EngineConfig, *, num_layers: int = 1, drafter: Drafter | None = None
    ) -> None:
        self.pool = pool
        self.max_num_seqs = config.max_num_seqs
        self.max_batch_tokens = config.max_batch_tokens
        self.cost = StepCost()
        self._chunker = Chunker(
            self.cost, max_ratio=config.max_itl_ratio, slo_s=config.itl_slo_ms / 1000, num_layers=num_layers
        )
        self.prefix_cache = config.prefix_cache
        self.waiting: deque[Request] = deque()
        self.running: list[Request] = []  # in order of entry: the last is the youngest
        self.num_preemptions = 0
        self.prefix_queries = 0  # tokens looked up, and found, in the prefix cache
        self.prefix_hits = 0
        if drafter is None and config.speculative == "ngram":
            drafter = PromptLookup(config.prompt_lookup_min, config.prompt_lookup_max)
        self.speculation = Speculator(drafter, max_drafts=config.num_speculative_tokens)
        self._requests: dict[str, Request] = {}
        self._reserve = math.ceil(RESERVE_SHARE * pool.num_blocks)

    def __contains__(self, request_id: str) -> bool:
        return request_id in self._requests

    def __iter__(self) -> Iterator[Request]:
        return iter(self._requests.values())

    @property
    def has_work(self) -> bool:
        return bool(self._requests)

    @property
    def backlog_tokens(self) -> int:
        """Tokens that are to be computed before every request decodes."""
        return sum(max(0, r.num_tokens - r.num_computed - 1) for r in self._requests.values())

    def add(self, request: Request) -> None:
        self._requests[request.id] = request
        self.waiting.append(request)

    def abort(self, request_id: str) -> Request | None:
        """Ends a request whatever its state; None when there is no such request (any more)."""
        request = self._requests.get(request_id)
        if request is not None:
            self.finish(request, FinishReason.ABORT)
        return request

    def finish(self, request: Request, reason: FinishReason) -> None:
        del self._requests[request.id]
        if request.status is Status.RUNNING:
            self.running.remove(request)
        else:
            self.waiting.remove(request)
        self.pool.release(request.block_ids)
        request.block_ids = []
        request.status = Status.FINISHED
        request.finish_reason = reason

    def preempt(self, request: Request) -> None:
        """Takes a running request's blocks; it waits at the head of the queue to be computed again."""
        self.running.remove(request)
        self.pool.release(request.block_ids)
        request.block_ids = []
        request.num_computed = 0
        request.begun = None
        request.drafting.lose_blocks()
        request.num_preemptions += 1
        request.status = Status.WAITING
        self.waiting.appendleft(request)
        self.num_preemptions += 1

    def schedule(self) -> Step:
        """The next step, with the blocks for it allotted; empty only when there is no request."""
        chunks: list[Chunk] = []
        budget = self.max_batch_tokens
        decodes = sum(request.decodes for request in self.running)
        prompts = len(self.running) - decodes + min(len(self.waiting), self.max_num_seqs - len(self.running))
        chunker = self._chunker
        chunker.begin_step(decodes=decodes, prompts=prompts)
        for request in tuple(self.running):
            if request.status is not Status.RUNNING:
                break
            if request.decodes:
                chunk = Chunk(request, request.num_computed, 1)
            elif chunker.open:
                chunk = chunker.cut(request, budget=budget)
            else:
                continue
            while not self._grow(request, chunk.stop):
                youngest = self.running[-1]
                self.preempt(youngest)
                if youngest is request:
                    break
            else:
                chunks.append(chunk)
                budget -= chunk.count
        while budget > 0 and chunker.open and self.waiting and len(self.running) < self.max_num_seqs:
            request = self.waiting[0]
            if not self._enter(request):
                break
            chunks.append(chunker.cut(request, budget=budget))
            budget -= chunks[-1].count
        if chunker.quiet:
            return Step(tuple(chunks))
        counts = self.speculation.counts(chunks, self.cost, budget=budget)
        return self._draft(chunks, counts) if any(counts) else Step(tuple(chunks))

    def commit(self, step: Step, result: StepResult) -> list[Advance]:
        """Books a step's result: what is computed, the sampled tokens, the blocks that are full now.

        Requests that failed, or ended since, are left as they are.
        """
        advances: list[Advance] = []
        for chunk in step.chunks:
            request = chunk.request
            if request.status is not Status.RUNNING or request.id in result.failed:
                continue
            if chunk.last_layer is not None:
                request.begun = Begun(chunk.count, chunk.last_layer)
                continue
            request.begun = None
            sampled = result.sampled[request.id] if chunk.samples else None
            request.num_computed = chunk.stop
            self._index_full_blocks(request)
            if sampled is not None:
                request.token_ids.append(sampled.token_id)
            further = result.further.get(request.id, ())
            if chunk.drafts:
                self._book_drafts(chunk, len(further))
            advances.append(Advance(request, chunk, sampled, further))
        return advances

    def accept(self, request: Request, sampled: Sampled) -> None:
        """Appends a token that a draft agreed with: what it follows is computed already."""
        request.num_computed += 1
        self._index_full_blocks(request)
        request.token_ids.append(sampled.token_id)
        self.speculation.emit()

    def check(self) -> None:
        """AssertionError unless queue, running list, requests and pool agree."""
        assert len(self.running) + len(self.waiting) == len(self._requests)
        assert all(r.status is Status.RUNNING for r in self.running)
        assert all(r.status is Status.WAITING and not r.block_ids for r in self.waiting)
        assert all(r.num_tokens - r.num_computed <= 1 for r in self.running[:-1])
        for request in self.running:
            assert request.num_computed <= len(request.block_ids) * self.pool.block_size
            assert request.num_computed < request.num_tokens or request.num_output == 0
        self.pool.check(request.block_ids for request in self._requests.values())

    def _draft(self, chunks: list[Chunk], counts: list[int]) -> Step:
        """The step of chunks that decode, with drafts where there is room for them."""
        asked = [
            Asked(chunk.request, count)
            for chunk, count in zip(chunks, counts, strict=True)
            if count and self._grow(chunk.request, chunk.stop + count)
        ]
        catch_up_tokens = int(min(max(self._chunker.tokens(0), 1), self.max_batch_tokens))
        proposals, drafting_s = self.speculation.propose(asked, catch_up_tokens=catch_up_tokens)
        drafted: list[Chunk] = []
        for chunk in chunks:
            if (found := proposals.get(chunk.request.id)) is not None:
                chunk = dataclasses.replace(chunk, drafts=found.tokens, odds=found.odds)
                self._shrink(chunk.request, chunk.stop + len(chunk.drafts))
            drafted.append(chunk)
        return Step(tuple(drafted), drafting_s)

    def _book_drafts(self, chunk: Chunk, accepted: int) -> None:
        """Counts a chunk's drafts, and gives back the blocks that only rejected ones needed."""
        self.speculation.book(chunk, accepted=accepted)
        self._shrink(chunk.request, chunk.stop + accepted)

    def _shrink(self, request: Request, num_tokens: int) -> None:
        needed = self.pool.blocks_for(num_tokens)
        self.pool.release(request.block_ids[needed:])
        del request.block_ids[needed:]

    def _grow(self, request: Request, num_tokens: int) -> bool:
        missing = self.pool.blocks_for(num_tokens) - len(request.block_ids)
        if missing > self.pool.num_free:
            return False
        if missing > 0:
            request.block_ids += self.pool.take(missing)
        return True

    def _enter(self, request: Request) -> bool:
        """Moves the head of the queue to the running list, with blocks for all its tokens, if there are enough."""
        cached = self._cached_blocks(request)
        missing = self.pool.blocks_for(request.num_tokens) - len(cached)
        reserve = self._reserve if self.running else 0
        if missing + reserve > self.pool.num_free_without(cached):
            return False
        self.pool.hold(cached)
        request.block_ids = cached + self.pool.take(missing)
        request.num_computed = len(cached) * self.pool.block_size
        request.num_indexed = len(cached)
        if request.num_preemptions == 0:
            request.num_cached = request.num_computed
        self.prefix_queries += request.num_tokens
        self.prefix_hits += request.num_computed
        request.status = Status.RUNNING
        self.waiting.popleft()
        self.running.append(request)
        return True

    def _cached_blocks(self, request: Request) -> list[int]:
        # The last token is always computed, since the next one is drawn from its output; a request for the prompt's
        # log-probabilities needs the output at every prompt token.
        needs_whole_prompt = request.params.prompt_logprobs is not None and request.num_output == 0
        if not self.prefix_cache or needs_whole_prompt:
            return []
        usable = (request.num_tokens - 1) // self.pool.block_size
        return self.pool.match(self._keys(request, usable), request.token_ids)

    def _index_full_blocks(self, request: Request) -> None:
        if not self.prefix_cache:
            return
        size = self.pool.block_size
        full = request.num_computed // size
        keys = self._keys(request, full)
        for i in range(request.num_indexed, full):
            self.pool.index(request.block_ids[i], keys[i], request.token_ids[i * size : (i + 1) * size])
        request.num_indexed = full

    def _keys(self, request: Request, count: int) -> list[bytes]:
        """Keys of the request's first `count` blocks, all full; computed once."""
        size, keys = self.pool.block_size, request.block_keys
        while len(keys) < count:
            start = len(keys) * size
            parent = keys[-1] if keys else root_key(request.cache_salt)
            keys.append(block_key(parent, request.token_ids[start : start + size]))
        return keys[:count]
