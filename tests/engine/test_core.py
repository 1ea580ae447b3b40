"""EngineCore over a fake runner: outputs, stop conditions, scheduling, faults."""

from __future__ import annotations

from typing import Any

import pytest

from dibit.engine.config import SamplingParams
from dibit.engine.core import EngineCore
from dibit.engine.errors import ContextLengthError, EngineDead, RequestError
from dibit.engine.outputs import RequestOutput, merge
from dibit.engine.request import FinishReason
from dibit.engine.step import Step, StepResult
from fakes import BOS, EOS, VOCAB, FakeRunner, fake_core, fake_logprob, solo_tokens


def greedy(max_tokens: int | None = 8, **fields: Any) -> SamplingParams:
    return SamplingParams(temperature=0.0, max_tokens=max_tokens, **fields)


def run(core: EngineCore, *, max_steps: int = 1000) -> dict[str, list[RequestOutput]]:
    """Steps until nothing is left; the outputs of each request."""
    outputs: dict[str, list[RequestOutput]] = {}
    for _ in range(max_steps):
        if not core.has_work:
            assert core.stats().free_blocks == core.stats().num_blocks
            return outputs
        for output in core.step():
            outputs.setdefault(output.request_id, []).append(output)
        core.scheduler.check()
    raise AssertionError("requests do not end")


def say(reply: str | list[int], params: SamplingParams) -> list[RequestOutput]:
    """The outputs of one request whose runner says `reply`."""
    core = fake_core(FakeRunner(reply=reply.encode() if isinstance(reply, str) else reply))
    core.add_request("a", [BOS], params)
    return run(core)["a"]


def test_every_token_is_one_output_and_the_last_one_ends_it() -> None:
    core = fake_core()
    core.add_request("a", [1, 2, 3], greedy(5))
    outputs = run(core)["a"]
    assert [len(output.token_ids) for output in outputs] == [1] * 5
    whole = merge(outputs)
    assert list(whole.token_ids) == solo_tokens([1, 2, 3], 5)
    assert whole.text == bytes(whole.token_ids).decode()
    assert [output.finished for output in outputs] == [False] * 4 + [True]
    assert [output.finish_reason for output in outputs] == [None] * 4 + [FinishReason.LENGTH]
    assert [output.num_output for output in outputs] == [1, 2, 3, 4, 5]
    assert {output.num_prompt for output in outputs} == {3}
    assert whole.logprobs is None
    assert whole.prompt_logprobs is None


def test_the_models_end_token_is_counted_and_not_shown() -> None:
    outputs = say([*b"Hi", EOS], greedy(9))
    whole = merge(outputs)
    assert (whole.text, whole.token_ids) == ("Hi", (*b"Hi", EOS))
    assert (whole.finish_reason, whole.stop_reason, whole.num_output) == (FinishReason.STOP, None, 3)


def test_ignore_eos_goes_on() -> None:
    whole = merge(say([*b"Hi", EOS], greedy(5, ignore_eos=True)))
    assert (whole.text, whole.num_output, whole.finish_reason) == ("HiHi", 5, FinishReason.LENGTH)


def test_min_tokens_puts_off_every_end() -> None:
    assert merge(say([*b"ab", EOS], greedy(9, min_tokens=4))).num_output == 6
    whole = merge(say("a.", greedy(9, min_tokens=3, stop=".")))
    assert (whole.text, whole.num_output, whole.stop_reason) == ("a.a", 4, ".")


def test_a_stop_token_ends_unshown_and_is_named() -> None:
    whole = merge(say("abc", greedy(9, stop_token_ids=[ord("c")])))
    assert (whole.text, whole.finish_reason, whole.stop_reason) == ("ab", FinishReason.STOP, ord("c"))


@pytest.mark.parametrize(("include", "text"), [(False, "one "), (True, "one two")])
def test_a_stop_string_over_several_tokens_is_never_shown_in_part(*, include: bool, text: str) -> None:
    outputs = say("one two three", greedy(20, stop=["two"], include_stop_str_in_output=include))
    whole = merge(outputs)
    assert (whole.text, whole.finish_reason, whole.stop_reason) == (text, FinishReason.STOP, "two")
    assert [output.text for output in outputs[:6]] == ["o", "n", "e", " ", "", ""]


def test_held_back_text_comes_out_at_the_end() -> None:
    whole = merge(say("one tw", greedy(6, stop=["two"])))
    assert (whole.text, whole.finish_reason) == ("one tw", FinishReason.LENGTH)
    whole = merge(say([*b"one tw", EOS], greedy(60, stop=["two"])))
    assert (whole.text, whole.finish_reason) == ("one tw", FinishReason.STOP)


def test_a_character_of_several_tokens_is_shown_when_it_is_complete() -> None:
    outputs = say("é€", greedy(5))
    assert [output.text for output in outputs] == ["", "é", "", "", "€"]
    assert merge(say("é€", greedy(4))).text == "é\N{REPLACEMENT CHARACTER}"


def test_without_max_tokens_the_context_is_the_end() -> None:
    core = fake_core(FakeRunner(max_model_len=20))
    core.add_request("a", list(range(7)), greedy(None))
    last = run(core)["a"][-1]
    assert (last.num_output, last.finish_reason) == (13, FinishReason.LENGTH)


def test_what_can_never_fit_is_refused_with_both_numbers() -> None:
    core = fake_core(FakeRunner(num_blocks=5, block_size=4, max_model_len=100))
    assert core.max_model_len == 20
    with pytest.raises(ContextLengthError, match=r"20 tokens; .*20 tokens, and at least one"):
        core.add_request("a", [1] * 20, greedy(None))
    with pytest.raises(ContextLengthError, match=r"20 tokens; 21 were requested \(15 in the prompt, 6 to generate\)"):
        core.add_request("a", [1] * 15, greedy(6))
    core.add_request("a", [1] * 15, greedy(5))
    core.add_request("b", [1] * 19, greedy(None))
    assert {len(outputs) for outputs in run(core).values()} == {5, 1}


@pytest.mark.parametrize(
    ("prompt", "params", "message"),
    [
        ([], greedy(), "empty"),
        ([1, VOCAB], greedy(), f"token id {VOCAB}; this model's ids are 0 to {VOCAB - 1}"),
        ([-1], greedy(), "token id -1"),
        ([1], greedy(logit_bias={VOCAB + 3: 1.0}), "logit_bias"),
        ([1], greedy(stop_token_ids=[VOCAB]), "stop_token_ids"),
        ([1] * 250, greedy(None, min_tokens=10), "only 6 tokens fit"),
    ],
)
def test_bad_requests_are_refused(prompt: list[int], params: SamplingParams, message: str) -> None:
    core = fake_core()
    with pytest.raises(RequestError, match=message):
        core.add_request("a", prompt, params)
    assert not core.has_work


def test_an_id_in_use_is_refused() -> None:
    core = fake_core()
    core.add_request("a", [1], greedy())
    with pytest.raises(RequestError, match="'a' is in use"):
        core.add_request("a", [1], greedy())
    run(core)
    core.add_request("a", [1], greedy())


def test_logprobs_come_with_their_tokens() -> None:
    core = fake_core()
    core.add_request("a", [1, 2], greedy(3, logprobs=2))
    for output in run(core)["a"]:
        assert output.logprobs == (fake_logprob(output.token_ids[0], top=2),)


@pytest.mark.parametrize("budget", [3, 64])
def test_prompt_logprobs_are_gathered_over_chunks_and_given_once(budget: int) -> None:
    core = fake_core(max_batch_tokens=budget, max_num_seqs=2)
    prompt = list(range(10))
    core.add_request("warm", prompt, greedy(1))
    run(core)
    core.add_request("a", prompt, greedy(2, prompt_logprobs=1))
    first, second = run(core)["a"]
    assert first.prompt_logprobs == tuple(fake_logprob(token, top=1) for token in prompt[1:])
    assert second.prompt_logprobs is None


def test_prompt_logprobs_survive_preemption_within_the_prompt() -> None:
    core = fake_core(max_batch_tokens=4, max_num_seqs=2)
    prompt = list(range(10))
    core.add_request("a", prompt, greedy(1, prompt_logprobs=0))
    core.step()
    core.step()
    core.scheduler.preempt(core.scheduler.running[0])
    [output] = run(core)["a"]
    assert output.prompt_logprobs == tuple(fake_logprob(token, top=0) for token in prompt[1:])


def test_scoring_computes_the_prompt_and_draws_nothing() -> None:
    core = fake_core(max_batch_tokens=4, max_num_seqs=2)
    core.add_request("a", list(range(10)), greedy(0, prompt_logprobs=0))
    [output] = run(core)["a"]
    assert output.finish_reason is FinishReason.LENGTH
    assert (output.token_ids, output.num_output, output.text) == ((), 0, "")
    assert output.prompt_logprobs is not None
    assert len(output.prompt_logprobs) == 9
    core.add_request("one", [5], greedy(0, prompt_logprobs=0))
    assert run(core)["one"][0].prompt_logprobs == ()


PROMPTS = {"a": [1, 2, 3], "b": [1, 2, 3, 4, 5, 6, 7, 8, 9], "c": [9] * 17, "d": [1, 2, 3, 4, 5, 6, 7, 8, 5]}


@pytest.mark.parametrize(
    ("runner", "config"),
    [
        (FakeRunner(), {}),
        (FakeRunner(), {"max_batch_tokens": 4, "max_num_seqs": 4}),
        (FakeRunner(num_blocks=9), {"max_num_seqs": 4}),
        (FakeRunner(num_blocks=9, block_size=4), {"max_batch_tokens": 5, "max_num_seqs": 3}),
        (FakeRunner(num_blocks=40, block_size=1), {"max_batch_tokens": 7, "max_num_seqs": 3, "prefix_cache": False}),
    ],
    ids=["batched", "chunked", "preempted", "chunked-preempted", "uncached"],
)
def test_the_same_tokens_however_they_are_scheduled(runner: FakeRunner, config: dict[str, Any]) -> None:
    core = fake_core(runner, **config)
    for _ in range(2):
        for name, prompt in PROMPTS.items():
            core.add_request(name, prompt, greedy(18))
        outputs = run(core)
        for name, prompt in PROMPTS.items():
            assert list(merge(outputs[name]).token_ids) == solo_tokens(prompt, 18), name
    assert (core.stats().preemptions > 0) == (runner.num_blocks < 64)
    assert (core.stats().prefix_hits > 0) == core.config.prefix_cache


def test_a_seed_gives_the_same_tokens_in_any_company() -> None:
    params = SamplingParams(seed=11, max_tokens=12)
    core = fake_core()
    core.add_request("alone", [1, 2], params)
    alone = merge(run(core)["alone"]).token_ids
    for name, prompt in PROMPTS.items():
        core.add_request(name, prompt, SamplingParams(max_tokens=20))
    core.add_request("again", [1, 2], params)
    core.add_request("drawn", [1, 2], SamplingParams(max_tokens=12))
    outputs = run(core)
    assert merge(outputs["again"]).token_ids == alone
    assert merge(outputs["drawn"]).token_ids != alone


@pytest.mark.parametrize("bad", [{"b"}, {"a"}, {"a", "d"}, {"a", "b", "c"}])
def test_only_the_guilty_fail(bad: set[str]) -> None:
    runner = FakeRunner()
    runner.bad_ids = bad
    core = fake_core(runner)
    for name, prompt in PROMPTS.items():
        core.add_request(name, prompt, greedy(6))
    outputs = run(core)
    for name, prompt in PROMPTS.items():
        if name in bad:
            [output] = outputs[name]
            assert output.finish_reason is FinishReason.ERROR
            assert output.error == f"RuntimeError: cannot compute {[name]}"
        else:
            assert list(merge(outputs[name]).token_ids) == solo_tokens(prompt, 6)
    assert core.stats().failed == len(bad)


def test_a_failing_row_fails_alone_and_at_once() -> None:
    runner = FakeRunner()
    core = fake_core(runner)
    for name, prompt in PROMPTS.items():
        core.add_request(name, prompt, greedy(6))
    core.step()
    runner.failing_rows = {"b": "the logits are not finite"}
    outputs = run(core)
    assert [output.error for output in outputs["b"]] == ["the logits are not finite"]
    assert list(merge(outputs["a"]).token_ids) == solo_tokens(PROMPTS["a"], 6)[1:]


def test_a_runner_that_forgets_a_token_fails_that_request() -> None:
    class Forgetful(FakeRunner):
        def execute(self, step: Step) -> StepResult:
            result = super().execute(step)
            return StepResult({name: token for name, token in result.sampled.items() if name != "a"})

    core = fake_core(Forgetful())
    core.add_request("a", [1], greedy(3))
    core.add_request("b", [2], greedy(3))
    outputs = run(core)
    assert outputs["a"][-1].error == "the runner returned no token"
    assert list(merge(outputs["b"]).token_ids) == solo_tokens([2], 3)


def test_bad_requests_one_after_another_do_not_stop_the_engine() -> None:
    runner = FakeRunner()
    runner.bad_ids = {f"bad{i}" for i in range(10)}
    core = fake_core(runner)
    for name in sorted(runner.bad_ids):
        core.add_request(name, [1, 2, 3], greedy())
        assert run(core)[name][-1].finish_reason is FinishReason.ERROR
    core.add_request("good", [1, 2, 3], greedy())
    assert list(merge(run(core)["good"]).token_ids) == solo_tokens([1, 2, 3], 8)


def test_failures_with_successes_between_do_not_stop_the_engine() -> None:
    def fail(step: Step) -> None:
        if any(chunk.request.id.startswith("bad") or chunk.request.id == "probe" for chunk in step.chunks):
            raise OSError("not this one")

    core = fake_core(FakeRunner(on_execute=fail))
    for i in range(10):
        for name in (f"bad{i}", f"good{i}"):
            core.add_request(name, [1, 2], greedy(1))
            run(core)
    assert (core.stats().failed, core.stats().finished) == (10, 10)


def test_a_runner_that_fails_everything_is_dead_with_its_cause() -> None:
    def broken(step: Step) -> None:
        raise OSError("the device is gone")

    core = fake_core(FakeRunner(on_execute=broken), max_num_seqs=2)
    for i in range(20):
        core.add_request(f"r{i}", [1], greedy())
    with pytest.raises(EngineDead, match="the engine has stopped: OSError: the device is gone"):
        run(core)
    assert core.stats().failed < 20
    with pytest.raises(EngineDead, match="the device is gone"):
        core.step()
    with pytest.raises(EngineDead, match="the device is gone"):
        core.add_request("late", [1], greedy())


def test_out_of_memory_is_fatal_at_once() -> None:
    def full(step: Step) -> None:
        raise MemoryError("no more")

    core = fake_core(FakeRunner(on_execute=full))
    core.add_request("a", [1], greedy())
    core.add_request("b", [1], greedy())
    with pytest.raises(EngineDead, match="MemoryError: no more"):
        core.step()


def test_abort_frees_at_once_and_says_so_once() -> None:
    core = fake_core()
    core.add_request("a", list(range(9)), greedy(50))
    core.add_request("b", [1], greedy(3))
    core.step()
    output = core.abort("a")
    assert output is not None
    assert (output.finished, output.finish_reason, output.num_output) == (True, FinishReason.ABORT, 1)
    assert core.abort("a") is None
    core.scheduler.check()
    assert set(run(core)) == {"b"}
    stats = core.stats()
    assert (stats.aborted, stats.finished, stats.failed) == (1, 1, 0)


def test_stats_count() -> None:
    core = fake_core(max_batch_tokens=8, max_num_seqs=1)
    core.add_request("a", list(range(20)), greedy(3))
    core.add_request("b", list(range(20)), greedy(3))
    core.step()
    stats = core.stats()
    assert (stats.running, stats.waiting, stats.backlog_tokens) == (1, 1, 11 + 19)
    assert stats.prefill_tok_s > 0
    run(core)
    stats = core.stats()
    assert (stats.running, stats.waiting, stats.backlog_tokens) == (0, 0, 0)
    assert (stats.prompt_tokens, stats.generation_tokens) == (40, 6)
    assert (stats.prefix_queries, stats.prefix_hits) == (40, 16)
    assert (stats.num_blocks, stats.free_blocks) == (64, 64)
