"""The op benchmark on a weight too small to be worth timing: what it reports must still be consistent."""

from __future__ import annotations

import json
from dataclasses import asdict, replace

import pytest
import torch

from dibit.bench.bandwidth import read_bandwidth
from dibit.bench.machine import last_level_cache_bytes, machine_facts
from dibit.bench.ops import OpResult, format_table, run_ops
from dibit.kernels import native
from dibit.kernels.formats import FormatError


@pytest.fixture(autouse=True)
def _needs_native() -> None:
    if (reason := native.unavailable()) is not None:
        pytest.skip(reason)


@pytest.fixture
def results() -> list[OpResult]:
    return run_ops(
        [(48, 64), (32, 128)],
        bits=(2, 8),
        group_size=32,
        batch_sizes=(1, 3),
        threads=2,
        rounds=2,
        round_s=0,
        weight_bytes=1 << 18,
    )


def test_every_combination_is_measured_once(results: list[OpResult]) -> None:
    assert [(r.n, r.k, r.bits, r.m) for r in results] == [
        (n, k, bits, m) for n, k in ((48, 64), (32, 128)) for bits in (2, 8) for m in (1, 3)
    ]


def test_figures_follow_from_the_times(results: list[OpResult]) -> None:
    for r in results:
        assert r.weight_bytes == r.n * r.k * r.bits // 8 + r.n * r.k // 32 * 3
        assert r.calls == 4
        assert r.weight_gb_s == pytest.approx(r.weight_bytes / r.time_us / 1e3)
        assert r.bandwidth_share == pytest.approx(r.weight_gb_s / r.bandwidth_gb_s)
        assert r.gmac_s == pytest.approx(r.m * r.n * r.k / r.time_us / 1e3)
        assert r.speedup_fp32 == pytest.approx(r.fp32_us / r.time_us)
        assert r.speedup_bf16 == pytest.approx(r.bf16_us / r.time_us)
        assert r.threads == 2


def test_thread_counts_are_put_back(counts: tuple[int, int]) -> None:
    run_ops([(16, 32)], bits=(4,), group_size=32, threads=3, rounds=1, round_s=0, weight_bytes=1)
    read_bandwidth(3, 1 << 16)
    assert (native.threads(), torch.get_num_threads()) == counts


@pytest.fixture
def counts() -> tuple[int, int]:
    return native.threads(), torch.get_num_threads()


def test_results_are_json_and_a_table(results: list[OpResult]) -> None:
    assert json.loads(json.dumps(asdict(results[0])))["machine"]["isa"] == native.isa()
    table = format_table([replace(results[0], time_us=123.4, bandwidth_share=0.617)])
    assert "48 x 64" in table
    assert "int2-g32" in table
    assert "123 us" in table
    assert "62%" in table
    assert format_table([]) == "nothing was measured"


def test_impossible_formats_are_refused_before_anything_runs() -> None:
    with pytest.raises(FormatError, match="5 bits"):
        run_ops([(16, 32)], bits=(5,))
    with pytest.raises(FormatError, match="do not divide"):
        run_ops([(16, 32), (16, 48)], group_size=32)


def test_bandwidth_is_positive_and_counts_bytes() -> None:
    assert 0.01 < read_bandwidth(1, 1 << 22) < 10_000


def test_machine_facts_name_the_machine() -> None:
    facts = machine_facts()
    assert facts.cpu
    assert facts.cores >= 1
    assert facts.threads == native.threads()
    assert facts.isa in ("portable", "avx2", "avx512", "amx")
    assert facts.cache_bytes == last_level_cache_bytes() >= 0
    assert facts.torch == torch.__version__
