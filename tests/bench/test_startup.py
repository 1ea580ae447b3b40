"""bench startup: a small model started cold and warm, options passed on, and failures told."""

from __future__ import annotations

from pathlib import Path

import pytest

from dibit.bench.startup import arguments, format_table, run_startup
from dibit.engine.config import EngineConfig
from dibit.engine.errors import ConfigError
from dibit.kernels import native


def test_options_of_a_config() -> None:
    assert arguments(EngineConfig()) == []
    config = EngineConfig(max_model_len=64, kv_type="float32", tape=False, head_bits=4, kv_bytes=1000, cache_dir="x")
    words = "--max-model-len 64 --kv-bytes 1000 --kv-type float32 --head-bits 4 --no-tape"
    assert arguments(config) == words.split()


@pytest.mark.demo
@pytest.mark.skipif(native.unavailable() is not None, reason="needs the C++ kernels")
def test_a_warm_start_maps_what_the_cold_one_left(low_bit_demo: Path) -> None:
    config = EngineConfig(max_model_len=64, max_num_seqs=2)
    cold, warm = run_startup(str(low_bit_demo), config, repeats=1)
    assert (cold.kind, warm.kind) == ("cold", "warm")
    for one in (cold, warm):
        assert 0 < one.listening_s < one.first_token_s
        assert one.peak_rss_bytes > one.weight_bytes > 10_000_000
        assert one.overhead_bytes == one.peak_rss_bytes - one.weight_bytes
        assert one.kind in format_table([cold, warm])
    assert warm.starts[0].anonymous_bytes < cold.starts[0].anonymous_bytes - 0.5 * warm.weight_bytes


def test_a_server_that_does_not_come_up(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from dibit.bench import startup

    with pytest.raises(ConfigError, match=r"ended: .*no such file"):
        startup.start("/none.gguf", EngineConfig(), cache=tmp_path)
    with pytest.raises(ConfigError, match="repeats is 0"):
        run_startup("/none.gguf", EngineConfig(), repeats=0)
