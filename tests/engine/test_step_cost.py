"""What steps cost: a long prompt beside requests that decode, under a clock that goes by what is computed."""

from __future__ import annotations

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from dibit.engine.config import EngineConfig, SamplingParams
from dibit.engine.core import EngineCore
from dibit.engine.errors import ConfigError
from dibit.engine.step import Step
from dibit.engine.step_cost import MIN_CHUNK_TOKENS, StepCost
from fakes import ByteTokenizer, FakeRunner

PROMPT = 1500


class Machine:
    """A clock, and a runner whose steps take fixed_s + token_s per token + key_s per key that a token looks at."""

    def __init__(self, *, fixed_s: float, token_s: float, key_s: float = 0.0) -> None:
        self.now_s = 0.0
        self.costs: list[tuple[float, int]] = []
        self.fixed_s, self.token_s, self.key_s = fixed_s, token_s, key_s
        self.runner = FakeRunner(num_blocks=1000, max_model_len=2000, block_size=4, on_execute=self._spend)

    def _spend(self, step: Step) -> None:
        keys = sum(chunk.count * chunk.stop for chunk in step.chunks)
        cost_s = self.fixed_s + self.token_s * step.num_tokens + self.key_s * keys
        self.now_s += cost_s
        self.costs.append((cost_s, step.num_tokens))

    def core(self, **config: float) -> EngineCore:
        settings = EngineConfig(**{"max_batch_tokens": 512, "max_num_seqs": 8, **config})  # type: ignore[arg-type]
        return EngineCore(self.runner, ByteTokenizer(), settings, clock=lambda: self.now_s)


def arrival(machine: Machine, *, decodes: int = 2, **config: float) -> tuple[float, list[tuple[float, int]]]:
    """Seconds of a quiet step, then what the steps cost while a long prompt is computed beside it."""
    core = machine.core(**config)
    for i in range(decodes):
        core.add_request(f"r{i}", [i + 1] * 40, SamplingParams(max_tokens=300, temperature=0.0))
    for _ in range(12):
        core.step()
    quiet_s = machine.costs[-1][0] if decodes else 0.0
    first = len(machine.costs)
    core.add_request("long", [9] * PROMPT, SamplingParams(max_tokens=2, temperature=0.0))
    while "long" in {r.id for r in core.scheduler} and len(machine.costs) - first < 200:
        core.step()
        core.scheduler.check()
    assert "long" not in {r.id for r in core.scheduler}, "the prompt does not get on"
    return quiet_s, machine.costs[first:]


@given(
    fixed_s=st.floats(0.001, 0.1),
    token_s=st.floats(1e-5, 0.01),
    decodes=st.integers(1, 6),
    ratio=st.floats(1.5, 6.0),
)
@example(fixed_s=0.008, token_s=0.0008, decodes=1, ratio=2.5)
@settings(max_examples=15, deadline=None)
def test_a_long_prompt_holds_decoding_up_within_the_ratio(
    fixed_s: float, token_s: float, decodes: int, ratio: float
) -> None:
    machine = Machine(fixed_s=fixed_s, token_s=token_s)
    quiet_s, costs = arrival(machine, decodes=decodes, max_itl_ratio=ratio)
    least = fixed_s + token_s * (decodes + MIN_CHUNK_TOKENS)
    bound_s = max(ratio * quiet_s, least) * 1.001
    assert all(cost_s <= bound_s for cost_s, _tokens in costs), (quiet_s, costs)


def test_what_the_ratio_allows_is_used() -> None:
    machine = Machine(fixed_s=0.010, token_s=0.0002)
    quiet_s, costs = arrival(machine, max_itl_ratio=2.5)
    assert costs[10][0] > 2.0 * quiet_s


def test_chunks_shrink_as_the_context_grows() -> None:
    machine = Machine(fixed_s=0.010, token_s=0.0001, key_s=2e-7)
    quiet_s, costs = arrival(machine, max_itl_ratio=2.5)
    assert max(cost_s for cost_s, _tokens in costs) < 3.0 * quiet_s
    assert costs[-4][1] < costs[3][1]


def test_zero_is_no_bound() -> None:
    machine = Machine(fixed_s=0.001, token_s=0.01)
    _quiet_s, costs = arrival(machine, max_itl_ratio=0)
    assert costs[0][1] == 512


def test_alone_a_prompt_is_not_cut() -> None:
    machine = Machine(fixed_s=0.001, token_s=0.01)
    _quiet_s, costs = arrival(machine, decodes=0)
    assert [tokens for _s, tokens in costs] == [512, 512, 476, 1]


def test_the_same_times_give_the_same_steps() -> None:
    runs = [arrival(Machine(fixed_s=0.003, token_s=0.0007, key_s=1e-7)) for _ in range(2)]
    assert runs[0] == runs[1]


def test_nothing_is_bound_before_anything_is_known() -> None:
    cost = StepCost()
    assert cost.chunk_tokens(decodes=3, max_ratio=2.0) is None
    cost.observe(0.5, decodes=3, prompt_tokens=100)
    assert cost.chunk_tokens(decodes=3, max_ratio=2.0) is None
    cost.observe(0.1, decodes=3, prompt_tokens=0)
    assert cost.chunk_tokens(decodes=3, max_ratio=2.0) is None
    cost.observe(0.3, decodes=3, prompt_tokens=20)
    assert cost.chunk_tokens(decodes=3, max_ratio=5.0) == 40
    assert cost.chunk_tokens(decodes=3, max_ratio=1.1) == MIN_CHUNK_TOKENS
    assert cost.chunk_tokens(decodes=0, max_ratio=2.0) is None


@pytest.mark.parametrize("ratio", [1.0, -2.0, 0.5, float("inf"), float("nan")])
def test_a_ratio_that_leaves_prompts_nothing_is_refused(ratio: float) -> None:
    with pytest.raises(ConfigError, match="max_itl_ratio"):
        EngineConfig(max_itl_ratio=ratio)
