"""Budgets: never exceeded, never a step left that fits, and never fewer bits for a larger one."""

from __future__ import annotations

import json
from collections.abc import Mapping
from fractions import Fraction

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dibit.engine.errors import ConfigError
from dibit.engine.models.spec import LinearSite, Part
from dibit.kernels.formats import Format
from dibit.quantize.budget import Allocation, Budget, allocate, packed_bytes, widening_steps
from dibit.quantize.importance import Importance
from dibit.quantize.plan import Plan

CHOICES = st.sets(st.sampled_from([2, 3, 4, 8]), min_size=1).map(lambda found: tuple(sorted(found)))
SCORES = st.lists(st.floats(-10, 10), min_size=1, max_size=12)


@st.composite
def problems(draw: st.DrawFn) -> tuple[Importance, list[dict[int, int]], tuple[int, ...], bool]:
    """Blocks of different sizes, with and without measured damage (which need not fall with the width)."""
    choices, scores = draw(CHOICES), draw(SCORES)
    weights = [draw(st.integers(1, 1000)) for _ in scores]
    costs = [{bits: size * bits for bits in choices} for size in weights]
    damage: Mapping[int, tuple[float, ...]] = {}
    if draw(st.booleans()):
        damage = {bits: tuple(draw(st.floats(0, 100)) for _ in scores) for bits in choices[:-1]}
    return Importance("measured", tuple(scores), damage), costs, choices, draw(st.booleans())


@given(problems(), st.integers(0, 200_000), st.integers(0, 200_000))
def test_budgets_are_met_and_larger_ones_take_nothing_away(
    problem: tuple[Importance, list[dict[int, int]], tuple[int, ...], bool], first: int, second: int
) -> None:
    importance, costs, choices, reverse = problem
    steps = widening_steps(importance, costs, choices=choices, reverse=reverse)
    floor = sum(cost[choices[0]] for cost in costs)
    smaller, larger = sorted((first, second))
    found = []
    for limit in (floor + smaller, floor + larger):
        bits = allocate(costs, steps, choices=choices, limit=Fraction(limit))
        assert sum(cost[own] for cost, own in zip(costs, bits, strict=True)) <= limit
        found.append(bits)
    assert all(a <= b for a, b in zip(*found, strict=True))
    top = max(choices)
    everything = sum(cost[top] for cost in costs)
    assert set(allocate(costs, steps, choices=choices, limit=Fraction(everything))) == {top}


@given(problems())
def test_every_prefix_of_the_steps_is_an_allocation(
    problem: tuple[Importance, list[dict[int, int]], tuple[int, ...], bool],
) -> None:
    importance, costs, choices, reverse = problem
    bits = dict.fromkeys(range(len(costs)), choices[0])
    for block, wider in widening_steps(importance, costs, choices=choices, reverse=reverse):
        assert wider > bits[block]
        bits[block] = wider
    assert set(bits.values()) == {choices[-1]}


def test_below_the_lowest_width_nothing_fits() -> None:
    with pytest.raises(ValueError, match="above"):
        allocate([{2: 20, 4: 40}], [(0, 4)], choices=(2, 4), limit=Fraction(19))


def test_two_widths_are_the_papers_method() -> None:
    """Llama-2-13B in figure 1: 30 layers of 4 bits and 10 of 2 are 3.5."""
    importance = Importance("lim", tuple(float((7 * i) % 40) for i in range(40)))
    costs = [{2: 2, 4: 4}] * 40
    steps = widening_steps(importance, costs, choices=(2, 4), reverse=False)
    bits = allocate(costs, steps, choices=(2, 4), limit=Fraction("3.5") * 40)
    assert {i for i, own in enumerate(bits) if own == 4} == set(importance.order()[:30])
    assert sum(bits) == 140


def test_orders_are_deterministic_and_reverse_is_the_other_end_first() -> None:
    importance = Importance("zd", (0.5, 2.0, 0.5, 3.0))
    assert importance.order() == (3, 1, 0, 2)
    assert importance.order(reverse=True) == (0, 2, 1, 3)


def test_more_than_two_widths_climb_rung_by_rung() -> None:
    importance = Importance("lim", (1.0, 2.0))
    steps = widening_steps(importance, [{2: 2, 3: 3, 8: 8}] * 2, choices=(2, 3, 8), reverse=False)
    assert steps == [(1, 3), (0, 3), (1, 8), (0, 8)]


def test_measured_damage_spends_where_a_bit_saves_most() -> None:
    # Block 0 gains 5 by its first bit and 1 by the second; block 1 little at first and 10 by both: 5 a bit on average.
    importance = Importance("measured", (6.0, 10.0), {2: (6.0, 10.0), 3: (1.0, 9.5)})
    steps = widening_steps(importance, [{2: 2, 3: 3, 4: 4}] * 2, choices=(2, 3, 4), reverse=False)
    assert steps == [(1, 4), (0, 3), (0, 4)]


def test_a_budget_says_what_is_wrong_with_it() -> None:
    for wrong in (
        {},
        {"mean_bits": 3.0, "total_bytes": 10},
        {"mean_bits": 3.0, "choices": (2, 5)},
        {"mean_bits": 3.0, "choices": ()},
        {"mean_bits": float("nan")},
        {"mean_bits": 3.0, "importance": "magic"},
        {"mean_bits": 3.0, "samples": 0},
        {"mean_bits": 3.0, "per_site": True, "importance": "lim"},
    ):
        with pytest.raises(ConfigError):
            Budget(**wrong)  # type: ignore[arg-type]


def test_an_allocation_becomes_a_plan_and_comes_back_from_a_report() -> None:
    importance = Importance("measured", (1.0, 3.0, 2.0), {2: (1.0, 3.0, 2.0)})
    budget, names = Budget(mean_bits=3.0, choices=(4, 2), importance="measured"), tuple(f"layers.{i}" for i in range(3))
    allocation = Allocation(budget, importance, (2, 4, 4), 10 / 3, names)
    blocks = [LinearSite(f"layers.{i}.o", (Part(f"m{i}", 64),), 64, 64, "x", bias=False) for i in range(3)]
    plan = allocation.plan(32)
    assert [found.bits for found in plan.resolve(blocks).values()] == [2, 4, 4]
    assert {found.group_size for found in plan.resolve(blocks).values()} == {32}
    assert Plan.from_json(plan.to_json()) == plan
    assert Allocation.from_dict(json.loads(json.dumps(allocation.to_dict()))) == allocation


def test_an_allocation_over_sites_becomes_a_plan() -> None:
    sites = [
        LinearSite(f"layers.{i}.{key}", (Part(f"m{i}.{key}", 64),), 64, 64, "x", bias=False)
        for i in (1, 11)
        for key in ("o", "down")
    ]
    damage = (1.0, 4.0, 2.0, 3.0)
    budget = Budget(mean_bits=3.0, choices=(2, 4), importance="fisher", per_site=True)
    names = tuple(site.name for site in sites)
    allocation = Allocation(budget, Importance("fisher", damage, {2: damage}), (2, 4, 2, 4), 3.0, names)
    assert {name: found.bits for name, found in allocation.plan(32).resolve(sites).items()} == dict(
        zip(names, (2, 4, 2, 4), strict=True)
    )
    assert Allocation.from_dict(json.loads(json.dumps(allocation.to_dict()))) == allocation


def test_packed_bytes_count_every_tensor() -> None:
    """Codes, zero points, scales and group indices of two linears of 32 x 64."""
    site = LinearSite("layers.0.gate_up", (Part("a", 32), Part("b", 32)), 64, 64, "x", bias=False)
    assert packed_bytes([site], Format(3, 32)) == 64 * 64 * 3 // 8 + 64 * 2 * 3 // 8 + 64 * 2 * 2 + 2 * 64 * 4
    assert packed_bytes([site], Format(4, -1)) == 64 * 64 // 2 + 64 // 2 + 64 * 2 + 2 * 64 * 4
