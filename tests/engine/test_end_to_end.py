"""The whole engine on the demo model: however a prompt is scheduled, greedy decoding gives the same tokens."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import pytest

from dibit.engine.config import EngineConfig, SamplingParams
from dibit.engine.core import EngineCore
from dibit.engine.llm import LLM
from dibit.engine.outputs import Completion
from dibit.engine.request import FinishReason

pytestmark = pytest.mark.demo

LENGTH = 8
GREEDY = SamplingParams(temperature=0.0, max_tokens=LENGTH, ignore_eos=True)
PROMPTS = (
    "The capital of France is",
    "Water boils at",
    "The planets of the solar system, in order of their distance from the Sun, are Mercury,",
    "def fibonacci(n):\n    if n < 2:\n        return",
)
TOKEN_BYTES = 30 * 2 * 3 * 64 * 4  # layers, keys and values, heads, head size, float32


# One thread: compute threads that wait for each other are slow where other processes hold the cores.
@pytest.fixture(scope="module", params=["float", "4 bits"])
def llm(request: pytest.FixtureRequest) -> Iterator[LLM]:
    model = "demo" if request.param == "float" else request.getfixturevalue("low_bit_demo")
    with LLM(model, max_model_len=512, max_num_seqs=8, threads=1, kv_type="float32") as demo:
        yield demo


@pytest.fixture(scope="module")
def alone(llm: LLM) -> list[Completion]:
    return [llm.generate(prompt, GREEDY)[0] for prompt in PROMPTS]


def again(llm: LLM, **settings: Any) -> LLM:
    """The same weights behind another cache and another scheduler."""
    from dibit.engine.runner import ModelRunner

    runner = llm.core.runner
    assert isinstance(runner, ModelRunner)
    config = EngineConfig(**{"max_model_len": 512, "max_num_seqs": 8, "threads": 1, "kv_type": "float32", **settings})
    return LLM.of(EngineCore(ModelRunner(runner.decoder, config), llm.tokenizer, config))


def same(completions: list[Completion], expected: list[Completion]) -> bool:
    return [c.token_ids for c in completions] == [c.token_ids for c in expected]


def test_it_knows_the_capital_of_france(alone: list[Completion]) -> None:
    assert alone[0].text.startswith(" Paris")
    assert alone[0].finish_reason == "length"
    assert alone[0].usage.completion_tokens == LENGTH


def test_it_answers_in_its_chat_format_and_stops(llm: LLM) -> None:
    question = [{"role": "user", "content": "What is the capital of France? Answer with one word."}]
    [answer] = llm.chat(question, SamplingParams(temperature=0.0, max_tokens=40))
    assert "Paris" in answer.text
    assert "<|im_end|>" not in answer.text
    assert answer.finish_reason == "stop"


def test_in_chunks(llm: LLM, alone: list[Completion]) -> None:
    fresh = again(llm, max_batch_tokens=7, max_num_seqs=4)
    assert same(fresh.generate(PROMPTS, GREEDY), alone)
    assert fresh.core.stats().steps > LENGTH + 4


@pytest.mark.parametrize("llm", ["4 bits"], indirect=True)
def test_an_fp8_cache(llm: LLM) -> None:
    """Not under float weights, whose products differ in their last bits with the number of tokens: keys at the border
    of two bytes then round to either."""
    whole = again(llm, kv_type="fp8")
    expected = [whole.generate(prompt, GREEDY)[0] for prompt in PROMPTS]
    assert expected[0].text.startswith(" Paris")
    chunked = again(llm, kv_type="fp8", max_batch_tokens=7, max_num_seqs=4, block_size=4)
    for _ in range(2):
        assert same(chunked.generate(PROMPTS, GREEDY), expected)
    assert chunked.core.stats().steps > LENGTH + 4


def test_preempted(llm: LLM, alone: list[Completion]) -> None:
    fresh = again(llm, max_model_len=32, block_size=4, kv_bytes=14 * 4 * TOKEN_BYTES)
    assert fresh.core.pool.num_blocks == 14
    assert same(fresh.generate(PROMPTS, GREEDY), alone)
    assert fresh.core.stats().preemptions > 0


def test_batched_without_and_with_a_cached_prefix(llm: LLM, alone: list[Completion]) -> None:
    fresh = again(llm, block_size=4)
    for hits in (False, True):
        completions = fresh.generate(PROMPTS, GREEDY)
        assert same(completions, alone)
        assert all((c.usage.cached_tokens > 0) == hits for c in completions if c.usage.prompt_tokens > 4)


def test_a_seed_gives_the_same_text_in_any_company(llm: LLM) -> None:
    params = SamplingParams(seed=5, max_tokens=6)
    [lone] = llm.generate(PROMPTS[0], params)
    company = llm.generate([*PROMPTS[1:], PROMPTS[0]], [SamplingParams(max_tokens=8)] * 3 + [params])
    assert company[-1].token_ids == lone.token_ids


def test_streamed_text_is_the_whole_text(llm: LLM, alone: list[Completion]) -> None:
    outputs = list(llm.stream(PROMPTS[2], GREEDY))
    assert "".join(output.text for output in outputs) == alone[2].text
    assert outputs[-1].finish_reason is FinishReason.LENGTH


def test_scores_are_those_of_the_generated_tokens(llm: LLM) -> None:
    """What the runtime says of a text it scores is what it said when it generated it."""
    prompt = llm.tokenizer.encode(PROMPTS[0])
    [said] = llm.generate([prompt], SamplingParams(temperature=0.0, max_tokens=6, logprobs=0, ignore_eos=True))
    scores = again(llm, max_batch_tokens=5, max_num_seqs=2).score([*prompt, *said.token_ids])
    assert said.logprobs is not None
    for score, entry in zip(scores[-6:], said.logprobs, strict=True):
        assert math.isclose(score, entry.logprob, abs_tol=1e-4)


def test_a_draft_model_changes_no_token(low_bit_demo: Any) -> None:
    settings: dict[str, Any] = {"max_model_len": 512, "max_num_seqs": 8, "threads": 1}
    with LLM(low_bit_demo, **settings) as plain:
        expected = plain.generate(PROMPTS, GREEDY)
    drafting = {"speculative": "draft", "draft_model": str(low_bit_demo), "num_speculative_tokens": 3}
    with LLM(low_bit_demo, **settings, **drafting) as llm:
        assert same(llm.generate(PROMPTS, GREEDY), expected)
        stats = llm.core.stats()
    assert stats.speculation.accepted == stats.speculation.drafted > 0
    assert {reason for reason, _ in stats.untaped_steps} == {"prefill"}
    assert stats.taped_steps > 0
