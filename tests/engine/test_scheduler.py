"""Scheduler: who gets how many tokens in a step, who waits, who is thrown out."""

from __future__ import annotations

import subprocess
import sys
from typing import Any

from dibit.engine.blocks import BlockPool
from dibit.engine.config import EngineConfig, SamplingParams
from dibit.engine.request import FinishReason, Request, Status
from dibit.engine.scheduler import Scheduler
from dibit.engine.step import Sampled, Step, StepResult

SIZE = 4


def make(num_blocks: int = 64, **settings: Any) -> Scheduler:
    return Scheduler(
        BlockPool(num_blocks, SIZE), EngineConfig(**{"max_batch_tokens": 64, "max_itl_ratio": 0.0, **settings})
    )


def ask(name: str, prompt: int | list[int], *, max_tokens: int = 50, **params: Any) -> Request:
    """A request whose prompt, if given by length, is like no other request's."""
    ids = [hash((name, i)) % 1000 for i in range(prompt)] if isinstance(prompt, int) else prompt
    return Request(name, tuple(ids), SamplingParams(max_tokens=max_tokens, **params), max_tokens, seed=0)


def advance(scheduler: Scheduler) -> dict[str, int]:
    """Runs one step with token 7 for whoever samples; how many tokens each request got."""
    step = scheduler.schedule()
    result = StepResult({chunk.request.id: Sampled(7) for chunk in step.chunks if chunk.samples})
    scheduler.commit(step, result)
    scheduler.check()
    return counts(step)


def counts(step: Step) -> dict[str, int]:
    return {chunk.request.id: chunk.count for chunk in step.chunks}


def test_needs_no_torch() -> None:
    code = "import sys, dibit.engine.scheduler; assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_a_long_prompt_is_cut_to_the_budget() -> None:
    scheduler = make(max_batch_tokens=10, max_num_seqs=4)
    scheduler.add(ask("a", 25))
    assert [advance(scheduler) for _ in range(4)] == [{"a": 10}, {"a": 10}, {"a": 5}, {"a": 1}]


def test_what_is_left_of_the_budget_goes_to_the_next_in_line() -> None:
    scheduler = make(max_batch_tokens=10, max_num_seqs=4)
    for name, length in (("a", 6), ("b", 7), ("c", 2)):
        scheduler.add(ask(name, length))
    assert advance(scheduler) == {"a": 6, "b": 4}
    assert advance(scheduler) == {"a": 1, "b": 3, "c": 2}
    assert advance(scheduler) == {"a": 1, "b": 1, "c": 1}


def test_no_decode_waits_behind_long_prompts() -> None:
    scheduler = make(num_blocks=500, max_batch_tokens=8, max_num_seqs=8)
    for i in range(12):
        scheduler.add(ask(f"r{i}", 1 + 37 * i % 90, max_tokens=400))
    for _ in range(200):
        decoding = {r.id for r in scheduler.running if r.num_tokens - r.num_computed == 1}
        got = advance(scheduler)
        assert all(got.get(name) == 1 for name in decoding), got
        assert sum(got.values()) == 8
    assert len(scheduler.running) == 8


def test_decodes_all_run_beside_a_prompt_in_chunks() -> None:
    scheduler = make(num_blocks=200, max_batch_tokens=16, max_num_seqs=8)
    for name in "abc":
        scheduler.add(ask(name, 3))
    advance(scheduler)
    scheduler.add(ask("long", 60))
    assert advance(scheduler) == {"a": 1, "b": 1, "c": 1, "long": 13}
    scheduler.add(ask("late", 2))
    assert advance(scheduler) == {"a": 1, "b": 1, "c": 1, "long": 13}


def test_no_more_sequences_than_allowed_run() -> None:
    scheduler = make(max_num_seqs=2)
    for name in "abc":
        scheduler.add(ask(name, 3))
    assert advance(scheduler) == {"a": 3, "b": 3}
    scheduler.finish(scheduler.running[0], FinishReason.STOP)
    assert advance(scheduler) == {"b": 1, "c": 3}


def test_entry_needs_blocks_for_the_whole_prompt_and_is_in_order() -> None:
    scheduler = make(num_blocks=10, max_batch_tokens=8, max_num_seqs=4)
    scheduler.add(ask("a", 20))
    scheduler.add(ask("b", 20))
    scheduler.add(ask("c", 1))
    assert advance(scheduler) == {"a": 8}
    assert len(scheduler.running[0].block_ids) == 5
    assert advance(scheduler) == {"a": 8}
    assert advance(scheduler) == {"a": 4}, "b needs five blocks and a reserve; c is behind b"
    scheduler.finish(scheduler.running[0], FinishReason.STOP)
    assert advance(scheduler) == {"b": 8}


def test_a_request_of_the_size_of_the_pool_runs_alone() -> None:
    scheduler = make(num_blocks=4)
    scheduler.add(ask("a", 16))
    assert advance(scheduler) == {"a": 16}


def test_the_youngest_gives_way_and_comes_back_first() -> None:
    scheduler = make(num_blocks=5, max_num_seqs=4)
    a, b, c = ask("a", 7), ask("b", 7), ask("c", 1)
    for request in (a, b, c):
        scheduler.add(request)
    assert advance(scheduler) == {"a": 7, "b": 7}
    assert advance(scheduler) == {"a": 1, "b": 1}
    assert advance(scheduler) == {"a": 1}, "a grows into the last block, b gives its two up"
    assert b.status is Status.WAITING
    assert (b.num_preemptions, b.num_computed, b.block_ids) == (1, 0, [])
    assert [request.id for request in scheduler.waiting] == ["b", "c"]
    assert scheduler.num_preemptions == 1
    scheduler.finish(a, FinishReason.STOP)
    assert advance(scheduler) == {"b": 1, "c": 1}, "b's two full blocks were found again"
    assert b.num_cached == 0, "its own blocks are no cached prompt"


def test_nobody_starves_however_often_it_is_preempted() -> None:
    scheduler = make(num_blocks=6, max_num_seqs=4, max_batch_tokens=8)
    requests = [ask(f"r{i}", 5, max_tokens=19) for i in range(6)]
    for request in requests:
        scheduler.add(request)
    order = []
    for _ in range(1000):
        advance(scheduler)
        for request in requests:
            if not request.finished and request.num_output >= request.max_tokens:
                scheduler.finish(request, FinishReason.LENGTH)
                order.append(request.id)
    assert order == [request.id for request in requests], "first come, first served"
    assert scheduler.num_preemptions > 0
    assert not scheduler.has_work
    scheduler.pool.check([])


def test_a_common_prefix_is_computed_once() -> None:
    scheduler = make(max_num_seqs=4)
    common = list(range(100, 110))
    scheduler.add(ask("a", [*common, 1]))
    assert advance(scheduler) == {"a": 11}
    b = ask("b", [*common, 2])
    scheduler.add(b)
    assert advance(scheduler) == {"a": 1, "b": 3}
    assert b.num_cached == 8
    assert b.block_ids[:2] == scheduler.running[0].block_ids[:2]
    assert (scheduler.prefix_queries, scheduler.prefix_hits) == (22, 8)


def test_the_last_token_is_always_computed() -> None:
    scheduler = make()
    prompt = list(range(8))
    a = ask("a", prompt)
    scheduler.add(a)
    advance(scheduler)
    scheduler.finish(a, FinishReason.STOP)
    scheduler.add(ask("b", prompt))
    assert advance(scheduler) == {"b": 4}


def test_generated_tokens_are_a_prefix_for_the_next_turn() -> None:
    scheduler = make()
    a = ask("a", 3)
    scheduler.add(a)
    for _ in range(6):
        advance(scheduler)
    said = list(a.token_ids)
    scheduler.finish(a, FinishReason.STOP)
    b = ask("b", [*said, 1, 2])
    scheduler.add(b)
    advance(scheduler)
    assert b.num_cached == 8


def test_salts_prompt_logprobs_and_settings_keep_prefixes_apart() -> None:
    prompt = list(range(9))

    def cached(second: Request, **settings: Any) -> int:
        scheduler = make(**settings)
        scheduler.add(ask("first", prompt))
        advance(scheduler)
        scheduler.add(second)
        advance(scheduler)
        return second.num_cached

    salted = ask("b", prompt)
    salted.cache_salt = "tenant"
    assert cached(ask("b", prompt)) == 8
    assert cached(salted) == 0
    assert cached(ask("b", prompt, prompt_logprobs=0)) == 0
    assert cached(ask("b", prompt), prefix_cache=False) == 0


def test_abort_frees_at_once_in_every_state() -> None:
    scheduler = make(max_num_seqs=1, max_batch_tokens=4)
    running, waiting = ask("running", 10), ask("waiting", 4)
    scheduler.add(running)
    scheduler.add(waiting)
    advance(scheduler)
    assert scheduler.abort("waiting") is waiting
    assert scheduler.abort("running") is running
    assert scheduler.abort("running") is None
    assert scheduler.abort("unknown") is None
    assert running.finish_reason is waiting.finish_reason is FinishReason.ABORT
    assert not scheduler.has_work
    scheduler.pool.check([])
    assert scheduler.schedule().chunks == ()


def test_a_request_that_ended_during_a_step_is_left_as_it_is() -> None:
    scheduler = make()
    request, other = ask("a", 5), ask("b", 5)
    scheduler.add(request)
    scheduler.add(other)
    step = scheduler.schedule()
    scheduler.abort("a")
    advances = scheduler.commit(step, StepResult({"a": Sampled(7), "b": Sampled(8)}))
    assert [advance.request.id for advance in advances] == ["b"]
    assert request.num_output == 0
    assert other.output_ids == [8]
    scheduler.check()


def test_scoring_draws_nothing() -> None:
    scheduler = make()
    scheduler.add(ask("a", 5, max_tokens=0, prompt_logprobs=0))
    [chunk] = scheduler.schedule().chunks
    assert not chunk.samples


def test_backlog_counts_what_is_to_be_computed() -> None:
    scheduler = make(max_batch_tokens=10, max_num_seqs=2)
    scheduler.add(ask("a", 25))
    scheduler.add(ask("b", 5))
    advance(scheduler)
    assert scheduler.backlog_tokens == 14 + 4
