"""End-to-end training: gradients are those of the whole model, the divergence falls, codes stay, a killed run
continues to the same bytes, and the engine runs what comes out."""

from __future__ import annotations

import dataclasses
import json
import math
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import LlamaForCausalLM

from dibit.engine.checkpoint import Checkpoint, open_checkpoint
from dibit.engine.errors import CheckpointError, ConfigError
from dibit.engine.models import resolve_arch
from dibit.kernels.formats import QTensor, dequantize
from dibit.quantize import quantize_checkpoint
from dibit.quantize.end_to_end import EndToEnd, EndToEndReport, EndToEndTraining, TrainingFailure
from dibit.quantize.end_to_end_loss import Wanted, predict
from dibit.quantize.end_to_end_model import LowBitModel
from dibit.quantize.end_to_end_state import load_state
from dibit.quantize.finetune import train_end_to_end
from dibit.quantize.instruction import Examples
from dibit.quantize.plan import Plan

LENGTH, SAMPLES = 24, 16
SHORT = EndToEnd(steps=8, batch=3, held_out=0.25, scale_rate=1e-2, norm_rate=5e-3)


@pytest.fixture(scope="module")
def low(tiny: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """3 bits, 2 in the last block."""
    out = tmp_path_factory.mktemp("low") / "low"
    plan = {
        "default": {"bits": 3, "group_size": 32},
        "overrides": [{"sites": r"layers\.2\..*", "bits": 2, "group_size": 16}],
    }
    quantize_checkpoint(str(tiny), out, method="rtn", plan=Plan.from_json(json.dumps(plan)))
    return out


def tune(low: Path, out: Path, text: Path, *, settings: EndToEnd = SHORT, **changes: Any) -> EndToEndReport:
    options = {"text": text, "samples": SAMPLES, "sequence_length": LENGTH, **changes}
    return train_end_to_end(str(low), out, settings=settings, **options)


def opened(path: Path, *, norms: bool = True) -> tuple[Checkpoint, LowBitModel]:
    checkpoint = open_checkpoint(path)
    return checkpoint, LowBitModel(checkpoint, *resolve_arch(checkpoint.config), norms=norms)


def loaded(model: Path, checkpoint: Checkpoint) -> Any:
    """transformers' model with everything that the checkpoint says."""
    found = LlamaForCausalLM.from_pretrained(model, dtype=torch.float32).eval()
    state: dict[str, Tensor] = {n: checkpoint.tensor(n).float() for n in found.state_dict() if checkpoint.has(n)}
    for name, _ in found.named_modules():
        if name.endswith("_proj"):
            linear = checkpoint.linear(name)
            assert isinstance(linear, QTensor)
            state[f"{name}.weight"] = dequantize(linear)
    found.load_state_dict(state)
    return found


def test_gradients_are_those_of_the_whole_model(tiny: Path, low: Path, unseen: Tensor) -> None:
    """Against transformers' model, whose weight gradients times q - z, summed over a group, are those of its scale."""
    checkpoint, model = opened(low)
    tokens = unseen[:3, :17]
    reference = loaded(tiny, checkpoint)
    counted = torch.zeros(3, 17, dtype=torch.bool)
    counted[0, 4:9] = counted[1, :16] = counted[2, 15] = True
    labels = tokens.roll(-1, dims=1)[counted]
    expected = F.cross_entropy(reference(tokens).logits[counted], labels)
    expected.backward()

    kept: list[Tensor] = []
    x = model.hidden(tokens, keep=kept)
    sums, grad = predict(model.normed(x[counted]), model.head, Wanted(labels, None, None), objective="ce")
    assert grad is not None
    whole = torch.zeros_like(x)
    model.grad.fill_(math.nan)
    whole[counted] = model.normed_backward(x[counted], grad)
    model.backward(kept, whole)

    assert sums.nll / sums.tokens == pytest.approx(float(expected.detach()), rel=1e-5)
    named = dict(reference.named_parameters())
    assert len(model.slots) == 3 * 7 + 3 * 2 + 1
    for slot in model.slots:
        found = model.grad[slot.start : slot.stop].view(slot.shape)
        if slot.scales:
            linear = checkpoint.linear(slot.name)
            assert isinstance(linear, QTensor)
            levels = linear.codes.view(*slot.shape, -1).float() - linear.zeros.float()[..., None]
            slope = (named[f"{slot.name}.weight"].grad.view(levels.shape) * levels).sum(-1)
        else:
            slope = named[slot.name].grad
        torch.testing.assert_close(found, slope * slot.unit, rtol=2e-4, atol=1e-6)


@pytest.mark.parametrize("objective", ["kl", "ce"])
def test_closed_gradients_are_those_of_autograd(objective: Any) -> None:
    """Over several chunks of rows."""
    rows, hidden, vocab = 600, 12, 37
    rng = torch.Generator().manual_seed(4)
    x, taught = (torch.randn(rows, hidden, generator=rng) for _ in range(2))
    head, other = (torch.randn(vocab, hidden, generator=rng) for _ in range(2))
    labels = torch.randint(vocab, (rows,), generator=rng)
    sums, grad = predict(x, head, Wanted(labels, taught, other), objective=objective)
    leaf = x.clone().requires_grad_()
    own, theirs = F.log_softmax(leaf @ head.T, dim=1), F.log_softmax(taught @ other.T, dim=1)
    kl, nll = F.kl_div(own, theirs, reduction="batchmean", log_target=True), F.nll_loss(own, labels)
    (kl if objective == "kl" else nll).backward()
    assert grad is not None
    torch.testing.assert_close(grad, leaf.grad, rtol=1e-4, atol=1e-8)
    assert sums.kl / rows == pytest.approx(float(kl.detach()), rel=1e-5)
    assert sums.nll / rows == pytest.approx(float(nll.detach()), rel=1e-5)
    judged, none = predict(x, head, Wanted(labels, taught, other), objective=None)
    assert none is None
    assert judged.agreed == int((own.argmax(1) == theirs.argmax(1)).sum())
    assert judged.kl == pytest.approx(sums.kl)


def test_a_step_is_half_as_long_with_each_bit_more(low: Path, unseen: Tensor, tmp_path: Path) -> None:
    """Adam's first step moves everything by its rate: step sizes of 3 bits by half of what those of 2 bits move."""
    _, model = opened(low)
    tokens = unseen[:4, :17]
    examples = Examples(tokens, torch.arange(17).lt(16).expand(4, 17), {})
    settings = dataclasses.replace(SHORT, objective="ce", steps=1, warmup=0.0, clip=1e6)
    begin = model.values.clone()
    EndToEndTraining(model, examples, None, settings, seed=0, directory=tmp_path).run()
    saved = load_state(tmp_path)
    assert saved is not None
    moved = (saved[0].values - begin).abs()
    for slot in model.slots:
        rate = (settings.scale_rate if slot.scales else settings.norm_rate) * 2 ** (2 - slot.bits)
        assert float(moved[slot.start : slot.stop].median()) == pytest.approx(rate, rel=1e-2), slot.name
    assert {slot.bits for slot in model.slots if slot.scales} == {2, 3}


def test_it_begins_exactly_at_the_checkpoint(low: Path) -> None:
    checkpoint, model = opened(low)
    for module in model.packed():
        expected, found = checkpoint.linear(module), model.quantized(module)
        assert isinstance(expected, QTensor)
        assert torch.equal(dequantize(found), dequantize(expected))
    for name, norm in model.norms().items():
        assert torch.equal(norm, checkpoint.tensor(name))


@pytest.fixture(scope="module")
def tuned(low: Path, text: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, EndToEndReport]:
    out = tmp_path_factory.mktemp("tuned") / "out"
    return out, tune(low, out, text, settings=dataclasses.replace(SHORT, steps=24, scale_rate=0.03, norm_rate=0.02))


@torch.no_grad()
def test_the_divergence_falls_and_the_file_is_what_was_measured(
    tiny: Path, tuned: tuple[Path, EndToEndReport], unseen: Tensor, low: Path
) -> None:
    out, report = tuned
    assert report.teacher == str(tiny)
    assert report.best.kl is not None
    assert report.first.kl is not None
    assert report.best.kl < 0.8 * report.first.kl
    assert report.losses[-1][1] < report.losses[0][1]
    reference = F.log_softmax(LlamaForCausalLM.from_pretrained(tiny, dtype=torch.float32).eval()(unseen).logits, dim=-1)

    def divergence(path: Path) -> float:
        with_it = F.log_softmax(loaded(tiny, open_checkpoint(path))(unseen).logits, dim=-1)
        return float((reference.exp() * (reference - with_it)).sum(-1).mean())

    assert divergence(out) < 0.85 * divergence(low)


def test_codes_and_zero_points_stay_and_the_rest_is_trained(low: Path, tuned: tuple[Path, EndToEndReport]) -> None:
    before, after = open_checkpoint(low), open_checkpoint(tuned[0])
    assert sorted(before.names()) == sorted(after.names())
    for name in before.names():
        last = name.rpartition(".")[2]
        if name.endswith("norm.weight"):
            assert not torch.equal(before.tensor(name), after.tensor(name)), name
            assert before.info(name).dtype == after.info(name).dtype
        elif last in ("weight", "bias"):
            assert torch.equal(before.tensor(name), after.tensor(name)), name
        elif last == "qweight":
            first, then = (c.linear(name.removesuffix(".qweight")) for c in (before, after))
            assert isinstance(first, QTensor)
            assert isinstance(then, QTensor)
            assert torch.equal(first.codes, then.codes)
            assert torch.equal(first.zeros, then.zeros)
            assert first.format == then.format
            assert float((first.scales != then.scales).float().mean()) > 0.5
            assert then.scales.dtype == torch.float16
    meta = after.config["quantization_config"]["meta"]
    assert (meta["method"], meta["end_to_end"]) == ("rtn", "kl")


def test_reports_lie_beside_the_checkpoint(low: Path, tuned: tuple[Path, EndToEndReport]) -> None:
    out, report = tuned
    stored = json.loads((out / "finetune_report.json").read_text())
    assert stored["held_out"][0]["kl"] == report.first.kl
    assert [point["step"] for point in stored["held_out"]] == [0, *range(3, 25, 3)]
    assert stored["settings"]["objective"] == "kl"
    assert (out / "quantize_report.json").read_bytes() == (low / "quantize_report.json").read_bytes()
    assert "<h2>End to end</h2>" in (out / "quantize_report.html").read_text()
    assert not [f.name for f in out.iterdir() if "state" in f.name or "journal" in f.name or f.name.endswith(".new")]
    assert "divergence from the float model" in report.summary()


def test_the_engine_runs_it(tuned: tuple[Path, EndToEndReport], tiny: Path, unseen: Tensor) -> None:
    from dibit.engine import LLM

    ids = unseen[0, :20].tolist()
    with LLM(str(tuned[0]), head_bits=16, max_model_len=32) as llm:
        scores = llm.score(ids)
    with torch.no_grad():
        logits = loaded(tiny, open_checkpoint(tuned[0]))(torch.tensor([ids])).logits[0, :-1]
    expected = -F.cross_entropy(logits, torch.tensor(ids[1:]), reduction="none")
    # The engine rounds what goes into a low-bit product to 8 bits.
    assert float((torch.tensor(scores) - expected).abs().mean()) < 0.1


KILLED = """
import os, signal, sys
from pathlib import Path
import torch
torch.set_num_threads(1)
from dibit.quantize.end_to_end import EndToEnd
from dibit.quantize.finetune import train_end_to_end
low, out, text, save_every_s = sys.argv[1:]
def progress(done, total, note):
    if done == 5:
        os.kill(os.getpid(), signal.SIGKILL)
train_end_to_end(low, Path(out), settings=EndToEnd(steps=8, batch=3, held_out=0.25, scale_rate=1e-2, norm_rate=5e-3),
                 text=Path(text), samples=16, sequence_length=24, save_every_s=float(save_every_s), progress=progress)
"""


def timeless(report: EndToEndReport) -> EndToEndReport:
    return dataclasses.replace(report, seconds=0.0, tokens_per_s=0.0, matmul_share=0.0, out="")


@pytest.fixture(scope="module")
def whole(low: Path, text: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, EndToEndReport]:
    out = tmp_path_factory.mktemp("whole") / "out"
    return out, tune(low, out, text)


@pytest.mark.parametrize("save_every_s", ["0", "1000"])
def test_a_killed_run_continues_to_the_same_bytes(
    low: Path, text: Path, tmp_path: Path, whole: tuple[Path, EndToEndReport], save_every_s: str
) -> None:
    command = [sys.executable, "-c", KILLED, str(low), str(tmp_path / "out"), str(text), save_every_s]
    ended = subprocess.run(command, capture_output=True, text=True, check=False)
    assert ended.returncode == -signal.SIGKILL, ended.stderr
    assert not (tmp_path / "out").exists()
    heard: list[int] = []
    found = tune(low, tmp_path / "out", text, progress=lambda done, total, note: heard.append(done))
    assert 1 <= min(done for done in heard if done) <= 6
    assert timeless(found) == timeless(whole[1])
    names = sorted(os.listdir(whole[0]))
    assert sorted(os.listdir(tmp_path / "out")) == names
    for name in names:
        if name.endswith(".safetensors"):
            assert (tmp_path / "out" / name).read_bytes() == (whole[0] / name).read_bytes()


def test_other_settings_do_not_continue_a_run(low: Path, text: Path, tmp_path: Path) -> None:
    def stop(done: int, total: int, note: str) -> None:
        if done == 3:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        tune(low, tmp_path / "out", text, progress=stop)
    with pytest.raises(ConfigError, match="end_to_end"):
        tune(low, tmp_path / "out", text, settings=dataclasses.replace(SHORT, scale_rate=0.02))


def test_the_start_is_kept_where_nothing_is_gained(low: Path, text: Path, tmp_path: Path) -> None:
    wild = dataclasses.replace(SHORT, scale_rate=0.9, norm_rate=0.9, clip=1e6)
    report = tune(low, tmp_path / "out", text, settings=wild)
    assert report.best_step == 0
    assert "no gain" in report.summary()
    before, after = open_checkpoint(low), open_checkpoint(tmp_path / "out")
    for name in before.names():
        if not name.endswith(("qweight", "qzeros", "scales", "g_idx")):
            assert torch.equal(before.tensor(name), after.tensor(name))
        elif name.endswith("qweight"):
            first, then = (c.linear(name.removesuffix(".qweight")) for c in (before, after))
            assert isinstance(first, QTensor)
            assert isinstance(then, QTensor)
            assert torch.equal(first.scales, then.scales)


def test_cross_entropy_needs_no_float_model(low: Path, text: Path, tmp_path: Path) -> None:
    (low / "quantize_report.json").rename(low / "aside.json")
    try:
        with pytest.raises(ConfigError, match="--teacher"):
            tune(low, tmp_path / "out", text)
        alone = dataclasses.replace(SHORT, objective="ce", norm_rate=0.03)
        report = tune(low, tmp_path / "out", text, settings=alone)
    finally:
        (low / "aside.json").rename(low / "quantize_report.json")
    assert report.teacher is None
    assert report.first.kl is None
    assert report.best.nll < report.first.nll
    assert report.trained == sum(slot.stop - slot.start for slot in opened(low)[1].slots)


def test_norms_may_stay(low: Path, text: Path, tmp_path: Path) -> None:
    settings = dataclasses.replace(SHORT, steps=2, scale_rate=0.03, norm_rate=0.0)
    report = tune(low, tmp_path / "out", text, settings=settings)
    assert all(slot.scales for slot in opened(low, norms=False)[1].slots)
    assert report.best.loss < report.first.loss
    name = "model.layers.1.input_layernorm.weight"
    assert torch.equal(open_checkpoint(low).tensor(name), open_checkpoint(tmp_path / "out").tensor(name))


def test_steps_that_are_not_finite_are_left_out_then_it_fails(
    low: Path, text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    backward = LowBitModel.backward
    calls = 0

    def spoiled(self: LowBitModel, kept: list[Tensor], grad: Tensor) -> None:
        nonlocal calls
        calls += 1
        backward(self, kept, grad)
        if calls <= bad:
            self.grad[3] = math.inf

    monkeypatch.setattr(LowBitModel, "backward", spoiled)
    bad = 1
    report = tune(low, tmp_path / "one", text)
    assert (report.skipped, report.restarts) == (1, 0)
    assert "step 1 left out" in report.notes[0]
    calls, bad = 0, 4
    report = tune(low, tmp_path / "four", text)
    assert (report.skipped, report.restarts) == (4, 1)
    assert "half the rates" in caplog.text
    calls, bad = 0, 100
    with pytest.raises(TrainingFailure, match="not finite"):
        tune(low, tmp_path / "all", text)
    assert not (tmp_path / "all").exists()


@pytest.mark.parametrize(
    "wrong", [{"objective": "mse"}, {"scale_rate": 1.5}, {"clip": 0.0}, {"steps": 0}, {"held_out": 0.0}]
)
def test_settings_that_make_no_sense_are_refused(wrong: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match=next(iter(wrong))):
        EndToEnd(**wrong)


def test_what_cannot_be_trained_is_refused(tiny: Path, low: Path, text: Path, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="float model; quantize it first"):
        tune(tiny, tmp_path / "out", text)
    with pytest.raises(CheckpointError, match="is quantized itself"):
        tune(low, tmp_path / "out", text, teacher=str(low))
    with pytest.raises(ConfigError, match="--instructions"):
        tune(low, tmp_path / "out", text, instructions=text)
    with pytest.raises(ConfigError, match="model takes"):
        tune(low, tmp_path / "out", text, sequence_length=65)
    assert not (tmp_path / "out").exists()


def test_every_state_is_one_that_training_goes_on_from(low: Path, text: Path, tmp_path: Path) -> None:
    """A state saved after every step, then the files that hold none."""
    seen: list[list[str]] = []

    def look(done: int, total: int, note: str) -> None:
        folder = tmp_path / "out.partial"
        seen.append(sorted(path.name for path in folder.iterdir() if "end_to_end" in path.name))

    tune(low, tmp_path / "out", text, save_every_s=0.0, progress=look)
    assert [len(names) for names in seen if names] == [2] * sum(1 for names in seen if names)
