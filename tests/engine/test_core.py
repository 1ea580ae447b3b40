"""EngineCore over a fake runner: outputs, stop conditions, faults, and a state machine over all of it."""

from __future__ import annotations

from dibit.engine.config import SamplingParams
from dibit.engine.core import EngineCore
from dibit.engine.outputs import RequestOutput
from dibit.engine.request import FinishReason
from fakes import fake_core, solo_tokens


def run(core: EngineCore, *, max_steps: int = 1000) -> dict[str, list[RequestOutput]]:
    """Steps until nothing is left; the outputs of each request."""
    outputs: dict[str, list[RequestOutput]] = {}
    for _ in range(max_steps):
        if not core.has_work:
            return outputs
        for output in core.step():
            outputs.setdefault(output.request_id, []).append(output)
        core.scheduler.check()
    raise AssertionError("requests do not end")


def greedy(max_tokens: int | None = 8, **fields: object) -> SamplingParams:
    return SamplingParams(temperature=0.0, max_tokens=max_tokens, **fields)  # type: ignore[arg-type]


def tokens(outputs: list[RequestOutput]) -> list[int]:
    return [token for output in outputs for token in output.token_ids]


def test_every_token_is_one_output_and_the_last_one_ends_it() -> None:
    core = fake_core()
    core.add_request("a", [1, 2, 3], greedy(5))
    outputs = run(core)["a"]
    assert [len(output.token_ids) for output in outputs] == [1] * 5
    assert tokens(outputs) == solo_tokens([1, 2, 3], 5)
    assert [output.finished for output in outputs] == [False] * 4 + [True]
    assert outputs[-1].finish_reason is FinishReason.LENGTH
    assert [output.num_output for output in outputs] == [1, 2, 3, 4, 5]
    assert {output.num_prompt for output in outputs} == {3}
    assert "".join(output.text for output in outputs) == bytes(tokens(outputs)).decode()
