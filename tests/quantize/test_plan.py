"""Plans: overrides, JSON, and misfits named before anything is computed."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest

from dibit.engine.errors import ConfigError
from dibit.engine.models.llama import LLAMA
from dibit.engine.models.rope import Rope
from dibit.engine.models.spec import LinearSite, Sizes, sites
from dibit.kernels.formats import Format
from dibit.quantize.plan import Override, Plan, bits_per_weight, part_formats

INT4 = Format(4, 64)
INT2 = Format(2, 16)


def listing(**changes: Any) -> list[LinearSite]:
    """Two blocks with the shapes of SmolLM2-135M."""
    sizes = Sizes(
        layers=2,
        hidden=576,
        intermediate=1536,
        heads=9,
        kv_heads=3,
        head_dim=64,
        vocab=100,
        max_positions=64,
        norm_eps=1e-5,
        tied_head=True,
        rope=Rope(1e4, 64),
    )
    sizes = dataclasses.replace(sizes, **changes)
    return [site for layer in range(sizes.layers) for site in sites(LLAMA, sizes, layer)]


def test_a_uniform_plan_gives_every_site_its_format() -> None:
    formats = Plan.uniform(INT4).resolve(listing())
    assert len(formats) == 8
    assert set(formats.values()) == {INT4}


def test_the_last_matching_override_wins() -> None:
    plan = Plan.uniform(INT4).override(r"layers\.1\..*", INT2).override(r".*\.down", Format(8, -1))
    formats = plan.resolve(listing())
    assert formats["layers.0.qkv"] == INT4
    assert formats["layers.1.qkv"] == INT2
    assert formats["layers.1.down"] == formats["layers.0.down"] == Format(8, -1)


def test_single_linears_may_differ_inside_a_site() -> None:
    plan = Plan.uniform(INT4).override(r"model\.layers\.1\.self_attn\.v_proj", INT2).override(r".*\.mlp\..*", INT2)
    found = listing()
    formats = plan.resolve(found)
    assert formats["layers.0.qkv"] == INT4
    assert "layers.1.qkv" not in formats
    assert part_formats(found[4], formats) == (INT4, INT4, INT2)
    assert formats["layers.1.gate_up"] == formats["layers.1.down"] == INT2
    assert part_formats(found[6], formats) == (INT2, INT2)
    v = 192 * 576
    weights = sum(site.n * site.k for site in found)
    attention = sum(site.n * site.k for site in found if site.key in ("qkv", "o")) - v
    expected = (attention * (4 + 20 / 64) + (weights - attention) * (2 + 18 / 16)) / weights
    assert bits_per_weight(found, formats) == pytest.approx(expected)
    with pytest.raises(ConfigError, match="group size 128 does not divide the 576 inputs"):
        Plan.uniform(INT4).override(r".*\.k_proj", Format(4, 128)).resolve(found)


def test_an_override_must_match_whole_names() -> None:
    with pytest.raises(ConfigError, match="matches no site"):
        Plan.uniform(INT4).override("down", INT2).resolve(listing())
    with pytest.raises(ConfigError, match="not a regular expression"):
        Plan.uniform(INT4).override("(", INT2)


def test_json_round_trip() -> None:
    plan = Plan.uniform(INT4).override(r"layers\.1\..*", INT2)
    assert Plan.from_json(plan.to_json()) == plan
    assert Plan.from_json('{"default": {"bits": 3, "group_size": -1}}') == Plan.uniform(Format(3, -1))


@pytest.mark.parametrize(
    "text",
    [
        "{",
        "[]",
        "{}",
        '{"default": {"bits": 4}}',
        '{"default": {"bits": 5, "group_size": 64}}',
        '{"default": {"bits": 4.0, "group_size": 64}}',
        '{"default": {"bits": "4", "group_size": 64}}',
        '{"default": {"bits": 4, "group_size": 64}, "override": []}',
        '{"default": {"bits": 4, "group_size": 64}, "overrides": {}}',
        '{"default": {"bits": 4, "group_size": 64}, "overrides": [{"sites": 3, "bits": 4, "group_size": 64}]}',
        '{"default": {"bits": 4, "group_size": 64}, "overrides": [{"sites": "[", "bits": 4, "group_size": 64}]}',
    ],
)
def test_broken_plans_are_refused(text: str) -> None:
    with pytest.raises(ConfigError):
        Plan.from_json(text)


def test_a_group_size_that_does_not_divide_names_sites_and_sizes_that_work() -> None:
    with pytest.raises(ConfigError) as caught:
        Plan.uniform(Format(4, 128)).resolve(listing())
    message = str(caught.value)
    assert "layers.0.qkv" in message
    assert "576" in message
    assert "1536" not in message
    assert "-1, 16, 32, 64 " in message


def test_a_group_size_may_fit_where_it_is_used() -> None:
    plan = Plan.uniform(INT4).override(r".*\.down", Format(4, 128))
    assert plan.resolve(listing())["layers.1.down"].group_size == 128


def test_shapes_that_leave_words_half_filled_are_refused() -> None:
    narrow = listing(heads=9, kv_heads=1, head_dim=8, hidden=576)
    with pytest.raises(ConfigError, match=r"72 outputs of model\.layers\.0\.self_attn\.q_proj.*multiple of 32"):
        Plan.uniform(Format(3, -1)).resolve(narrow)
    assert len(Plan.uniform(Format(4, -1)).resolve(narrow)) == 8
    with pytest.raises(ConfigError, match=r"layers\.0\.down has 1500 inputs"):
        Plan.uniform(Format(3, -1)).resolve([s for s in listing(intermediate=1500) if s.key == "down"])


def test_bits_per_weight_weighs_by_size() -> None:
    found = listing()
    assert bits_per_weight(found, Plan.uniform(INT4).resolve(found)) == pytest.approx(4 + 20 / 64)
    mixed = Plan(INT4, (Override(r".*\.down", Format(2, 64)),))
    down = 576 * 1536 / 3538944
    assert bits_per_weight(found, mixed.resolve(found)) == pytest.approx((1 - down) * 4.3125 + down * (2 + 18 / 64))
