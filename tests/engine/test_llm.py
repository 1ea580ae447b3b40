"""LLM over a fake core: what it accepts, what it returns, what it leaves behind."""

from __future__ import annotations

import subprocess
import sys
from typing import Any

import pytest

from dibit.engine.config import SamplingParams
from dibit.engine.errors import ConfigError, ContextLengthError, EngineDead, EngineFault, RequestError
from dibit.engine.llm import LLM
from dibit.engine.outputs import Usage
from fakes import EOS, FakeRunner, fake_core, solo_tokens

GREEDY = SamplingParams(temperature=0.0, max_tokens=6)


def make(runner: FakeRunner | None = None, **settings: Any) -> LLM:
    return LLM.of(fake_core(runner, **settings))


def test_a_prompt_is_text_or_ids_one_or_many() -> None:
    llm = make()
    ids = llm.tokenizer.encode("hello")
    expected = tuple(solo_tokens(ids, 6))
    for prompts, count in (("hello", 1), (ids, 1), (tuple(ids), 1), (["hello", "hello"], 2), ([ids, "hello"], 2)):
        done = llm.generate(prompts, GREEDY)  # type: ignore[arg-type]
        assert [completion.token_ids for completion in done] == [expected] * count
    assert llm.generate([], GREEDY) == []


def test_a_completion_says_everything() -> None:
    llm = make(FakeRunner(reply=[*b"Hi", EOS]))
    [completion] = llm.generate("hello", SamplingParams(max_tokens=6, logprobs=1, prompt_logprobs=0))
    assert completion.text == "Hi"
    assert completion.token_ids == (*b"Hi", EOS)
    assert completion.finish_reason == "stop"
    assert completion.usage == Usage(prompt_tokens=6, completion_tokens=3, cached_tokens=0)
    assert completion.logprobs is not None
    assert [entry.token_id for entry in completion.logprobs] == [*b"Hi", EOS]
    assert completion.prompt_logprobs is not None
    assert len(completion.prompt_logprobs) == 5
    [again] = llm.generate("hello", SamplingParams(max_tokens=6))
    assert again.usage.cached_tokens == 4


def test_completions_are_in_the_order_of_the_prompts() -> None:
    llm = make(max_num_seqs=2)
    prompts = [[i] for i in range(7)]
    params = [SamplingParams(temperature=0.0, max_tokens=9 - i) for i in range(7)]
    done = llm.generate(prompts, params)
    assert [list(c.token_ids) for c in done] == [solo_tokens([i], 9 - i) for i in range(7)]


def test_one_params_for_all_or_one_for_each() -> None:
    with pytest.raises(RequestError, match="2 prompts and 3 SamplingParams"):
        make().generate(["a", "b"], [GREEDY] * 3)


def test_nothing_runs_when_one_prompt_cannot() -> None:
    runner = FakeRunner()
    llm = make(runner)
    with pytest.raises(ContextLengthError):
        llm.generate(["fine", "x" * 300], GREEDY)
    assert runner.steps == []
    assert not llm.core.has_work


def test_a_failing_request_leaves_the_others_unharmed() -> None:
    runner = FakeRunner()
    runner.bad_ids = {"llm-1"}
    done = make(runner).generate([[1], [2], [3]], GREEDY)
    assert [completion.finish_reason for completion in done] == ["length", "error", "length"]
    assert done[1].error == "RuntimeError: cannot compute ['llm-1']"
    assert list(done[2].token_ids) == solo_tokens([3], 6)


def test_chat_applies_the_template() -> None:
    llm = make()
    messages = [{"role": "user", "content": "hi"}]
    [one] = llm.chat(messages, GREEDY)
    assert list(one.token_ids) == solo_tokens(llm.tokenizer.encode("user: hi\nassistant: "), 6)
    assert [c.token_ids for c in llm.chat([messages, messages], GREEDY)] == [one.token_ids] * 2


def test_stream_gives_each_token_as_it_comes() -> None:
    runner = FakeRunner()
    llm = make(runner)
    outputs = llm.stream([1, 2], GREEDY)
    assert list(next(outputs).token_ids) == solo_tokens([1, 2], 1)
    assert len(runner.steps) == 1
    rest = list(outputs)
    assert rest[-1].finished
    assert [t for output in rest for t in output.token_ids] == solo_tokens([1, 2], 6)[1:]


def test_a_bad_request_is_refused_before_the_stream_is_read() -> None:
    with pytest.raises(RequestError, match="empty"):
        make().stream([], GREEDY)


def test_a_stream_left_early_is_aborted() -> None:
    llm = make()
    for output in llm.stream([1, 2], GREEDY):
        assert not output.finished
        break
    assert not llm.core.has_work
    assert llm.core.stats().aborted == 1
    llm.stream([1, 2], GREEDY)
    assert not llm.core.has_work, "a stream that is never read asks nothing of the engine"


def test_streams_may_be_read_in_turn_and_beside_generate() -> None:
    llm = make()
    first, second = llm.stream([1], GREEDY), llm.stream([2], GREEDY)
    got: dict[int, list[int]] = {1: [], 2: []}
    got[1] += next(first).token_ids
    got[2] += next(second).token_ids
    assert list(llm.generate([3], GREEDY)[0].token_ids) == solo_tokens([3], 6)
    got[2] += [t for output in second for t in output.token_ids]
    got[1] += [t for output in first for t in output.token_ids]
    assert got == {1: solo_tokens([1], 6), 2: solo_tokens([2], 6)}


def test_an_interrupt_leaves_nothing_behind() -> None:
    def interrupt(step: object) -> None:
        raise KeyboardInterrupt

    runner = FakeRunner(on_execute=interrupt)
    llm = make(runner)
    with pytest.raises(KeyboardInterrupt):
        llm.generate(["a", "b"], GREEDY)
    assert not llm.core.has_work
    runner.on_execute = None
    assert list(llm.generate([1], GREEDY)[0].token_ids) == solo_tokens([1], 6)


def test_score_gives_every_token_but_the_first() -> None:
    runner = FakeRunner(max_model_len=64)
    llm = make(runner, max_batch_tokens=10, max_num_seqs=4)
    scores = llm.score(list(range(64)))
    assert len(scores) == 63
    assert all(score < 0 for score in scores)
    assert runner.num_computed_tokens == 64
    assert llm.score([5]) == []
    with pytest.raises(ContextLengthError, match="64 tokens; 65 were requested"):
        llm.score([0] * 65)
    runner.failing_rows = {f"llm-{i}": "not finite" for i in range(9)}
    with pytest.raises(EngineFault, match="not finite"):
        llm.score([1, 2])


def test_settings_are_engine_config_fields() -> None:
    with pytest.raises(ConfigError, match=r"unknown setting max_seqs; supported: .*max_num_seqs"):
        LLM("demo", max_seqs=3)
    with pytest.raises(ConfigError, match="block_size is 0"):
        LLM("demo", block_size=0)


def test_closed_is_closed() -> None:
    with make() as llm:
        llm.generate("a", GREEDY)
    with pytest.raises(EngineDead, match="closed"):
        llm.generate("a", GREEDY)


def test_the_package_exports_lazily() -> None:
    code = (
        "import sys, dibit.engine as e\n"
        "e.SamplingParams, e.EngineConfig, e.errors, e.Completion, e.AsyncEngine, e.LLM\n"
        "assert not {'torch', 'transformers', 'triton', 'fastapi'} & set(sys.modules)\n"
        "try: e.Nothing\n"
        "except AttributeError: pass\n"
        "else: raise SystemExit('no AttributeError')"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
