"""The trace of the quantizer's memory: the random checkpoint, the watching, and what counts as bounded."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch

from dibit.bench.machine import machine_facts
from dibit.bench.memory_trace import Trace, thinned, trace, watch, within, write_float
from dibit.bench.synthetic import Shape
from dibit.engine.checkpoint import open_checkpoint
from dibit.engine.errors import ConfigError
from dibit.engine.models import resolve_arch
from dibit.engine.models.weights import check_names

TINY = Shape(hidden=64, layers=3, inter=128, heads=4, kv_heads=2, vocab=300)


def test_the_random_model_is_a_whole_checkpoint(tmp_path: Path) -> None:
    write_float(tmp_path / "model", TINY)
    checkpoint = open_checkpoint(tmp_path / "model")
    check_names(checkpoint, *resolve_arch(checkpoint.config))
    first, other = (checkpoint.tensor(f"model.layers.{layer}.mlp.down_proj.weight") for layer in (0, 2))
    assert first.dtype == torch.bfloat16
    assert not torch.equal(first, other)
    assert 0.8 < float(first.float().std()) * 128**0.5 < 1.2
    assert len(list((tmp_path / "model").glob("*.safetensors"))) == 4
    checkpoint.close()


@pytest.mark.parametrize("method", ["rtn", "gptq"])
def test_a_run_is_watched(tmp_path: Path, method: str) -> None:
    found = trace(TINY, tmp_path, method=method, bits=2, samples=2, sequence_length=16, options=[])
    highest = max(rss for _, rss in found.trace)
    assert highest > 10e6
    # The system counts a little late, each thread for itself.
    assert found.peak_rss_bytes > highest * 0.98
    assert 0 < found.trace[0][0] < found.trace[-1][0] < found.seconds
    assert found.source_bytes > 2 * (TINY.vocab * 64 + 3 * (2 * 64 * 64 + 2 * 64 * 32 + 3 * 64 * 128))


def test_memory_is_seen_while_it_is_held() -> None:
    code = "import time; x = bytearray(b'1') * 200_000_000; time.sleep(1); del x; time.sleep(1)"
    seconds, peak, found = watch([sys.executable, "-c", code])
    assert seconds > 2
    assert peak > 200e6
    assert max(rss for _, rss in found) > 200e6
    assert found[-1][1] < 150e6
    with pytest.raises(ConfigError, match="status 3"):
        watch([sys.executable, "-c", "raise SystemExit(3)"])


def test_thinning_keeps_the_peak() -> None:
    points = [(float(i), 100 + i % 7) for i in range(1000)]
    points[777] = (777.0, 5000)
    few = thinned(points, 50)
    assert len(few) <= 50
    assert (777.0, 5000) in few
    assert [second for second, _ in few] == sorted(second for second, _ in few)
    assert thinned(points[:3], 50) == tuple(points[:3])


def test_a_peak_that_grows_with_the_model_is_no_bound() -> None:
    def of(layers: int, peak: float) -> Trace:
        return Trace("rtn", 4, layers, 1, 8, 10**9, 1.0, int(peak * 1e9), (), machine_facts())

    assert within([of(16, 5.0), of(4, 4.9)], limit_gb=6)
    assert not within([of(4, 3.0), of(16, 4.0)], limit_gb=6)
    assert not within([of(4, 6.5), of(16, 6.5)], limit_gb=6)
