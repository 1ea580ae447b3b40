"""Scores of blocks against transformers, and the whole way from a budget to a served checkpoint."""

from __future__ import annotations

import itertools
import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import LlamaForCausalLM

from dibit.engine import LLM, SamplingParams
from dibit.engine.checkpoint import open_checkpoint
from dibit.engine.checkpoint.inspect import inspect_checkpoint
from dibit.engine.errors import ConfigError
from dibit.engine.models import resolve_arch
from dibit.kernels.formats import Format, dequantize
from dibit.quantize import quantize_checkpoint
from dibit.quantize.budget import Budget
from dibit.quantize.importance import Importance, ImportanceKind, Model, Text, rank_blocks
from dibit.quantize.methods.rtn import RTN
from dibit.quantize.plan import Plan
from dibit.quantize.stats import Stats
from dibit.quantize.streams import StreamConfig

FORMATS = (Format(2, 32), Format(3, 32))
KINDS: tuple[ImportanceKind, ...] = ("lim", "zd", "measured", "error", "depth", "random")
TEXT: dict[str, Any] = {"samples": 24, "sequence_length": 40}


def rank(tiny: Path, kind: ImportanceKind, unseen: Tensor, tmp_path: Path, **changes: Any) -> Importance:
    checkpoint = open_checkpoint(tiny)
    model = Model(checkpoint, *resolve_arch(checkpoint.config))
    text = Text(unseen, changes.pop("streams", StreamConfig()), tmp_path)
    found = rank_blocks(kind, model, text=text, formats=FORMATS, **changes)
    checkpoint.close()
    return found


def reference(tiny: Path) -> Any:
    return LlamaForCausalLM.from_pretrained(tiny, dtype=torch.float32).eval()


def block_outputs(model: Any, tokens: Tensor) -> list[Tensor]:
    """Inputs of the first block, then outputs of every block, before the final norm."""
    seen: list[Tensor] = []
    layers = model.model.layers
    hooks = [layers[0].register_forward_pre_hook(lambda _, args: seen.append(args[0]))]
    hooks += [layer.register_forward_hook(lambda _, __, out: seen.append(out)) for layer in layers]
    with torch.no_grad():
        model(tokens)
    for hook in hooks:
        hook.remove()
    return seen


def rounded(tiny: Path, layer: int, low: Format) -> Any:
    """The float model with one block rounded to nearest."""
    model = reference(tiny)
    with torch.no_grad():
        for name, linear in model.model.layers[layer].named_modules():
            if name.endswith("_proj"):
                linear.weight.copy_(dequantize(RTN().quantize(linear.weight, low, Stats())))
    return model


def test_lim_is_the_turn_of_the_hidden_state(tiny: Path, unseen: Tensor, tmp_path: Path) -> None:
    states = block_outputs(reference(tiny), unseen)
    expected = [-float(F.cosine_similarity(a, b, dim=-1).mean()) for a, b in itertools.pairwise(states)]
    assert rank(tiny, "lim", unseen, tmp_path).scores == pytest.approx(expected, abs=1e-5)


def test_zd_counts_weights_far_above_the_mean(tiny: Path, unseen: Tensor, tmp_path: Path) -> None:
    expected = []
    for layer in reference(tiny).model.layers:
        w = torch.cat([m.weight.detach().flatten() for n, m in layer.named_modules() if n.endswith("_proj")]).double()
        expected.append(-float((w > w.mean() + w.std(correction=0)).double().mean()))
    found = rank(tiny, "zd", unseen, tmp_path)
    assert found.scores == pytest.approx(expected, abs=1e-12)
    assert not found.damage


@torch.no_grad()
def test_measured_is_the_divergence_of_the_predictions(tiny: Path, unseen: Tensor, tmp_path: Path) -> None:
    found = rank(tiny, "measured", unseen, tmp_path)
    before = F.log_softmax(reference(tiny)(unseen).logits.double(), -1)
    for low in FORMATS:
        for layer in range(3):
            after = F.log_softmax(rounded(tiny, layer, low)(unseen).logits.double(), -1)
            expected = float((before.exp() * (before - after)).sum(-1).mean())
            assert found.damage[low.bits][layer] == pytest.approx(expected, rel=1e-3)
    assert found.scores == found.damage[2]


def test_error_is_that_of_the_block_alone(tiny: Path, unseen: Tensor, tmp_path: Path) -> None:
    found = rank(tiny, "error", unseen, tmp_path)
    floats = block_outputs(reference(tiny), unseen)
    for layer in range(3):
        y, low = floats[layer + 1], block_outputs(rounded(tiny, layer, FORMATS[0]), unseen)[layer + 1]
        expected = float(((low - y).square().sum(-1) / y.square().sum(-1)).mean())
        assert found.scores[layer] == pytest.approx(expected, rel=1e-3)


@pytest.mark.parametrize("kind", KINDS)
def test_every_order_is_deterministic(tiny: Path, unseen: Tensor, tmp_path: Path, kind: ImportanceKind) -> None:
    told: list[int] = []
    first = rank(tiny, kind, unseen, tmp_path, progress=told.append)
    assert first == rank(tiny, kind, unseen, tmp_path, streams=StreamConfig(memory_bytes=0))
    assert sorted(first.order()) == [0, 1, 2]
    assert all(math.isfinite(score) for score in first.scores)
    if kind not in ("depth", "random"):
        assert told == [0, 1, 2]


def test_seeds_give_other_random_orders(tiny: Path, unseen: Tensor, tmp_path: Path) -> None:
    assert len({rank(tiny, "random", unseen, tmp_path, seed=seed).order() for seed in range(20)}) > 3


def quantize(tiny: Path, out: Path, budget: Budget, **changes: Any) -> Any:
    return quantize_checkpoint(str(tiny), out, group_size=32, plan=budget, **changes)


def test_a_budget_ends_in_a_checkpoint_of_that_many_bits(tiny: Path, text: Path, tmp_path: Path) -> None:
    out, budget = tmp_path / "out", Budget(mean_bits=3.4, choices=(2, 4), importance="lim", samples=4)
    heard: list[str] = []
    report = quantize(
        tiny,
        out,
        budget,
        method="gptq",
        calibration=text,
        **TEXT,
        save_plan=tmp_path / "plan.json",
        progress=lambda *event: heard.append(event[2]),
    )
    allocation = json.loads((out / "quantize_report.json").read_text())["allocation"]
    assert sorted(allocation["bits"]) == [2, 4, 4]
    assert allocation["mean_bits"] == pytest.approx(10 / 3)
    assert allocation["bits"][allocation["order"][-1]] == 2
    assert "importance of 1" in heard
    assert "1 of 2 bits, 2 of 4 bits" in report.summary()
    written = open_checkpoint(out)
    for layer, bits in enumerate(allocation["bits"]):
        for name in ("self_attn.q_proj", "mlp.down_proj"):
            assert written.linear_format(f"model.layers.{layer}.{name}") == Format(bits, 32)
    written.close()
    text_of_inspect = inspect_checkpoint(out).text()
    assert "1 x 2, 2 x 4" in text_of_inspect
    plan = Plan.from_json((tmp_path / "plan.json").read_text())
    quantize_checkpoint(str(tiny), tmp_path / "again", method="gptq", plan=plan, calibration=text, **TEXT)
    assert (tmp_path / "again/model.safetensors").read_bytes() == (out / "model.safetensors").read_bytes()


@pytest.mark.parametrize(("kind", "per_site"), [("error", False), ("measured", False), ("fisher", True)])
def test_what_is_scored_is_the_rounding_that_is_done(
    tiny: Path, text: Path, tmp_path: Path, *, kind: ImportanceKind, per_site: bool
) -> None:
    budget = Budget(mean_bits=3.2, choices=(2, 3, 4, 8), importance=kind, samples=4, per_site=per_site)
    options: dict[str, Any] = {"method": "rtn", "calibration": text, **TEXT}
    whole = quantize(tiny, tmp_path / "whole", budget, **options).allocation["damage"]
    third = quantize(tiny, tmp_path / "third", budget, zero_grid="fractional", **options).allocation["damage"]
    # RTN covers every weight on the integer grid, and searches on the other, which halves the error at 2 bits.
    ratios = {bits: sum(third[bits]) / sum(whole[bits]) for bits in whole}
    assert ratios["4"] == 1
    assert ratios["2"] < 0.97
    assert ratios["3"] < 0.97


def test_a_grid_that_no_width_has_is_refused_before_anything_is_scored(tiny: Path, tmp_path: Path) -> None:
    budget = Budget(mean_bits=5.0, choices=(4, 8), importance="zd")
    with pytest.raises(ConfigError, match="fractional zero points exist at 2 and 3 bits"):
        quantize(tiny, tmp_path / "out", budget, zero_grid="fractional")
    with pytest.raises(ConfigError, match="choose one of the two"):
        quantize(tiny, tmp_path / "out", Budget(mean_bits=3.0, importance="zd"), zero_grid="fractional", symmetric=True)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("share", [0.0, 0.3, 0.5, 0.8, 1.0])
def test_a_target_size_is_met(tiny: Path, tmp_path: Path, share: float) -> None:
    def size(out: Path) -> int:
        return sum(path.stat().st_size for path in out.iterdir() if "report" not in path.name)

    with pytest.raises(ConfigError, match="does not fit into") as refused:
        quantize(tiny, tmp_path / "small", Budget(total_bytes=1000, importance="zd"))
    assert not list(tmp_path.glob("small*"))
    least = float(str(refused.value).split("it takes ")[1].split(" MB")[0]) * 1e6 + 50_000
    most = least + 3 * (64 * 128 + 64 * 64 + 2 * 64 * 96 + 96 * 64) * 6 / 8 * 1.2
    target = int(least + share * (most - least))
    report = quantize(tiny, tmp_path / "out", Budget(total_bytes=target, importance="zd"))
    assert target - 120_000 < size(tmp_path / "out") <= target
    if share == 1.0:
        assert set(report.allocation["bits"]) == {8}


def test_an_interrupted_run_keeps_its_widths(
    tiny: Path, text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def stop(done: int, total: int, note: str) -> None:
        if done == 1:
            raise KeyboardInterrupt

    budget = Budget(mean_bits=3.0, choices=(2, 3, 4), importance="measured", samples=2)
    quantize(tiny, tmp_path / "whole", budget, calibration=text, **TEXT)
    with pytest.raises(KeyboardInterrupt):
        quantize(tiny, tmp_path / "out", budget, calibration=text, **TEXT, progress=stop)
    monkeypatch.setattr("dibit.quantize.choose.rank_blocks", lambda *_, **__: pytest.fail("scored again"))
    report = quantize(tiny, tmp_path / "out", budget, calibration=text, **TEXT)
    assert report.resumed_blocks == 1
    assert (tmp_path / "out/model.safetensors").read_bytes() == (tmp_path / "whole/model.safetensors").read_bytes()


def test_refusals_come_before_anything_is_written(tiny: Path, text: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    with pytest.raises(ConfigError, match="importance lim learns from text"):
        quantize(tiny, out, Budget(mean_bits=3.0))
    with pytest.raises(ConfigError, match="does not look at any text"):
        quantize(tiny, out, Budget(mean_bits=3.0, importance="zd"), calibration=text)
    with pytest.raises(ConfigError, match="below the lowest width, 3"):
        quantize(tiny, out, Budget(mean_bits=2.5, importance="zd", choices=(3, 4)))
    with pytest.raises(ConfigError, match="come from a budget"):
        quantize(tiny, out, Budget(mean_bits=2.5, importance="zd"), bits=4)
    with pytest.raises(ConfigError, match="come from a plan"):
        quantize_checkpoint(str(tiny), out, plan=Plan.uniform(Format(4, 32)), group_size=32)
    with pytest.raises(ConfigError, match="group size 64 does not divide"):
        quantize_checkpoint(str(tiny), out, plan=Budget(mean_bits=2.5, importance="zd"))
    with pytest.raises(ConfigError, match="cannot write the plan"):
        quantize(tiny, out, Budget(mean_bits=2.5, importance="zd"), save_plan=tmp_path / "no" / "plan.json")
    assert not list(tmp_path.iterdir())


KEYS = ("qkv", "o", "gate_up", "down")


@pytest.mark.parametrize("per_site", [False, True])
def test_gradients_decide_for_blocks_or_for_sites(tiny: Path, text: Path, tmp_path: Path, *, per_site: bool) -> None:
    budget = Budget(mean_bits=3.1, choices=(2, 3, 4), importance="fisher", per_site=per_site, samples=6)
    report = quantize(tiny, tmp_path / "out", budget, method="gptq", calibration=text, **TEXT)
    assert report.allocation is not None
    names = [f"layers.{i}.{key}" for i in range(3) for key in KEYS] if per_site else [f"layers.{i}" for i in range(3)]
    assert report.allocation["units"] == names
    assert 2.6 < report.allocation["mean_bits"] <= 3.1
    assert all(a > b > 0 for a, b in zip(*report.allocation["damage"].values(), strict=True))
    assert ("linears: " if per_site else "blocks: ") in report.summary()
    formats = {site.site: site.format for site in report.sites}
    for name, bits in zip(names, report.allocation["bits"], strict=True):
        assert {formats[site] for site in formats if f"{site}.".startswith(f"{name}.")} == {f"int{bits}-g32"}


def test_widths_per_site_do_less_damage_at_the_same_bits(tiny: Path, text: Path, tmp_path: Path) -> None:
    def damage(*, per_site: bool) -> float:
        budget = Budget(mean_bits=3.0, choices=(2, 4), importance="fisher", per_site=per_site, samples=6)
        out = tmp_path / str(per_site)
        allocation = quantize(tiny, out, budget, method="gptq", calibration=text, **TEXT).allocation
        low = allocation["damage"]["2"]
        return float(sum(cost for cost, bits in zip(low, allocation["bits"], strict=True) if bits == 2))

    assert damage(per_site=True) < 0.9 * damage(per_site=False)


@pytest.mark.parametrize("share", [0.1, 0.6])
def test_a_target_size_is_met_with_widths_per_site(tiny: Path, text: Path, tmp_path: Path, share: float) -> None:
    def size(name: str) -> int:
        return sum(path.stat().st_size for path in (tmp_path / name).iterdir() if "report" not in path.name)

    for bits in (2, 8):
        quantize_checkpoint(str(tiny), tmp_path / str(bits), method="rtn", bits=bits, group_size=32)
    target = int(size("2") + 30_000 + share * (size("8") - size("2")))
    budget = Budget(total_bytes=target, importance="fisher", per_site=True, samples=6)
    report = quantize(tiny, tmp_path / "out", budget, method="gptq", calibration=text, **TEXT)
    assert report.allocation is not None
    assert len(set(report.allocation["bits"])) > 1
    assert target - 60_000 < size("out") <= target


PER_LINEAR = (
    Plan.uniform(Format(4, 32))
    .override(r"model\.layers\.(0|2)\..*\.(q|gate)_proj", Format(3, 16))
    .override(r"model\.layers\.1\..*\.v_proj", Format(8, -1))
    .override(r"layers\.1\.down", Format(2, 16))
)


@pytest.mark.parametrize("plan", [Budget(mean_bits=4.5, importance="zd"), PER_LINEAR], ids=["blocks", "linears"])
def test_mixed_widths_serve_alike_on_every_backend(tiny: Path, tmp_path: Path, plan: Plan | Budget) -> None:
    out = tmp_path / "out"
    group_size = None if isinstance(plan, Plan) else 32
    quantize_checkpoint(str(tiny), out, group_size=group_size, plan=plan)
    tokens, scores = [], []
    for backend in ("reference", "auto"):
        with LLM(str(out), backend=backend, threads=1) as llm:
            (completion,) = llm.generate([[5, 9, 30, 12]], SamplingParams(max_tokens=8, temperature=0.0))
            tokens.append(completion.token_ids)
            scores.append(llm.score([5, 9, 30, 12, *tokens[0]]))
    assert tokens[0] == tokens[1]
    # The cpu kernels round activations to 8 bits; wrong weights would be off by several nats.
    differences = [abs(a - b) for a, b in zip(*scores, strict=True)]
    assert max(differences) < 0.3
    assert sum(differences) / len(differences) < 0.06
