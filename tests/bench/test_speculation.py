"""The benches of speculation and of interference, over fakes and on tiny input."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest

from dibit.bench import interference, speculation
from dibit.bench.interference import Gaps, measure
from dibit.bench.speculation import Turn, compare, summarize
from dibit.bench.speculation_prompts import KINDS, Kind
from dibit.engine.config import EngineConfig
from dibit.engine.core import EngineCore
from dibit.engine.errors import ConfigError
from dibit.engine.step import Step
from fakes import ByteTokenizer, FakeRunner


class Clock:
    """Steps take a second, and ten milliseconds more for every token of a prompt."""

    def __init__(self) -> None:
        self.now_s = 0.0

    def __call__(self) -> float:
        return self.now_s

    def spend(self, step: Step) -> None:
        self.now_s += 1.0 + 0.01 * sum(chunk.count for chunk in step.chunks if chunk.count > 1)


def test_prompts_are_of_three_kinds() -> None:
    assert [kind.name for kind in KINDS] == ["summary", "code edit", "chat"]
    assert all(len(set(kind.prompts)) >= 3 for kind in KINDS)


def test_both_engines_answer_and_are_compared(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[EngineConfig] = []

    def build(model: str, config: EngineConfig) -> EngineCore:
        asked.append(config)
        # The last build guesses; what it says differs where it is told to.
        reply = b"again and " if len(asked) != 4 else b"again and."
        return EngineCore(
            FakeRunner(num_blocks=400, max_model_len=1000, reply=list(reply), step_delay_s=0.001),
            ByteTokenizer(),
            config,
        )

    monkeypatch.setattr(speculation, "build_core", build)
    config = EngineConfig(speculative="ngram", prompt_lookup_min=1, max_num_seqs=1)
    kinds = [Kind("a", ("x y x y",)), Kind("b", ("abc", "abd"))]
    result = compare("m", config, kinds=kinds, max_tokens=60, repeats=2)
    assert [one.speculative for one in asked] == ["off", "ngram"]
    assert [(turn.kind, turn.prompt) for turn in result.turns] == [("a", 0), ("b", 0), ("b", 1)] * 2
    assert all(turn.same and turn.tokens == 60 for turn in result.turns)
    assert all(one.drafted >= one.accepted > 0 and one.speed_up > 0 for one in result.kinds)
    assert "DIFFER" not in result.text()
    differing = compare("m", config, kinds=kinds[:1], max_tokens=60, repeats=1)
    assert "ANSWERS DIFFER: a 0" in differing.text()
    with pytest.raises(ConfigError, match="guess"):
        compare("m", EngineConfig(), max_tokens=9, repeats=1)


def test_figures_of_a_kind() -> None:
    turn = Turn("a", 0, 10, 20, off_tok_s=10.0, on_tok_s=15.0, drafts=4, drafted=12, accepted=6, same=True)
    faster = dataclasses.replace(turn, on_tok_s=30.0)
    found = summarize("a", [turn, faster, faster, dataclasses.replace(turn, tokens=1, on_tok_s=0.0, off_tok_s=0.0)])
    assert (found.speed_up, found.on_tok_s, found.off_tok_s) == (3.0, 30.0, 10.0)
    assert (found.acceptance, found.tokens_per_step) == (0.5, 2.5)
    assert found.drafted_share == 40 / 61
    with pytest.raises(ConfigError, match="nothing can be timed"):
        summarize("a", [dataclasses.replace(turn, tokens=1)])


def fake(clock: Clock, **settings: Any) -> EngineCore:
    runner = FakeRunner(num_blocks=1000, max_model_len=1500, on_execute=clock.spend)
    config = EngineConfig(**{"max_num_seqs": 4, "max_batch_tokens": 200, "block_size": 4, **settings})
    return EngineCore(runner, ByteTokenizer(), config, clock=clock)


def test_gaps_beside_a_long_prompt() -> None:
    bounded, unbounded = (
        measure(
            fake(clock := Clock(), max_itl_ratio=ratio),
            streams=3,
            prompt_len=1000,
            quiet_steps=20,
            repeats=2,
            clock=clock,
        )
        for ratio in (1.5, 0.0)
    )
    for arrival in bounded + unbounded:
        assert (arrival.quiet.p50_ms, arrival.quiet.p99_ms) == pytest.approx((1000, 1000))
        assert arrival.quiet.count == 60
    # Chunks of 50 tokens are known to be enough by the second arrival, whose first step is like all others.
    assert 1.4 < bounded[1].ratio < 1.6
    assert 3 * 20 <= bounded[1].beside.count <= 3 * 22
    assert 2.9 < unbounded[1].ratio < 3.0
    assert unbounded[1].ttft_s < bounded[1].ttft_s


def test_streams_that_grew_are_compared_with_streams_of_their_length() -> None:
    before, beside, after = (Gaps(9, p50, p99, p99) for p50, p99 in ((4.0, 6.0), (12.0, 18.0), (8.0, 9.0)))
    assert interference.Arrival(before, beside, after, ttft_s=1.0).ratio == 3.0


def test_what_has_no_room_is_refused() -> None:
    clock = Clock()
    with pytest.raises(ConfigError, match="need a context of 3001"):
        measure(fake(clock), streams=1, prompt_len=3000, quiet_steps=5, repeats=1)
    with pytest.raises(ConfigError, match="5 sequences"):
        measure(fake(clock), streams=4, prompt_len=30, quiet_steps=5, repeats=1)
    with pytest.raises(ConfigError, match="at least 1"):
        measure(fake(clock), streams=0, prompt_len=30, quiet_steps=5, repeats=1)


def test_percentiles() -> None:
    found = Gaps.of([0.001] * 98 + [0.005, 0.009])
    assert (found.count, found.p50_ms, found.p99_ms, found.max_ms) == (100, 1.0, 5.0, 9.0)
    assert interference.Gaps.of([0.25]).p99_ms == 250.0
