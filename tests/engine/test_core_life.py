"""A state machine over EngineCore: whatever happens to requests in too small a pool, each ends as if alone."""

from __future__ import annotations

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import Bundle, RuleBasedStateMachine, invariant, precondition, rule

from dibit.engine.config import SamplingParams
from dibit.engine.outputs import RequestOutput, merge
from dibit.engine.request import FinishReason
from fakes import FakeRunner, fake_core, fake_logprob, solo_tokens


class Life(RuleBasedStateMachine):
    """Requests come, are aborted, thrown out, made to fail, in a pool that is too small; each ends as if alone."""

    names = Bundle("names")

    def __init__(self) -> None:
        super().__init__()
        self.runner = FakeRunner(num_blocks=7, block_size=2, max_model_len=14)
        self.core = fake_core(self.runner, max_num_seqs=3, max_batch_tokens=5)
        self.prompts: dict[str, list[int]] = {}
        self.outputs: dict[str, list[RequestOutput]] = {}

    @rule(
        target=names,
        prompt=st.lists(st.integers(0, 1), min_size=1, max_size=8),
        max_tokens=st.integers(0, 6),
        scored=st.booleans(),
    )
    def add(self, prompt: list[int], max_tokens: int, *, scored: bool) -> str:
        name = f"r{len(self.prompts)}"
        self.prompts[name] = prompt
        scored = scored or max_tokens == 0
        params = SamplingParams(temperature=0.0, max_tokens=max_tokens, prompt_logprobs=0 if scored else None)
        self.core.add_request(name, prompt, params)
        return name

    @rule(name=names)
    def abort(self, name: str) -> None:
        if (output := self.core.abort(name)) is not None:
            self.outputs.setdefault(name, []).append(output)

    @rule(name=names)
    def break_one(self, name: str) -> None:
        self.runner.bad_ids.add(name)

    @precondition(lambda self: self.core.scheduler.running)
    @rule(which=st.integers(0, 2))
    def preempt(self, which: int) -> None:
        running = self.core.scheduler.running
        self.core.scheduler.preempt(running[which % len(running)])

    @rule()
    def step(self) -> None:
        for output in self.core.step():
            self.outputs.setdefault(output.request_id, []).append(output)

    @invariant()
    def consistent(self) -> None:
        self.core.scheduler.check()

    def teardown(self) -> None:
        for _ in range(500):
            if not self.core.has_work:
                break
            self.step()
            self.core.scheduler.check()
        assert not self.core.has_work, "requests do not end"
        self.core.pool.check([])
        assert self.core.pool.num_free == 7
        for name, prompt in self.prompts.items():
            outputs = self.outputs[name]
            assert [output.finished for output in outputs] == [False] * (len(outputs) - 1) + [True]
            whole = merge(outputs)
            assert list(whole.token_ids) == solo_tokens(prompt, len(whole.token_ids))
            if whole.finish_reason is FinishReason.ERROR:
                assert name in self.runner.bad_ids
            if whole.prompt_logprobs is not None:
                assert whole.prompt_logprobs == tuple(fake_logprob(token, top=0) for token in prompt[1:])


Life.TestCase.settings = settings(max_examples=150, stateful_step_count=40, deadline=None)
TestLife = Life.TestCase
