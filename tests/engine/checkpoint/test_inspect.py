"""Facts for `dibit inspect`."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from checkpoint_files import gptq_config, rounded_weight, write_gptq, write_json, write_model

from dibit.engine.checkpoint import resolve_model
from dibit.engine.checkpoint.inspect import SiteFormat, TypeSize, inspect_checkpoint
from dibit.kernels.formats import Format


def test_a_quantized_checkpoint(tmp_path: Path) -> None:
    four, three = Format(4, 64), Format(3, 32)
    modules = {f"model.layers.{i}.mlp.up_proj": rounded_weight(64, 128, four) for i in range(3)}
    modules["model.layers.0.mlp.down_proj"] = rounded_weight(96, 64, three)
    dynamic = {"+:.*down_proj": {"bits": 3, "group_size": 32}}
    floats = {"model.embed_tokens.weight": torch.randn(10, 64).bfloat16(), "model.norm.weight": torch.randn(64)}
    config = gptq_config(four, dynamic=dynamic, meta={"quantizer": ["sometool:1.2"]})
    folder = write_gptq(tmp_path / "m", modules, config, extra=floats)
    write_json(folder / "tokenizer.json", {})
    summary = inspect_checkpoint(folder)
    assert summary.parameters == 3 * 64 * 128 + 96 * 64 + 10 * 64 + 64
    assert summary.sites == (SiteFormat("down_proj", "int3-g32", 1), SiteFormat("up_proj", "int4-g64", 3))
    weights = 3 * 64 * 128 + 96 * 64
    expected = (3 * 64 * 128 * (4 + 20 / 64) + 96 * 64 * (3 + 19 / 32)) / weights
    assert summary.bits_per_weight == pytest.approx(expected)
    assert TypeSize("BF16", 1, 10 * 64 * 2) in summary.types
    assert summary.file_bytes == sum(t.nbytes for t in summary.types)
    assert (summary.architecture, summary.layers, summary.context_length) == ("LlamaForCausalLM", 1, 128)
    assert summary.quantization == "gptq int4-g64, asymmetric, labelled gptq_v2"
    assert summary.quantizer == "sometool:1.2"
    assert summary.zero_convention == "v2"
    assert (summary.tokenizer, summary.chat_template) == (True, False)
    assert summary.block_widths == ((3, 4), (4,), (4,))
    text = summary.text()
    for fact in (
        "int3-g32",
        "blocks by bits  1 x 3+4, 2 x 4",
        "*44  (first to last; * several widths)",
        "sometool:1.2",
        "zero points     v2",
        "chat template no",
    ):
        assert fact in text


def test_a_float_checkpoint(tmp_path: Path) -> None:
    tensors = {"model.layers.0.mlp.up_proj.weight": torch.ones(8, 8).half(), "model.norm.weight": torch.ones(8)}
    summary = inspect_checkpoint(write_model(tmp_path, tensors))
    assert summary.bits_per_weight == 16
    assert (summary.quantization, summary.zero_convention) == (None, None)
    assert summary.sites == (SiteFormat("up_proj", "F16", 1),)
    assert summary.block_widths == ((),)
    assert "blocks by bits" not in summary.text()


@pytest.mark.demo
def test_the_demo() -> None:
    summary = inspect_checkpoint(resolve_model("demo"))
    assert summary.bits_per_weight == 5
    assert summary.parameters == 134_515_008
    assert {site.format for site in summary.sites} == {"Q4_1"}
    assert summary.chat_template
