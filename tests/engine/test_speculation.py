"""Prompt lookup: the tokens are those of no speculation, in fewer steps, and no block is lost over rejected ones."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny_models import BACKENDS, hf_model, quantized, weights_of

from dibit.engine.config import EngineConfig, SamplingParams
from dibit.engine.core import EngineCore
from dibit.engine.errors import ConfigError
from dibit.engine.loader import load_decoder
from dibit.engine.outputs import RequestOutput
from dibit.engine.runner import ModelRunner
from dibit.engine.speculation import RETRY_STEPS, Drafting, PromptLookup, allot
from dibit.engine.step import Step
from dibit.engine.step_cost import StepCost
from dibit.kernels.formats import Format
from fakes import EOS, ByteTokenizer, FakeRunner


class Ticking:
    """A clock that goes on by what a step costs: one second, and draft_s for every token that it drafts."""

    def __init__(self, *, draft_s: float = 0.0) -> None:
        self.now_s = 0.0
        self.draft_s = draft_s
        self.steps = 0

    def spend(self, step: Step) -> None:
        self.steps += 1
        self.now_s += 1.0 + self.draft_s * sum(len(chunk.drafts) for chunk in step.chunks)


def run(core: EngineCore, prompts: list[list[int]], **params: Any) -> dict[str, list[RequestOutput]]:
    asked = SamplingParams(**{"max_tokens": 40, "temperature": 0.0, **params})
    for i, prompt in enumerate(prompts):
        core.add_request(f"r{i}", prompt, asked)
    said: dict[str, list[RequestOutput]] = {f"r{i}": [] for i in range(len(prompts))}
    while core.has_work:
        for output in core.step():
            said[output.request_id].append(output)
        core.scheduler.check()
    assert core.pool.num_free == core.pool.num_blocks
    return said


def faked(
    reply: list[int], prompts: list[list[int]], *, draft_s: float = 0.0, num_blocks: int = 200, **params: Any
) -> tuple[list[Any], list[Any], Ticking, EngineCore]:
    """Tokens, text and end of each request without speculation and with it."""
    found = []
    for method in ("off", "ngram"):
        clock = Ticking(draft_s=draft_s)
        runner = FakeRunner(reply=reply or None, num_blocks=num_blocks, max_model_len=200, on_execute=clock.spend)
        config = EngineConfig(speculative=method, max_num_seqs=4, prompt_lookup_min=1)
        core = EngineCore(runner, ByteTokenizer(), config, clock=lambda clock=clock: clock.now_s)  # type: ignore[misc]
        said = run(core, prompts, **params)
        found.append(
            [
                (
                    [token for output in outputs for token in output.token_ids],
                    "".join(output.text for output in outputs),
                    outputs[-1].finish_reason,
                    outputs[-1].stop_reason,
                    [output.finished for output in outputs].count(True),
                )
                for outputs in said.values()
            ]
        )
    return found[0], found[1], clock, core


@given(
    reply=st.lists(st.sampled_from([97, 98, EOS]), max_size=14),
    prompts=st.lists(st.lists(st.sampled_from([97, 98]), min_size=1, max_size=20), min_size=1, max_size=5),
    num_blocks=st.integers(16, 60),
    max_tokens=st.integers(1, 40),
    stop=st.sampled_from([(), ("bab",), ("aabb", "bbb")]),
    min_tokens=st.integers(0, 9),
)
@settings(max_examples=60, deadline=None)
def test_tokens_text_and_end_are_those_of_no_speculation(
    reply: list[int], prompts: list[list[int]], num_blocks: int, max_tokens: int, stop: tuple[str, ...], min_tokens: int
) -> None:
    plain, guessed, _clock, _core = faked(
        reply,
        prompts,
        num_blocks=num_blocks,
        max_tokens=max_tokens,
        stop=stop,
        min_tokens=min(min_tokens, max_tokens),
    )
    assert guessed == plain


def test_text_that_repeats_takes_fewer_steps() -> None:
    plain, guessed, clock, core = faked(list(b"the same again, "), [[1]], max_tokens=120)
    assert guessed == plain
    assert clock.steps < 60
    stats = core.stats().speculation
    assert 0 < stats.accepted <= stats.drafted
    assert core.stats().generation_tokens == 120
    assert stats.accepted == sum(stats.accepted_at)
    assert list(stats.accepted_at) == sorted(stats.accepted_at, reverse=True)
    assert stats.emitted == stats.drafts + stats.accepted


def test_it_stops_where_it_does_not_pay() -> None:
    _plain, _guessed, _clock, core = faked(list(b"the same again, "), [[1]], draft_s=5.0, max_tokens=150)
    assert core.stats().speculation.drafted < 30


def test_requests_for_logprobs_are_left_alone() -> None:
    _plain, _guessed, _clock, core = faked(list(b"ab"), [[1]], logprobs=2)
    assert core.stats().speculation.drafted == 0


def test_lookup_goes_on_as_the_longest_run_did() -> None:
    lookup = PromptLookup(2, 3)
    assert lookup.look_up(Drafting(), [1, 2, 3, 4, 9, 2, 3, 7, 1, 2, 3], 3) == (4, 9, 2)
    assert lookup.look_up(Drafting(), [5, 2, 3, 4, 9, 2, 3, 7, 1, 2, 3], 2) == (7, 1)
    assert lookup.look_up(Drafting(), [1, 2, 3, 4], 3) == ()
    assert lookup.look_up(Drafting(), [8, 1, 2, 1, 2], 5) == (1, 2, 1, 2, 1)


@given(st.lists(st.integers(0, 2), min_size=1, max_size=40))
def test_lookup_token_by_token_is_lookup_at_once(tokens: list[int]) -> None:
    lookup, drafting = PromptLookup(1, 3), Drafting()
    for end in range(1, len(tokens) + 1):
        assert lookup.look_up(drafting, tokens[:end], 4) == lookup.look_up(Drafting(), tokens[:end], 4)


def sure(places: int = 30) -> Drafting:
    drafting = Drafting()
    for _ in range(places):
        drafting.book(drafted=4, accepted=4)
    return drafting


def poor() -> Drafting:
    drafting = Drafting()
    for _ in range(30):
        drafting.book(drafted=4, accepted=0)
    return drafting


def test_how_many_are_worthwhile() -> None:
    cost = StepCost()
    assert allot([(sure(), 5)], cost, decodes=1) == [0], "what a step takes is not known"
    cost.observe(1.0, decodes=1, prompt_tokens=0)
    assert allot([(sure(), 5)], cost, decodes=1) == [5], "to learn what drafts take"
    cost.observe(1.5, decodes=1, prompt_tokens=0, drafts=5)
    assert allot([(sure(), 5)], cost, decodes=1) == [5]
    doubtful = poor()
    tries = [allot([(doubtful, 5)], cost, decodes=1)[0] for _ in range(2 * RETRY_STEPS)]
    assert [n for n in tries if n] == [2, 2]


def test_drafts_that_only_pay_together_are_given_together() -> None:
    cost = StepCost()
    cost.observe(1.0, decodes=8, prompt_tokens=0)
    # Verifying takes more than half a step, however few drafts there are: too much for the drafts of one sequence.
    cost.observe(1.6, decodes=8, prompt_tokens=0, drafts=16)
    assert allot([(sure(), 4)], cost, decodes=8) == [0]
    assert allot([(sure(), 4) for _ in range(8)], cost, decodes=8) == [4] * 8
    mixed = allot([(sure(), 4), (poor(), 4)] * 4, cost, decodes=8)
    assert mixed == [4, 0] * 4


def test_a_lookup_that_cannot_be_is_refused() -> None:
    with pytest.raises(ConfigError, match="prompt_lookup_max"):
        EngineConfig(prompt_lookup_min=5, prompt_lookup_max=4)


@pytest.mark.parametrize(
    "backend",
    BACKENDS,
)
@pytest.mark.parametrize("temperature", [0.0, 0.7])
def test_a_model_says_the_same_with_drafts(backend: str, temperature: float) -> None:
    tokens = []
    for method in ("off", "ngram"):
        config = EngineConfig(
            backend=backend,  # type: ignore[arg-type]
            speculative=method,
            block_size=4,
            max_num_seqs=4,
            threads=1,
            prompt_lookup_min=1,
            max_model_len=96,
        )
        clock = Ticking()
        weights = weights_of(hf_model()) if backend == "reference" else quantized(weights_of(hf_model()), Format(4, 16))
        runner = ModelRunner(load_decoder(weights, config=config), config)
        core = EngineCore(runner, ByteTokenizer(), config, clock=lambda clock=clock: clock.now_s)  # type: ignore[misc]
        execute = runner.execute

        def timed(step: Step, execute: Any = execute, clock: Ticking = clock) -> Any:
            clock.spend(step)
            return execute(step)

        runner.execute = timed  # type: ignore[method-assign]
        prompts = [[5, 6, 7] * 6, [1, 2] * 8]
        request = {"temperature": temperature, "top_k": 2, "seed": 3, "max_tokens": 60, "ignore_eos": True}
        for i, prompt in enumerate(prompts):
            core.add_request(f"r{i}", prompt, SamplingParams(**request))  # type: ignore[arg-type]
        found: dict[str, list[int]] = {"r0": [], "r1": []}
        while core.has_work:
            for output in core.step():
                found[output.request_id] += output.token_ids
        tokens.append(found)
        assert (core.stats().speculation.drafted > 0) == (method == "ngram")
    assert core.stats().speculation.accepted > 0
    assert tokens[0] == tokens[1]
