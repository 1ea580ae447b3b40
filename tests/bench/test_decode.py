"""The decode benchmark on few tokens: what it reports must be consistent, and every call of a step accounted for."""

from __future__ import annotations

from pathlib import Path

import pytest

from dibit.bench import decode
from dibit.engine.config import EngineConfig
from dibit.engine.errors import ConfigError
from dibit.kernels import native

pytestmark = pytest.mark.demo
CONFIG = EngineConfig(max_model_len=64, max_num_seqs=2)


@pytest.fixture(autouse=True)
def _small_bandwidth_buffer(monkeypatch: pytest.MonkeyPatch) -> None:
    if (reason := native.unavailable()) is not None:
        pytest.skip(reason)
    monkeypatch.setattr(decode, "BANDWIDTH_BYTES", 1 << 24)


def test_models_take_turns_and_a_profile_holds_the_whole_step(low_bit_demo: Path) -> None:
    model = str(low_bit_demo)
    results = decode.run_decode(
        [model, model], CONFIG, prompt_len=6, gen_len=3, batch_sizes=(1, 2), repeats=2, profile=True
    )
    assert [(r.model, r.batch) for r in results] == [(model, 1), (model, 2), (model, 1), (model, 2)]
    for r in results:
        assert len(r.decode_step_ms_runs) == r.repeats == 2
        assert r.decode_tok_s == pytest.approx(1e3 * r.batch / r.decode_step_ms)
        calls = {op.op: op.calls for op in r.ops}
        assert calls == {
            "embedding": 1,
            "rms_norm": 61,
            "qlinear qkv": 30,
            "rope_kv_write": 30,
            "paged_attention": 30,
            "qlinear o": 30,
            "qlinear gate_up": 30,
            "silu_mul": 30,
            "qlinear down": 30,
            "qlinear head": 1,
            "argmax": 1,
            "sample": 1,
        }
        read = {op.op: op.bytes for op in r.ops}
        assert sum(read[op] for op in read if op.startswith("qlinear")) == pytest.approx(
            r.weight_bytes_per_token * r.batch, rel=0.01
        )
        # Six tokens of prompt and four drawn, all but the last in the cache: 3 heads of 64 float16, keys and values.
        least, most = 30 * r.batch * 9 * 3 * 64 * 2 * 2, 30 * r.batch * 12 * 3 * 64 * 2 * 2
        assert least <= read["paged_attention"] <= most
        assert sum(op.share for op in r.ops) == pytest.approx(1)
    assert "qlinear head" in decode.format_table(results)


def test_a_step_that_is_not_replayed_cannot_be_profiled(low_bit_demo: Path) -> None:
    config = EngineConfig(max_model_len=64, max_num_seqs=2, tape=False)
    with pytest.raises(ConfigError, match="--no-tape"):
        decode.run_decode([str(low_bit_demo)], config, prompt_len=6, gen_len=3, batch_sizes=(1,), profile=True)


def test_a_batch_beyond_the_engine_is_refused(low_bit_demo: Path) -> None:
    with pytest.raises(ConfigError, match="max-num-seqs"):
        decode.run_decode([str(low_bit_demo)], CONFIG, batch_sizes=(3,))
    with pytest.raises(ConfigError, match="KV blocks"):
        decode.run_decode([str(low_bit_demo)], CONFIG, prompt_len=512, batch_sizes=(2,))
