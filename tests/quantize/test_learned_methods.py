"""OmniQuant and Block-AP on a tiny model: what is trained is what is packed, each is better than the one before it,
and a run that is killed, or trains on nothing finite, ends well."""

from __future__ import annotations

import dataclasses
import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from block_jobs import make_job, packed_block
from random_blocks import KEYS, run
from torch import Tensor
from transformers import LlamaForCausalLM

from dibit.engine.checkpoint import open_checkpoint
from dibit.engine.errors import ConfigError
from dibit.engine.models.decoder import Block
from dibit.kernels.formats import QTensor, dequantize
from dibit.quantize import METHODS, quantize_checkpoint
from dibit.quantize.calibration import Calibration, load_segments
from dibit.quantize.fold import input_width
from dibit.quantize.methods import block_ap, omniquant
from dibit.quantize.methods.block_ap import BlockAP
from dibit.quantize.methods.omniquant import OmniQuant
from dibit.quantize.methods.rtn import RTN
from dibit.quantize.report import QuantizeReport
from dibit.quantize.stats import Stats

TEXT: dict[str, int] = {"samples": 24, "sequence_length": 40}
STEPS = 48


@pytest.mark.parametrize("float_type", [torch.float32, torch.float16, torch.bfloat16])
def test_random_transforms_change_nothing_before_rounding(tmp_path: Path, float_type: torch.dtype) -> None:
    job = make_job(tmp_path, float_type=float_type)
    for name in ("attn_norm", "mlp_norm"):
        setattr(job.block, name, getattr(job.block, name).to(float_type).float())
    rng = torch.Generator().manual_seed(5)
    scales = {key: torch.randn(input_width(job.block.sizes, key), generator=rng) for key in KEYS}
    learned = omniquant.Learned(OmniQuant(), job, scales)
    x = torch.randn(2, 12, job.block.sizes.hidden, generator=rng)
    with torch.no_grad():
        folded = learned.folded()
        expected = run(job.block, x)
        assert float((run(folded, x) - expected).norm() / expected.norm()) < 1e-5
        assert not torch.allclose(folded.mlp_norm, job.block.mlp_norm, rtol=0.1)


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize("symmetric", [False, True])
def test_what_is_trained_is_what_is_packed(tmp_path: Path, bits: int, *, symmetric: bool) -> None:
    job = make_job(tmp_path, bits=bits, float_type=torch.float16)
    x = torch.randn(2, 12, job.block.sizes.hidden)
    rng = torch.Generator().manual_seed(6)
    scales = {key: torch.randn(input_width(job.block.sizes, key), generator=rng) for key in KEYS}
    clipped = omniquant.Learned(OmniQuant(symmetric=symmetric), job, scales)
    first = {
        s.name: RTN(symmetric=symmetric).quantize(job.block.linears[s.key].weight, job.formats[s.name], Stats())  # type: ignore[attr-defined]
        for s in job.sites
    }
    trained = block_ap.Learned(BlockAP(symmetric=symmetric), job, first)
    for learned in (clipped, trained):
        with torch.no_grad():
            for group in learned.groups():
                for parameter in group.parameters:
                    parameter += 0.02 * torch.randn(parameter.shape, generator=rng)
            learned.project()
            if isinstance(learned, omniquant.Learned):
                block, weights = learned.quantized()
            else:
                block, weights = learned.block(), learned.quantized()
            assert torch.equal(run(learned.block(), x), run(packed_block(job, block, weights), x))
            if symmetric:
                assert all(bool((q.zeros == 1 << (bits - 1)).all()) for q in weights.values())


@pytest.mark.parametrize("learned", ["omniquant", "block-ap"])
def test_every_parameter_is_reached_by_the_loss(tmp_path: Path, learned: str) -> None:
    job = make_job(tmp_path)
    if learned == "omniquant":
        logs = {key: torch.zeros(input_width(job.block.sizes, key)) for key in KEYS}
        chosen: Any = omniquant.Learned(OmniQuant(transform_down=True), job, logs)
    else:
        first = {
            s.name: RTN().quantize(job.block.linears[s.key].weight * 0.7, job.formats[s.name], Stats())  # type: ignore[attr-defined]
            for s in job.sites
        }
        chosen = block_ap.Learned(BlockAP(), job, first)
        with torch.no_grad():
            for group in chosen.groups()[:-2:3]:
                # So that some weights are cut off, as training would do: zero points matter to no others.
                group.parameters[0].mul_(1.5)
    run(chosen.block(), torch.randn(2, 12, job.block.sizes.hidden)).square().sum().backward()  # type: ignore[no-untyped-call]
    for group in chosen.groups():
        for parameter in group.parameters:
            assert parameter.grad is not None
            assert float((parameter.grad != 0).float().mean()) > 0.3


def test_block_ap_begins_at_the_first_codes(tmp_path: Path) -> None:
    job = make_job(tmp_path)
    first = {}
    for site in job.sites:
        linear: Any = job.block.linears[site.key]
        noisy = linear.weight + 0.3 * torch.randn_like(linear.weight)
        first[site.name] = RTN().quantize(noisy, job.formats[site.name], Stats())
    begun = block_ap.Learned(BlockAP(), job, first).quantized()
    for name, expected in first.items():
        assert torch.equal(begun[name].codes, expected.codes)
        assert torch.equal(dequantize(begun[name]), dequantize(expected))


def learn(model: Path, out: Path, text: Path, method: Any, **changes: Any) -> QuantizeReport:
    options = {"bits": 2, "group_size": 32, "calibration": text, **TEXT, **changes}
    return quantize_checkpoint(str(model), out, method=method, **options)


def output_error(model: Path, out: Path, text: Path) -> float:
    """Mean squared error of the last hidden states over the calibration text."""
    reference = LlamaForCausalLM.from_pretrained(model, dtype=torch.float32).eval()
    segments = load_segments(Calibration(text, **TEXT), lambda content: [int(w[1:]) for w in content.split()])
    low = LlamaForCausalLM.from_pretrained(model, dtype=torch.float32).eval()
    written = open_checkpoint(out)
    state: dict[str, Tensor] = {n: written.tensor(n).float() for n in low.state_dict() if written.has(n)}
    for name, _ in low.named_modules():
        if name.endswith("_proj"):
            linear = written.linear(name)
            assert isinstance(linear, QTensor)
            state[f"{name}.weight"] = dequantize(linear)
    written.close()
    low.load_state_dict(state)
    with torch.no_grad():
        return float(F.mse_loss(low.model(segments.tokens)[0], reference.model(segments.tokens)[0]))


@pytest.fixture(scope="module")
def errors(tiny: Path, text: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, float]:
    out = tmp_path_factory.mktemp("learned")
    methods = {"rtn": RTN(), "omniquant": OmniQuant(steps=STEPS), "block-ap": BlockAP(steps=STEPS)}
    found = {}
    for name, method in methods.items():
        learn(tiny, out / name, text, method, calibration=None if name == "rtn" else text)
        found[name] = output_error(tiny, out / name, text)
    return found


def test_each_method_is_better_than_the_one_before_it(errors: dict[str, float]) -> None:
    assert errors["omniquant"] < 0.85 * errors["rtn"]
    assert errors["block-ap"] < 0.95 * errors["omniquant"]


@pytest.mark.parametrize(
    "method", [OmniQuant(steps=16), BlockAP(steps=16, start="rtn", held_out=0.25)], ids=["omniquant", "block-ap"]
)
def test_the_report_has_the_course_of_every_block(tiny: Path, text: Path, tmp_path: Path, method: Any) -> None:
    heard: list[str] = []
    report = learn(tiny, tmp_path / "out", text, method, progress=lambda done, total, note: heard.append(note))
    stored = json.loads((tmp_path / "out" / "quantize_report.json").read_text())
    assert len(stored["training"]) == 3
    for block, own in zip(stored["training"], report.training, strict=True):
        assert own is not None
        assert [step for step, _ in block["validation"]] == [0, *range(2, 18, 2)]
        assert min(loss for _, loss in block["validation"]) <= block["baseline"]
        assert block["losses"][-1][1] < block["losses"][0][1]
        assert block["validation"][-1][1] < block["validation"][0][1]
    assert "held-out block error" in report.summary()
    assert any("step 16 of 16" in note for note in heard)
    assert report.fallbacks == ()
    assert {site.method for site in report.sites} == {next(n for n, kind in METHODS.items() if kind is type(method))}


KILLED = """
import os, signal, sys
from pathlib import Path
import torch
from dibit.quantize import METHODS, quantize_checkpoint
torch.set_num_threads(1)
model, out, text, method = sys.argv[1:]
def progress(done, total, note):
    if done == 1 and "step 5 of 8" in note:
        os.kill(os.getpid(), signal.SIGKILL)
quantize_checkpoint(model, Path(out), method=METHODS[method](steps=8), bits=2, group_size=32, calibration=Path(text),
                    samples=24, sequence_length=40, progress=progress)
"""


def same_course(found: QuantizeReport, expected: QuantizeReport) -> bool:
    timeless = [
        [
            dataclasses.replace(block, seconds=0, tokens_per_s=0, matmul_share=0)
            for block in report.training
            if block is not None
        ]
        for report in (found, expected)
    ]
    return len(timeless[0]) == 3 and timeless[0] == timeless[1]


def same_bytes(found: Path, expected: Path) -> bool:
    files = list(expected.glob("*.safetensors"))
    return files != [] and all((found / file.name).read_bytes() == file.read_bytes() for file in files)


def test_a_killed_run_continues_to_the_same_bytes(tiny: Path, text: Path, tmp_path: Path) -> None:
    expected = learn(tiny, tmp_path / "whole", text, BlockAP(steps=8))
    command = [sys.executable, "-c", KILLED, str(tiny), str(tmp_path / "out"), str(text), "block-ap"]
    ended = subprocess.run(command, capture_output=True, text=True, check=False)
    assert ended.returncode == -signal.SIGKILL, ended.stderr
    report = learn(tiny, tmp_path / "out", text, BlockAP(steps=8))
    assert report.resumed_blocks == 1
    assert same_course(report, expected)
    assert same_bytes(tmp_path / "out", tmp_path / "whole")
    assert sorted(os.listdir(tmp_path / "out")) == sorted(os.listdir(tmp_path / "whole"))


def test_an_interrupted_run_continues_with_its_folded_norms(tiny: Path, text: Path, tmp_path: Path) -> None:
    def stop(done: int, total: int, note: str) -> None:
        if done == 2 and "step 3 of 8" in note:
            raise KeyboardInterrupt

    expected = learn(tiny, tmp_path / "whole", text, OmniQuant(steps=8))
    with pytest.raises(KeyboardInterrupt):
        learn(tiny, tmp_path / "out", text, OmniQuant(steps=8), progress=stop)
    report = learn(tiny, tmp_path / "out", text, OmniQuant(steps=8))
    assert report.resumed_blocks == 2
    assert same_course(report, expected)
    assert same_bytes(tmp_path / "out", tmp_path / "whole")


@pytest.mark.parametrize(
    ("method", "used"),
    [(OmniQuant(steps=8), "rtn"), (BlockAP(steps=8), "gptq"), (BlockAP(steps=8, start="rtn"), "rtn")],
    ids=["omniquant", "block-ap", "block-ap-rtn"],
)
def test_a_block_that_cannot_be_trained_falls_back_and_it_is_said(
    tiny: Path, text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, method: Any, used: str
) -> None:
    """NaN in every training step of the second block."""
    learned: Any = (omniquant if isinstance(method, OmniQuant) else block_ap).Learned
    block = learned.block

    def spoiled(self: Any) -> Block:
        found: Block = block(self)
        if self._job.layer == 1 and torch.is_grad_enabled():
            found.mlp_norm = found.mlp_norm * float("nan")
        return found

    monkeypatch.setattr(learned, "block", spoiled)
    report = learn(tiny, tmp_path / "out", text, method)
    assert [site.method for site in report.sites[4:8]] == [used] * 4
    assert all(site.fallback is None for site in (*report.sites[:4], *report.sites[8:]))
    assert "training failed" in (report.sites[4].fallback or "")
    training = report.training[1]
    assert training is not None
    assert (training.skipped, training.restarts) == (12, 2)
    assert "4 sites were" in report.summary()
    monkeypatch.undo()
    learn(tiny, tmp_path / "other", text, method)
    norm = "model.layers.1.input_layernorm.weight"
    assert torch.equal(open_checkpoint(tmp_path / "out").tensor(norm), open_checkpoint(tiny).tensor(norm))
    assert not torch.equal(open_checkpoint(tmp_path / "other").tensor(norm), open_checkpoint(tiny).tensor(norm))


def test_searched_ranges_are_the_better_start(tiny: Path, text: Path, tmp_path: Path) -> None:
    starts = []
    for search in (True, False):
        report = learn(tiny, tmp_path / str(search), text, OmniQuant(steps=1, transform=False, search=search))
        assert report.training[0] is not None
        starts.append(report.training[0].validation[0][1] / report.training[0].baseline)
    assert starts[0] < 0.9 * starts[1]


def test_rounding_is_kept_where_training_does_not_reach_it(tiny: Path, text: Path, tmp_path: Path) -> None:
    report = learn(
        tiny, tmp_path / "out", text, OmniQuant(steps=1, transform=False, search=False, clip_rate=0.001), bits=8
    )
    learn(tiny, tmp_path / "rtn", text, RTN(), bits=8, calibration=None)
    assert {site.method for site in report.sites} == {"rtn"}
    assert "loses less" in (report.sites[0].fallback or "")
    assert same_bytes(tmp_path / "out", tmp_path / "rtn")


@pytest.mark.parametrize(
    ("kind", "wrong"),
    [
        (OmniQuant, {"steps": 0}),
        (OmniQuant, {"clip_rate": 0.0}),
        (OmniQuant, {"alpha": 1.5}),
        (OmniQuant, {"transform": False, "transform_down": True}),
        (BlockAP, {"start": "awq"}),
        (BlockAP, {"weight_rate": -1.0}),
        (BlockAP, {"held_out": 1.0}),
    ],
)
def test_options_that_make_no_sense_are_refused(kind: Any, wrong: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match=next(iter(wrong))):
        kind(**wrong)
