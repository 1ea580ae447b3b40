"""Methods over whole blocks: changed norms and biases reach the checkpoint, and a continued run; failures are told."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
from torch import Tensor
from transformers import LlamaForCausalLM

from dibit.engine.checkpoint import open_checkpoint
from dibit.engine.errors import CheckpointError
from dibit.kernels.formats import QTensor, dequantize
from dibit.quantize import quantize_checkpoint
from dibit.quantize.block import BlockJob, QuantizedBlock
from dibit.quantize.fold import copied, fold, input_width
from dibit.quantize.methods.rtn import RTN
from dibit.quantize.report import QuantizeReport
from dibit.quantize.stats import Need, SiteFailure, Stats

KEYS = ("qkv", "o", "gate_up", "down")


@dataclass(frozen=True)
class Folding:
    """Random scales on every site, then rounding: with many bits the model computes the same."""

    needs: ClassVar[frozenset[Need]] = frozenset({"inputs"})
    symmetric: bool = False

    def quantize_block(self, job: BlockJob) -> QuantizedBlock:
        rng = torch.Generator().manual_seed(job.layer)
        folded = copied(job.block)
        for key in KEYS:
            scales = torch.exp(torch.randn(input_width(folded.sizes, key), generator=rng) * 0.3)
            fold(folded, key, scales, stored=job.float_type)
        linears: Any = folded.linears
        weights = {s.name: RTN().quantize(linears[s.key].weight, job.formats[s.name], Stats()) for s in job.sites}
        return QuantizedBlock.folded(job, folded, weights)


def run(model: Path, out: Path, text: Path, method: Any, **changes: Any) -> QuantizeReport:
    options = {"bits": 8, "group_size": 32, "samples": 8, "sequence_length": 24, "calibration": text, **changes}
    return quantize_checkpoint(str(model), out, method=method, **options)


@pytest.fixture(scope="module")
def folded(tiny: Path, text: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("folded") / "out"
    run(tiny, out, text, Folding())
    return out


def read_back(model: Path, out: Path) -> Any:
    """The float model with everything that the checkpoint says."""
    loaded = LlamaForCausalLM.from_pretrained(model, dtype=torch.float32).eval()
    written = open_checkpoint(out)
    state = {name: written.tensor(name).float() for name in loaded.state_dict() if written.has(name)}
    for name, _ in loaded.named_modules():
        if name.endswith("_proj"):
            linear = written.linear(name)
            assert isinstance(linear, QTensor)
            state[f"{name}.weight"] = dequantize(linear)
    written.close()
    loaded.load_state_dict(state)
    return loaded


def distance(model: Any, reference: Any, tokens: Tensor) -> float:
    expected = reference(tokens).logits
    return float((model(tokens).logits - expected).norm() / expected.norm())


@torch.no_grad()
def test_changed_norms_and_biases_are_in_the_checkpoint(
    tiny: Path, text: Path, folded: Path, unseen: Tensor, tmp_path: Path
) -> None:
    reference = LlamaForCausalLM.from_pretrained(tiny, dtype=torch.float32).eval()
    found = read_back(tiny, folded)
    for name in ("model.layers.2.input_layernorm.weight", "model.layers.1.self_attn.v_proj.bias"):
        assert not torch.allclose(found.state_dict()[name], reference.state_dict()[name], rtol=0.02)
    run(tiny, tmp_path / "rtn", text, "rtn", calibration=None)
    rounded = read_back(tiny, tmp_path / "rtn")
    assert distance(found, reference, unseen) < 1.5 * distance(rounded, reference, unseen) < 0.1


@torch.no_grad()
def test_norms_keep_the_type_of_the_source(tiny: Path, text: Path, unseen: Tensor, tmp_path: Path) -> None:
    half, out = tmp_path / "half", tmp_path / "out"
    model = LlamaForCausalLM.from_pretrained(tiny, dtype=torch.bfloat16)
    model.save_pretrained(half)
    for file in tiny.glob("tokenizer*"):
        (half / file.name).write_bytes(file.read_bytes())
    run(half, out, text, Folding())
    written = open_checkpoint(out)
    assert written.info("model.layers.1.input_layernorm.weight").dtype == torch.bfloat16
    assert distance(read_back(half, out), model.float(), unseen) < 0.06


def test_a_run_continues_with_the_changed_norms(tiny: Path, text: Path, folded: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"

    def stop(done: int, total: int, note: str) -> None:
        if done == 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run(tiny, out, text, Folding(), progress=stop)
    assert run(tiny, out, text, Folding()).resumed_blocks == 2
    for file in folded.glob("*.safetensors"):
        assert (out / file.name).read_bytes() == file.read_bytes()


@dataclass(frozen=True)
class Broken:
    """Every block fails in another way."""

    needs: ClassVar[frozenset[Need]] = frozenset({"inputs"})
    symmetric: bool = False

    def quantize_block(self, job: BlockJob) -> QuantizedBlock:
        if job.layer == 0:
            raise SiteFailure("on purpose")
        good = Folding().quantize_block(job)
        if job.layer == 1:
            return QuantizedBlock(good.weights, attn_norm=torch.full_like(job.block.attn_norm, float("nan")))
        weights = {name: QTensor(q.codes, q.zeros, q.scales / 0, q.format) for name, q in good.weights.items()}
        return QuantizedBlock(weights)


def test_a_block_that_fails_is_rounded_and_said_so(
    tiny: Path, text: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    report = run(tiny, tmp_path / "out", text, Broken(), bits=4)
    run(tiny, tmp_path / "rtn", text, "rtn", bits=4, calibration=None)
    assert [site.method for site in report.sites] == ["rtn"] * 12
    reasons = [report.sites[i].fallback or "" for i in (0, 4, 8)]
    assert [word in reason for word, reason in zip(("purpose", "norm", "scales"), reasons, strict=True)] == [True] * 3
    assert "layers.1 is rounded to nearest" in caplog.text
    for file in (tmp_path / "rtn").glob("*.safetensors"):
        assert (tmp_path / "out" / file.name).read_bytes() == file.read_bytes()


def test_a_weight_that_is_not_finite_is_no_failure_of_the_method(tiny: Path, text: Path, tmp_path: Path) -> None:
    broken = tmp_path / "broken"
    model = LlamaForCausalLM.from_pretrained(tiny)
    with torch.no_grad():
        model.get_submodule("model.layers.0.mlp.up_proj").weight[3, 5] = float("inf")
    model.save_pretrained(broken)
    for file in tiny.glob("tokenizer*"):
        (broken / file.name).write_bytes(file.read_bytes())
    with pytest.raises(CheckpointError, match=r"layers\.0\.gate_up is not finite"):
        run(broken, tmp_path / "out", text, Folding())
