"""What steps cost, learned from their times."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dibit.engine.step_cost import QUIET_SAMPLES, StepCost


def test_nothing_is_known_before_anything_was_seen() -> None:
    cost = StepCost()
    assert (cost.decode_s(3), cost.prompt_token_s(0), cost.draft_s(1), cost.knows(3)) == (None, None, None, False)
    cost.observe(0.5, decodes=3, prompt_tokens=100)
    assert cost.prompt_token_s(0) is None, "nobody knows what of it was the decoding"
    cost.observe(0.0, decodes=3, prompt_tokens=0)
    assert not cost.knows(3), "a clock that stood still"


def test_the_nearest_number_of_sequences_answers() -> None:
    cost = StepCost()
    cost.observe(0.1, decodes=2, prompt_tokens=0)
    cost.observe(0.4, decodes=8, prompt_tokens=0)
    assert (cost.decode_s(1), cost.decode_s(4), cost.decode_s(32)) == (0.1, 0.1, 0.4)
    assert cost.knows(8)
    assert not cost.knows(7)


def test_a_step_that_was_held_up_does_not_count() -> None:
    cost = StepCost()
    for _ in range(QUIET_SAMPLES - 1):
        cost.observe(0.01, decodes=1, prompt_tokens=0)
    cost.observe(3.0, decodes=1, prompt_tokens=0)
    assert cost.decode_s(1) == 0.01
    for _ in range(QUIET_SAMPLES):
        cost.observe(0.02, decodes=1, prompt_tokens=0)
    assert cost.decode_s(1) == 0.02


def test_a_step_with_a_prompt_that_is_faster_than_one_without_is_of_another_time() -> None:
    cost = StepCost()
    for decodes in (1, 2):
        cost.observe(0.5, decodes=decodes, prompt_tokens=0)
    cost.observe(0.7, decodes=2, prompt_tokens=20)
    token_s = cost.prompt_token_s(0)
    cost.observe(0.1, decodes=2, prompt_tokens=20)
    assert (cost.knows(1), cost.knows(2)) == (True, False)
    assert cost.prompt_token_s(0) == token_s


def test_what_decoding_takes_is_not_the_prompts() -> None:
    cost = StepCost()
    cost.observe(0.1, decodes=3, prompt_tokens=0)
    cost.observe(0.3, decodes=3, prompt_tokens=20)
    assert cost.prompt_token_s(0) == pytest.approx(0.01)
    cost.observe(0.09, decodes=3, prompt_tokens=20)
    assert 0 < (cost.prompt_token_s(0) or 0) < 0.01, (
        "a step can be faster than decoding alone; a token costs no less than nothing"
    )


@given(token_s=st.floats(1e-5, 1e-2), key_s=st.floats(0, 1e-5), first=st.integers(0, 8000))
def test_what_a_token_costs_is_followed_as_the_context_grows(token_s: float, key_s: float, first: int) -> None:
    cost = StepCost()
    for context in range(first, first + 4000, 16):
        actual_s = token_s + key_s * context
        guess_s = cost.prompt_token_s(context)
        if context > first + 800:
            assert guess_s == pytest.approx(actual_s, rel=0.15)
        cost.observe(16 * actual_s, decodes=0, prompt_tokens=16, context=context)


def test_what_was_learned_at_other_lengths_of_context_stays() -> None:
    cost = StepCost()
    for _ in range(4):
        for context in range(0, 6000, 32):
            cost.observe(1e-3 + 1e-6 * context, decodes=0, prompt_tokens=1, context=context)
    for _ in range(50):
        cost.observe(1e-3, decodes=0, prompt_tokens=1, context=0)
    assert cost.prompt_token_s(5000) == pytest.approx(6e-3, rel=0.1)


def test_a_part_of_the_layers_is_a_part_of_a_token() -> None:
    whole, parts = StepCost(), StepCost()
    whole.observe(0.8, decodes=0, prompt_tokens=32)
    parts.observe(0.2, decodes=0, prompt_tokens=32 * 0.25)
    assert whole.prompt_token_s(0) == parts.prompt_token_s(0)
