"""A long prompt beside requests that decode, under a clock that goes by what is computed."""

from __future__ import annotations

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from dibit.engine.chunker import MIN_CHUNK_TOKENS, QUIET_EVERY
from dibit.engine.config import EngineConfig, SamplingParams
from dibit.engine.core import EngineCore
from dibit.engine.errors import ConfigError
from dibit.engine.outputs import RequestOutput, merge
from dibit.engine.step import Sampled, Step, StepResult
from fakes import ByteTokenizer, FakeRunner, solo_tokens

PROMPT = 1500
# What comes next is guessed from what was measured.
LAG = 1.1


class Quick(FakeRunner):
    """Says the same token always, and looks at nothing."""

    def execute(self, step: Step) -> StepResult:
        self.steps.append(step)
        assert self.on_execute is not None
        self.on_execute(step)
        return StepResult({chunk.request.id: Sampled(65) for chunk in step.chunks if chunk.samples})


class Machine:
    """A clock, and a runner whose steps take fixed_s + token_s per token + key_s per key that a prompt's token looks
    at, a layer of a prompt its part of it, and slice_s per slice besides."""

    def __init__(
        self,
        *,
        fixed_s: float,
        token_s: float,
        key_s: float = 0.0,
        slice_s: float = 0.0,
        num_layers: int = 1,
        num_blocks: int = 2000,
        runner: type[FakeRunner] = FakeRunner,
    ) -> None:
        self.now_s = 0.0
        self.costs: list[float] = []
        self.fixed_s, self.token_s, self.key_s, self.slice_s = fixed_s, token_s, key_s, slice_s
        self.speed = 1.0
        self.runner = runner(
            num_blocks=num_blocks, max_model_len=5000, block_size=4, num_layers=num_layers, on_execute=self._spend
        )

    def _spend(self, step: Step) -> None:
        cost_s = self.fixed_s
        for chunk in step.chunks:
            layers = chunk.share(self.runner.num_layers)
            keys = 0.0 if chunk.request.decodes else chunk.start + chunk.count / 2
            cost_s += layers * chunk.count * (self.token_s + self.key_s * keys)
            cost_s += 0.0 if chunk.whole else self.slice_s
        self.now_s += cost_s / self.speed
        self.costs.append(cost_s / self.speed)

    def core(self, **config: float | bool) -> EngineCore:
        settings = EngineConfig(**{"max_batch_tokens": 512, "max_num_seqs": 8, **config})  # type: ignore[arg-type]
        return EngineCore(self.runner, ByteTokenizer(), settings, clock=lambda: self.now_s)


def start(core: EngineCore, *, decodes: int) -> None:
    for i in range(decodes):
        core.add_request(f"r{i}", [i + 1] * 40, SamplingParams(max_tokens=1900, temperature=0.0))
    for _ in range(12):
        core.step()


def begun_beside_one() -> tuple[Machine, EngineCore]:
    """Some layers of a prompt "long" are computed, beside "r0" which decodes."""
    machine = Machine(fixed_s=0.005, token_s=0.001, num_layers=12)
    core = machine.core()
    start(core, decodes=1)
    core.add_request("long", [5] * 300, SamplingParams(max_tokens=1))
    for _ in range(3):
        core.step()
    assert machine.runner.steps[-1].chunks[-1].last_layer is not None
    return machine, core


def arrival(
    machine: Machine, *, decodes: int = 2, prompt: int = PROMPT, speeds: tuple[float, ...] = (), **config: float
) -> tuple[float, list[float]]:
    """Seconds of a quiet step, then of those while a long prompt is computed beside it. From its 30th step on the
    machine has the first of `speeds`, and so on."""
    core = machine.core(**config)
    start(core, decodes=decodes)
    quiet_s = machine.costs[-1] if decodes else 0.0
    first = len(machine.costs)
    core.add_request("long", [9] * prompt, SamplingParams(max_tokens=1, temperature=0.0))
    while "long" in core.scheduler and len(machine.costs) - first < 1800:
        steps = len(machine.costs) - first
        if speeds and steps and steps % 30 == 0:
            machine.speed, speeds = speeds[0], speeds[1:]
        core.step()
        core.scheduler.check()
    assert "long" not in core.scheduler, "the prompt does not get on"
    return quiet_s, machine.costs[first:]


@given(
    fixed_s=st.floats(0.001, 0.1),
    token_s=st.floats(1e-5, 0.005),
    keys=st.floats(0, 1 / 300),
    slice_s=st.floats(0, 5e-4),
    decodes=st.integers(1, 6),
    layers=st.sampled_from([7, 16, 30]),
    ratio=st.floats(1.5, 6.0),
)
@example(fixed_s=0.006, token_s=0.0003, keys=1 / 300, slice_s=2e-4, decodes=4, layers=30, ratio=2.5)
@settings(max_examples=10, deadline=None)
def test_a_long_prompt_holds_decoding_up_within_the_ratio(
    fixed_s: float, token_s: float, keys: float, slice_s: float, decodes: int, layers: int, ratio: float
) -> None:
    key_s = keys * token_s
    machine = Machine(fixed_s=fixed_s, token_s=token_s, key_s=key_s, slice_s=slice_s, num_layers=layers, runner=Quick)
    quiet_s, costs = arrival(machine, decodes=decodes, max_itl_ratio=ratio)
    # A layer of the smallest chunk at the end of the prompt.
    least_s = MIN_CHUNK_TOKENS / layers * (token_s + key_s * PROMPT) + slice_s
    within(max((ratio - 1) * quiet_s, least_s) + slice_s + quiet_s, costs)


def test_prompts_have_their_share_where_they_are_more_than_answers() -> None:
    def beside_one(prompts: int) -> tuple[float, list[float], int]:
        machine = Machine(fixed_s=0.005, token_s=0.0005, num_layers=30, runner=Quick)
        core = machine.core()
        start(core, decodes=1)
        # What prompts take is learned before.
        core.add_request("first", [7] * 400, SamplingParams(max_tokens=1, temperature=0.0))
        while "first" in core.scheduler:
            core.step()
        quiet_s, first = min(machine.costs), len(machine.costs)
        for i in range(prompts):
            core.add_request(f"p{i}", [i + 9] * 400, SamplingParams(max_tokens=1, temperature=0.0))
        while any(f"p{i}" in core.scheduler for i in range(prompts)):
            core.step()
        return quiet_s, machine.costs[first:], prompts

    for quiet_s, costs, prompts in (beside_one(1), beside_one(6)):
        assert max(costs) <= LAG * (1 + prompts) * quiet_s
        assert max(costs) > 0.8 * (1 + prompts) * quiet_s
        # The last of them has the share of one again.
        assert costs[-1] <= LAG * 2 * quiet_s


def within(bound_s: float, costs: list[float]) -> None:
    """What a prompt's tokens cost, and how that grows with it, is learned by the first long one."""
    assert max(costs) <= 1.6 * bound_s
    assert max(costs[12:], default=0.0) <= LAG * bound_s


@given(fixed_s=st.floats(0.001, 0.1), token_s=st.floats(1e-5, 0.01), ratio=st.floats(1.5, 6.0))
@settings(max_examples=15, deadline=None)
def test_where_layers_cannot_be_cut_tokens_are(fixed_s: float, token_s: float, ratio: float) -> None:
    quiet_s, costs = arrival(Machine(fixed_s=fixed_s, token_s=token_s, runner=Quick), decodes=3, max_itl_ratio=ratio)
    within(max(ratio * quiet_s, fixed_s + token_s * (3 + MIN_CHUNK_TOKENS)), costs)


@pytest.mark.parametrize("layers", [1, 30])
def test_what_the_ratio_allows_is_used(layers: int) -> None:
    machine = Machine(fixed_s=0.010, token_s=0.0002, num_layers=layers, runner=Quick)
    quiet_s, costs = arrival(machine, max_itl_ratio=2.5)
    taken_s = sorted(costs[2:-4])
    assert taken_s[len(taken_s) // 2] > 2.0 * quiet_s


@pytest.mark.parametrize("layers", [1, 30])
@pytest.mark.parametrize("slo_ms", [15.0, 50.0])
def test_steps_of_the_slo_are_fine_whatever_the_ratio(layers: int, slo_ms: float) -> None:
    """15 ms are less than the ratio allows here, 50 are more."""
    machine = Machine(fixed_s=0.008, token_s=0.0002, num_layers=layers, runner=Quick)
    quiet_s, costs = arrival(machine, max_itl_ratio=2.5, itl_slo_ms=slo_ms)
    bound_s = max(2.5 * quiet_s, slo_ms / 1000)
    within(bound_s, costs)
    taken_s = sorted(costs[2:-4])
    assert taken_s[len(taken_s) // 2] > 0.8 * bound_s


def test_tokens_whose_keys_are_many_are_not_taken_one_by_one() -> None:
    # At the end of this prompt a token takes as long as a quiet step.
    machine = Machine(fixed_s=0.006, token_s=0.0006, key_s=4e-6, num_layers=30, runner=Quick)
    quiet_s, costs = arrival(machine, max_itl_ratio=2.5)
    within(2.5 * quiet_s, costs)
    of_prompt = [c for step in machine.runner.steps for c in step.chunks if c.request.id == "long"]
    assert min(chunk.count for chunk in of_prompt if chunk.stop < PROMPT) >= MIN_CHUNK_TOKENS


@pytest.mark.parametrize("speed", [0.5, 2.0])
@pytest.mark.parametrize("layers", [1, 30])
def test_a_machine_that_becomes_slower_or_faster_is_followed(speed: float, layers: int) -> None:
    machine = Machine(fixed_s=0.010, token_s=0.0009, num_layers=layers, runner=Quick)
    quiet_s, costs = arrival(machine, prompt=4500, speeds=(speed,), max_itl_ratio=2.5)
    settled = costs[30 + (2 if speed > 1 else 4) * QUIET_EVERY : -4]
    assert len(settled) > 8
    assert max(settled) <= 2.5 * quiet_s / speed * LAG
    assert sorted(settled)[len(settled) // 2] > 2.0 * quiet_s / speed


def test_the_tokens_are_those_of_prompts_that_are_not_cut() -> None:
    machine = Machine(fixed_s=0.005, token_s=0.001, num_layers=12)
    core = machine.core(prefix_cache=False)
    start(core, decodes=2)
    prompts = {f"p{i}": [i + 7] * (5 + 90 * i) for i in range(5)}
    outputs: dict[str, list[RequestOutput]] = {name: [] for name in prompts}
    for name, prompt in prompts.items():
        core.add_request(name, prompt, SamplingParams(max_tokens=4, temperature=0.0))
    while any(name in core.scheduler for name in prompts):
        for output in core.step():
            if output.request_id in outputs:
                outputs[output.request_id].append(output)
        core.scheduler.check()
    sliced = {chunk.request.id for step in machine.runner.steps for chunk in step.chunks if not chunk.whole}
    assert {"p3", "p4"} <= sliced
    for name, prompt in prompts.items():
        assert list(merge(outputs[name]).token_ids) == solo_tokens(prompt, 4)


def test_a_prompt_that_leaves_between_two_slices_leaves_nothing() -> None:
    _, core = begun_beside_one()
    core.abort("long")
    core.scheduler.check()
    core.add_request("next", [6] * 300, SamplingParams(max_tokens=3, temperature=0.0))
    outputs = []
    while "next" in core.scheduler:
        outputs += [output for output in core.step() if output.request_id == "next"]
    assert list(merge(outputs).token_ids) == solo_tokens([6] * 300, 3)


def test_a_step_that_fails_beside_a_slice_is_run_again() -> None:
    machine = Machine(fixed_s=0.005, token_s=0.001, num_layers=12)
    core = machine.core()
    start(core, decodes=2)
    core.add_request("long", [5] * 300, SamplingParams(max_tokens=3, temperature=0.0))
    outputs = []
    for step in range(100):
        if step == 6:
            assert machine.runner.steps[-1].chunks[-1].last_layer is not None
            machine.runner.bad_ids = {"r0"}
        outputs += core.step()
    assert [o.error is not None for o in outputs if o.request_id == "r0" and o.finished] == [True]
    assert list(merge([o for o in outputs if o.request_id == "long"]).token_ids) == solo_tokens([5] * 300, 3)


def test_a_prompt_whose_blocks_were_taken_between_two_slices_starts_again() -> None:
    machine = Machine(fixed_s=0.005, token_s=0.002, num_layers=12, num_blocks=40)
    core = machine.core(prefix_cache=False)
    core.add_request("a", [1] * 40, SamplingParams(max_tokens=100, temperature=0.0))
    outputs = [output for _ in range(3) for output in core.step()]
    core.add_request("b", [2] * 104, SamplingParams(max_tokens=3, temperature=0.0))
    while core.has_work:
        outputs += core.step()
        core.scheduler.check()
    assert core.stats().preemptions > 0
    assert any(not chunk.whole for step in machine.runner.steps for chunk in step.chunks)
    for name, prompt, count in (("a", [1] * 40, 100), ("b", [2] * 104, 3)):
        assert list(merge([o for o in outputs if o.request_id == name]).token_ids) == solo_tokens(prompt, count)


def test_zero_is_no_bound() -> None:
    machine = Machine(fixed_s=0.001, token_s=0.01, num_layers=12)
    arrival(machine, max_itl_ratio=0)
    assert all(chunk.whole for step in machine.runner.steps for chunk in step.chunks)
    assert max(step.num_tokens for step in machine.runner.steps) == 512


def test_alone_a_prompt_is_not_cut() -> None:
    machine = Machine(fixed_s=0.001, token_s=0.01, num_layers=12)
    arrival(machine, decodes=0)
    assert [step.num_tokens for step in machine.runner.steps] == [512, 512, 476]


def test_what_begun_beside_others_ends_at_once_when_they_are_gone() -> None:
    machine, core = begun_beside_one()
    begun = machine.runner.steps[-1].chunks[-1]
    core.abort("r0")
    core.step()
    (chunk,) = machine.runner.steps[-1].chunks
    assert (chunk.first_layer, chunk.last_layer, chunk.count) == (begun.last_layer, None, begun.count)


def test_nobody_is_held_up_by_what_is_not_known() -> None:
    machine = Machine(fixed_s=0.005, token_s=0.001, num_layers=12)
    core = machine.core()
    core.add_request("a", [1] * 40, SamplingParams(max_tokens=50, temperature=0.0))
    core.step()
    core.add_request("b", [2] * 400, SamplingParams(max_tokens=1, temperature=0.0))
    core.step()
    assert [chunk.request.id for chunk in machine.runner.steps[-1].chunks] == ["a"]
    core.step()
    assert machine.costs[-1] <= 2.5 * machine.costs[-2] * LAG


def test_a_clock_that_stands_still_stops_nobody() -> None:
    runner = FakeRunner(num_blocks=1000, max_model_len=2000, num_layers=12)
    core = EngineCore(runner, ByteTokenizer(), EngineConfig(), clock=lambda: 0.0)
    core.add_request("a", [1] * 40, SamplingParams(max_tokens=20, temperature=0.0))
    core.step()
    core.add_request("b", [2] * 400, SamplingParams(max_tokens=1, temperature=0.0))
    for _ in range(8):
        core.step()
    assert "b" not in core.scheduler


def test_the_same_times_give_the_same_steps() -> None:
    runs = [arrival(Machine(fixed_s=0.003, token_s=0.0007, key_s=1e-7, num_layers=9)) for _ in range(2)]
    assert runs[0] == runs[1]


@pytest.mark.parametrize("ratio", [1.0, -2.0, 0.5, float("inf"), float("nan")])
def test_a_ratio_that_leaves_prompts_nothing_is_refused(ratio: float) -> None:
    with pytest.raises(ConfigError, match="max_itl_ratio"):
        EngineConfig(max_itl_ratio=ratio)


@pytest.mark.parametrize(("slo_ms", "ratio"), [(-1.0, 2.0), (float("inf"), 2.0), (float("nan"), 2.0), (50.0, 0.0)])
def test_an_slo_that_is_none_or_has_nothing_to_widen_is_refused(slo_ms: float, ratio: float) -> None:
    with pytest.raises(ConfigError, match="itl_slo_ms"):
        EngineConfig(max_itl_ratio=ratio, itl_slo_ms=slo_ms)
