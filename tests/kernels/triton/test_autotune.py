"""Measured plans: what is tried, what wins, what is kept; with a stopwatch that is made up."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import triton
from random_weights import random_weight

from dibit.kernels.formats import Format
from dibit.kernels.triton import autotune, fused, layout, tuned_plans
from dibit.kernels.triton.autotune import BUCKETS, After, follower, gpu_timer, holds, tune, tune_all
from dibit.kernels.triton.availability import INTERPRETER
from dibit.kernels.triton.layout import TritonQWeight
from dibit.kernels.triton.limits import resident_programs
from dibit.kernels.triton.plan import CONFIGS, Gpu, Plan, Tuned, plan
from dibit.kernels.triton.qlinear import Prepared, Runs, finish, launch_runs, multiply, prepare
from dibit.kernels.triton.tuned_plans import keep, kept, key_of

A100 = Gpu(processors=108, arch=80)
NAME = "NVIDIA A100-SXM4-80GB"


def packed(n: int, k: int, format: Format) -> TritonQWeight:
    return layout.pack(random_weight(n, k, format))


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    monkeypatch.setenv("DIBIT_TUNED_DIR", str(tmp_path / "tuned"))
    yield tmp_path / "tuned"
    tuned_plans.kept_on.cache_clear()


def test_the_fastest_wins_and_nothing_that_decides_a_sum_depends_on_the_tokens() -> None:
    w = packed(128, 2048, Format(4, 128))
    usual = plan(w.geometry, w.padded_rows, 1, gpu=A100)

    def time(chosen: Plan, tokens: int) -> float:
        """Half the splits, and four stages of two warps where there are few tokens."""
        best = chosen.splits == usual.splits // 2
        pair = chosen.warps == 2 and tokens == 1
        return 100.0 - 20.0 * best - 10.0 * pair

    found = tune(w, time, gpu=A100)
    assert found.splits == usual.splits // 2
    assert found.configs == {usual.block_tokens: "narrow-pair"}
    plans = [plan(w.geometry, w.padded_rows, tokens, gpu=A100, tuned=found) for tokens in (1, 5, 17, 64, 300)]
    assert {(p.splits, p.run) for p in plans} == {(plans[0].splits, plans[0].run)}
    assert plans[0].splits == usual.splits // 2
    assert plans[0].warps == 2


def test_what_is_hardly_faster_or_does_not_fit_is_left() -> None:
    w = packed(64, 512, Format(2, 64))
    usual = {plan(w.geometry, w.padded_rows, tokens, gpu=A100) for tokens in BUCKETS}
    assert tune(w, lambda chosen, tokens: 100.0 if chosen in usual else 99.0, gpu=A100) == Tuned(None, {})
    assert tune(w, lambda chosen, tokens: 100.0 if chosen in usual else None, gpu=A100) == Tuned(None, {})
    tried: list[Plan] = []
    tune(w, lambda chosen, tokens: tried.append(chosen), gpu=A100)
    assert all(chosen.block_rows == 64 for chosen in tried), "blocks of 128 rows do not divide 64"


def test_a_usual_plan_that_does_not_fit_gives_way_to_any_that_does() -> None:
    w = packed(128, 512, Format(2, 64))
    usual = plan(w.geometry, w.padded_rows, 1, gpu=A100)
    found = tune(w, lambda chosen, tokens: None if chosen == usual else 5.0, gpu=A100)
    assert found.configs.get(usual.block_tokens) or found.splits


def test_every_configuration_computes_the_same_bits() -> None:
    w = packed(128, 512, Format(4, 64))
    x = torch.randint(-8, 9, (3, 512)).float()
    results = []
    for name in CONFIGS:
        chosen = plan(w.geometry, 128, 3, gpu=INTERPRETER, tuned=Tuned(2, {8: name}))
        assert chosen.splits == 2
        y = torch.full((3, 128), 1e30)
        results.append(multiply(prepare(x, w, padded_tokens=8), w, chosen, y, bias=None, residual=None))
    assert all(torch.equal(result, results[0]) for result in results)


def test_warpgroups_are_not_swapped_for_warps() -> None:
    """Their instructions may round otherwise, and a token in a step of 16 would not be what it is in one of 1."""
    w, h100 = packed(128, 2048, Format(4, 128)), Gpu(processors=132, arch=90)
    found = tune(w, lambda chosen, tokens: 50.0 if chosen.warps == (4 if tokens <= 32 else 2) else 100.0, gpu=h100)
    for tokens in (16, 32, 64):
        usual, chosen = (plan(w.geometry, 128, tokens, gpu=h100, tuned=tuned) for tuned in (None, found))
        assert (usual.warps < 4) == (chosen.warps < 4)
    assert plan(w.geometry, 128, 16, gpu=h100, tuned=Tuned(None, {16: "wide"})).warps == 2


def test_a_kept_plan_that_would_leave_rows_out_is_not_used() -> None:
    w = packed(64, 512, Format(4, 64))
    assert plan(w.geometry, 64, 1, gpu=A100, tuned=Tuned(None, {8: "wide"})).block_rows == 64


def test_shapes_once_largest_first_until_the_time_is_up() -> None:
    weights = [packed(64, k, Format(4, 64)) for k in (256, 512, 256)]
    told: list[str] = []
    found = tune_all(
        weights, gpu=A100, timer=lambda w: lambda p, m: 1.0, limit_s=60.0, progress=lambda key, _: told.append(key)
    )
    assert told == [key_of(weights[1]), key_of(weights[0])] == list(found)
    one = tune_all(weights, gpu=A100, timer=lambda w: lambda p, m: 1.0, limit_s=-1.0, progress=lambda key, _: None)
    assert one == {}


def compiled(*, registers: int = 90, spills: int = 0, shared: int = 20_000) -> SimpleNamespace:
    """What Triton knows of a kernel."""
    return SimpleNamespace(n_regs=registers, n_spills=spills, metadata=SimpleNamespace(shared=shared))


def test_what_spills_or_fits_no_processor_is_not_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    w = packed(64, 512, Format(4, 64))
    chosen = plan(w.geometry, 64, 1, gpu=A100)
    monkeypatch.setattr(autotune, "cold_copies", lambda nbytes: 2)
    for kernel, wanted in (
        (compiled(), 7.0),
        (compiled(spills=4), None),
        (compiled(shared=164 << 10), None),
        (None, 7.0),
    ):
        monkeypatch.setattr(autotune, "launch", lambda runs, kernel=kernel: kernel)
        timed: list[int] = []

        def measure(calls: Sequence[Callable[[], object]], timed: list[int] = timed) -> float:
            timed.append(len(calls))
            return 7.0

        assert gpu_timer(w, after=After.NOTHING, measure=measure)(chosen, 1) == wanted
        assert timed == ([] if wanted is None else [2])
    assert holds(compiled(shared=120 << 10), chosen, arch=80)
    assert not holds(compiled(shared=120 << 10), chosen, arch=86), "a GeForce has less"
    assert not holds(compiled(registers=255), replace(chosen, warps=16), arch=80)

    def too_much(runs: Runs) -> None:
        raise triton.runtime.errors.OutOfResources(1, 0, "shared memory")

    monkeypatch.setattr(autotune, "launch", too_much)
    assert gpu_timer(w, after=After.NOTHING, measure=lambda calls: 7.0)(chosen, 1) is None


def test_programs_of_a_processor() -> None:
    held = partial(resident_programs, registers=64, shared_bytes=0, warps=4)
    assert held(arch=80) == 8
    assert held(registers=16, arch=80) == 16
    assert held(registers=16, arch=86) == held(registers=16, arch=87) == 12
    assert held(shared_bytes=50 << 10, arch=86) == 1
    assert held(shared_bytes=49 << 10, arch=86) == 2


def test_what_is_timed_is_what_serves(monkeypatch: pytest.MonkeyPatch) -> None:
    """The product of every copy, and after it the launch that reads its runs: the norm, the SiLU or their sum."""
    monkeypatch.setattr(autotune, "cold_copies", lambda nbytes: 3)
    w = packed(128, 512, Format(4, 64))
    chosen = plan(w.geometry, 128, 2, gpu=INTERPRETER, tuned=Tuned(2))
    assert chosen.partial
    seen: list[tuple[str, int]] = []

    def spied(module: object, name: str) -> None:
        sound = getattr(module, name)

        def run(runs: Runs, *others: object, **options: object) -> object:
            seen.append((name, runs.weight.codes.data_ptr()))
            return sound(runs, *others, **options)

        monkeypatch.setattr(module, name, run)

    spied(fused, "norm_prepared")
    spied(fused, "silu_prepared")
    spied(autotune, "finish")

    def measure(calls: Sequence[Callable[[], object]]) -> float:
        for call in calls:
            call()
        return 1.0

    for after, name in ((After.ROW, "norm_prepared"), (After.HALVES, "silu_prepared"), (After.NOTHING, "finish")):
        seen.clear()
        gpu_timer(w, after=after, measure=measure)(chosen, 2)
        assert [called for called, _ in seen] == [name] * 3
        assert len({pointer for _, pointer in seen} - {w.codes.data_ptr()}) == 3, "each is another copy"
    seen.clear()
    alone = plan(w.geometry, 128, 2, gpu=INTERPRETER, tuned=Tuned(1))
    gpu_timer(w, after=After.NOTHING, measure=measure)(alone, 2)
    assert seen == [], "nothing has to be added"


def test_the_launch_that_follows_reads_the_product() -> None:
    w = packed(128, 512, Format(4, 64))
    x = torch.randn(2, 512)
    chosen = plan(w.geometry, 128, 2, gpu=INTERPRETER, tuned=Tuned(2))
    runs = launch_runs(prepare(x, w, padded_tokens=8), w, chosen, bias=None)
    y = torch.empty(2, 128)
    finish(runs, y)
    made = follower(After.ROW, 128, y.device)(runs)
    normed = y / y.square().mean(1, keepdim=True).add(1e-5).sqrt()
    assert isinstance(made, Prepared)
    found = made.half[:2, :128].float() * made.factors[:2, None]
    torch.testing.assert_close(found, normed, rtol=2e-3, atol=1e-3)


def test_kept_and_found_again(folder: Path) -> None:
    first, second = {"a": Tuned(4, {8: "wide"})}, {"b": Tuned(None, {64: "wide-8"})}
    assert kept(NAME) == {}
    path = keep(NAME, first)
    assert path.parent == folder
    assert keep(NAME, second) == path
    assert kept(NAME) == first | second
    assert kept("NVIDIA H100 PCIe") == {}
    other = keep(NAME, second, folder=folder.parent / "to ship")
    assert other.parent.name == "to ship"
    assert kept(NAME) == first | second
    assert [entry.name for entry in folder.iterdir()] == ["nvidia-a100-sxm4-80gb.json"]


def test_the_users_file_wins_over_the_package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DIBIT_TUNED_DIR", str(tmp_path / "package"))
    keep(NAME, {"a": Tuned(2), "b": Tuned(3)})
    monkeypatch.setattr(tuned_plans, "SHIPPED", tmp_path / "package")
    monkeypatch.setenv("DIBIT_TUNED_DIR", str(tmp_path / "own"))
    keep(NAME, {"a": Tuned(8)})
    assert kept(NAME) == {"a": Tuned(8), "b": Tuned(3)}


@pytest.mark.parametrize(
    ("damage", "reason"),
    [
        ("{", "Expecting property name"),
        ("[]", "list indices"),
        ({"version": 0}, "kernels 0"),
        ({"triton": "1.0"}, "triton 1.0"),
        ({"shapes": {"a": {"splits": 3, "configs": {"8": "fancy"}}}}, "do not exist: fancy"),
        ({"shapes": {"a": {"splits": 99, "configs": {}}}}, "99 splits"),
        ({"shapes": {"a": {}}}, "splits"),
    ],
)
def test_a_file_that_cannot_be_used_is_named_and_written_anew(
    damage: str | dict[str, object], reason: str, caplog: pytest.LogCaptureFixture
) -> None:
    path = keep(NAME, {"a": Tuned(4)})
    stored = json.loads(path.read_text())
    path.write_text(damage if isinstance(damage, str) else json.dumps(stored | damage))
    assert kept(NAME) == {}
    assert str(path) in caplog.text
    assert reason in caplog.text
    keep(NAME, {"b": Tuned(5)})
    assert kept(NAME) == {"b": Tuned(5)}
