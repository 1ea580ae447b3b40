"""The plan: from headers alone, and equal to what a load and a runner really hold."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_models import MemoryWeights, hf_model, quantized, weights_of

from dibit.engine import memory_plan
from dibit.engine.config import EngineConfig
from dibit.engine.errors import ConfigError
from dibit.engine.loader import load_decoder
from dibit.engine.memory_plan import free_memory, plan_memory
from dibit.engine.runner import ModelRunner
from dibit.kernels import native
from dibit.kernels.formats import Format

GB = 1 << 30
MODELS: dict[str, tuple[dict[str, Any], Any]] = {
    "float-tied": ({"tie_word_embeddings": True}, None),
    "float-untied": ({"attention_bias": True, "mlp_bias": True}, None),
    "4-bit": ({"tie_word_embeddings": True}, Format(4, 16)),
    "3-bit": ({}, Format(3, 16)),
    "channel": ({"attention_bias": True}, Format(2, -1)),
    "mixed": ({}, {"q_proj": Format(8, 16), "v_proj": Format(2, -1), "down_proj": Format(4, 16)}),
}


def make(name: str) -> MemoryWeights:
    overrides, formats = MODELS[name]
    # Widths that are whole panels and blocks, so that padding, which real models have none of, plays no part.
    wide = {"hidden_size": 128, "intermediate_size": 192, "vocab_size": 112, "num_attention_heads": 4}
    weights = weights_of(hf_model(**{**wide, **overrides}))
    return weights if formats is None else quantized(weights, formats)


@pytest.mark.parametrize("backend", ["reference", "cpu"])
@pytest.mark.parametrize("head_bits", [4, 8, 16])
@pytest.mark.parametrize("name", MODELS)
def test_planned_weights_are_those_of_the_load(name: str, head_bits: Any, backend: Any) -> None:
    if backend == "cpu" and native.unavailable() is not None:
        pytest.skip("C++ kernels not built")
    weights = make(name)
    config = EngineConfig(backend=backend, head_bits=head_bits)
    plan = plan_memory(weights, config=config)
    assert weights.reads == []
    held = load_decoder(weights, config=config).nbytes
    assert plan.weight_bytes == pytest.approx(held, rel=0.001)
    assert plan.embedding_bytes < plan.weight_bytes


def test_the_runner_gets_what_was_planned(monkeypatch: pytest.MonkeyPatch) -> None:
    weights = make("4-bit")
    config = EngineConfig(backend="reference", max_num_seqs=3, block_size=16)
    plan = plan_memory(weights, config=config, free_bytes=4 * GB)
    torch_threads = torch.get_num_threads()
    decoder = load_decoder(weights, config=config)
    runner = ModelRunner(decoder, config, free_bytes=4 * GB - decoder.nbytes)
    torch.set_num_threads(torch_threads)
    assert plan.fits
    assert plan.note is None
    assert (plan.max_model_len, plan.num_blocks) == (runner.max_model_len, runner.num_blocks)
    assert plan.kv_bytes == runner.cache.nbytes
    assert plan.total_bytes == plan.weight_bytes + plan.kv_bytes + plan.activation_bytes


def test_largest_context_and_batch_are_at_the_edge() -> None:
    weights = make("float-tied")
    base = plan_memory(weights, free_bytes=4 * GB, config=EngineConfig(backend="reference", block_size=16))
    fixed = base.weight_bytes + base.activation_bytes
    block = base.kv_bytes_per_token * 16
    plan = plan_memory(weights, free_bytes=fixed + 5 * block, config=EngineConfig(backend="reference", block_size=16))
    assert plan.largest_context == 80
    assert plan.batch_at(16) == 5
    assert plan.batch_at(17) == 2
    assert plan.batch_at(81) == 0
    assert base.largest_context == base.model_max_positions == 128
    assert base.largest_batch == base.batch_at(128)


def test_what_does_not_fit_is_said_with_numbers() -> None:
    weights = make("float-tied")
    config = EngineConfig(backend="reference")
    tight = plan_memory(weights, config=config, free_bytes=1000)
    assert not tight.fits
    assert tight.refusal is not None
    assert "exceed" in tight.refusal
    assert tight.kv_bytes == tight.largest_batch == tight.largest_context == 0
    assert "does not fit" in tight.text()

    too_long = plan_memory(weights, config=EngineConfig(backend="reference", max_model_len=500), free_bytes=4 * GB)
    assert too_long.refusal is not None
    assert "500" in too_long.refusal
    assert "128" in too_long.refusal


def test_a_shortened_context_is_noted() -> None:
    weights = make("float-tied")
    base = plan_memory(weights, free_bytes=4 * GB, config=EngineConfig(backend="reference", block_size=16))
    free = base.weight_bytes + base.activation_bytes + 6 * base.kv_bytes_per_token * 16
    plan = plan_memory(weights, free_bytes=free, config=EngineConfig(backend="reference", block_size=16))
    assert plan.fits
    assert plan.max_model_len == 48
    assert plan.note is not None
    assert "limited to 48 tokens" in plan.text()


def test_a_backend_that_cannot_run_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(native, "unavailable", lambda: "not built")
    with pytest.raises(ConfigError, match="not built"):
        plan_memory(make("4-bit"), config=EngineConfig(backend="cpu"))


def test_free_memory_respects_the_control_group(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(memory_plan, "CGROUP", tmp_path)
    unlimited = free_memory()
    assert unlimited > 0
    (tmp_path / "memory.current").write_text("700\n")
    (tmp_path / "memory.stat").write_text("anon 400\ninactive_file 100\n")
    (tmp_path / "memory.max").write_text("1000\n")
    assert free_memory() == 400
    (tmp_path / "memory.max").write_text("max\n")
    assert free_memory() == pytest.approx(unlimited, rel=0.2)


@pytest.mark.parametrize(
    ("kv_type", "row"), [("float16", 2 * 2 * 64), ("int8", 2 * 68), ("k8v4", 68 + 40), ("int4", 80), ("fp8", 2 * 64)]
)
def test_a_cache_of_low_bits_takes_its_bytes(kv_type: Any, row: int) -> None:
    weights = weights_of(hf_model(head_dim=64))
    config = EngineConfig(kv_type=kv_type, block_size=4, kv_bytes=1 << 20)
    assert plan_memory(weights, config=config).kv_bytes_per_token == 2 * 2 * row  # layers, kv heads
    cache = ModelRunner(load_decoder(weights, config=config), config).cache
    assert cache.nbytes == cache.num_blocks * 4 * 2 * 2 * row


def test_an_odd_head_dim_has_no_codes() -> None:
    weights = weights_of(hf_model(head_dim=2050))
    with pytest.raises(ConfigError, match=r"kv_type is 'int8'.*at most 1024, not 2050"):
        plan_memory(weights, config=EngineConfig(kv_type="int8"))
    plan_memory(weights, config=EngineConfig(kv_type="fp8"))
