"""The correction for inputs that are not those of the float model: its algebra, its share, and what it is worth."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import LlamaForCausalLM

from dibit.engine.checkpoint import open_checkpoint
from dibit.kernels.formats import Format, QTensor, dequantize
from dibit.quantize import quantize_checkpoint
from dibit.quantize.asymmetric import corrected
from dibit.quantize.methods.gptq import GPTQ
from dibit.quantize.stats import HessianSum, SiteFailure, Stats


def moments(x: Tensor, y: Tensor, held_out: Stats | None = None) -> Stats:
    """Of inputs x behind quantized blocks and y in the float model."""
    hessian, cross = HessianSum(x.shape[1]), HessianSum(x.shape[1])
    hessian.add(x)
    cross.add(x, y)
    return Stats(hessian.tokens, hessian.mean, cross.mean, held_out)


def streams(tokens: int, *, seed: int, noise: float) -> tuple[Tensor, Tensor]:
    """Float inputs, and those with a systematic error and `noise` that nothing can undo."""
    g = torch.Generator().manual_seed(seed)
    mixing = torch.randn(32, 32, generator=torch.Generator().manual_seed(0)) * 0.05
    y = torch.randn(tokens, 32, generator=g)
    return y + y @ mixing + torch.randn(tokens, 32, generator=g) * noise, y


def test_a_systematic_error_is_undone() -> None:
    (x, y), (seen_x, seen_y) = streams(4000, seed=1, noise=0.01), streams(500, seed=2, noise=0.01)
    w = torch.randn(8, 32, generator=torch.Generator().manual_seed(3))
    found, share = corrected(w, moments(x, y, moments(seen_x, seen_y)))
    assert share > 0.95
    assert float((seen_x @ found.T - seen_y @ w.T).norm()) < 0.3 * float((seen_x @ w.T - seen_y @ w.T).norm())


def test_the_share_is_the_best_on_held_out_text() -> None:
    """Against a search over shares, with so little text that the full correction overfits."""
    (x, y), (seen_x, seen_y) = streams(40, seed=4, noise=0.5), streams(2000, seed=5, noise=0.5)
    w = torch.randn(8, 32, generator=torch.Generator().manual_seed(6))
    _, share = corrected(w, moments(x, y, moments(seen_x, seen_y)))
    assert 0.05 < share < 0.95
    # What the correction is before the held-out text joins in: with none of it the share does not matter.
    full = w + (corrected(w, moments(x, y, moments(x, y)))[0] - w)

    def loss(part: float) -> float:
        return float((seen_x @ (w + part * (full - w)).T - seen_y @ w.T).square().sum())

    tried = {part / 100: loss(part / 100) for part in range(101)}
    assert min(tried, key=lambda part: tried[part]) == pytest.approx(share, abs=0.02)


def test_without_any_error_nothing_is_corrected() -> None:
    y = torch.randn(300, 32, generator=torch.Generator().manual_seed(7))
    w = torch.randn(8, 32, generator=torch.Generator().manual_seed(8))
    found, _ = corrected(w, moments(y, y, moments(y[:50], y[:50])))
    torch.testing.assert_close(found, w, rtol=0.0, atol=1e-6)


def test_missing_statistics_fail_the_site() -> None:
    with pytest.raises(SiteFailure, match="both streams"):
        GPTQ(asymmetric=True).quantize(torch.randn(4, 32), Format(2, 32), Stats(1, torch.eye(32).double()))


def test_needs_follow_the_option() -> None:
    assert GPTQ().needs == {"hessian"}
    assert GPTQ(asymmetric=True).needs == {"hessian", "cross"}
    assert GPTQ(relative=True).needs == {"hessian", "relative"}


@torch.no_grad()
def test_the_model_comes_out_closer(tiny: Path, text: Path, unseen: Tensor, tmp_path: Path) -> None:
    reference = LlamaForCausalLM.from_pretrained(tiny, dtype=torch.float32).eval()
    expected = F.log_softmax(reference(unseen).logits, dim=-1)
    found = {}
    for asymmetric in (False, True):
        out = tmp_path / str(asymmetric)
        options = {"bits": 2, "group_size": 16, "calibration": text, "samples": 24, "sequence_length": 48}
        report = quantize_checkpoint(str(tiny), out, method=GPTQ(asymmetric=asymmetric), **options)  # type: ignore[arg-type]
        assert not report.fallbacks
        model = LlamaForCausalLM.from_pretrained(tiny, dtype=torch.float32).eval()
        checkpoint = open_checkpoint(out)
        for name, module in model.named_modules():
            if name.endswith("_proj"):
                linear = checkpoint.linear(name)
                assert isinstance(linear, QTensor)
                module.weight.copy_(dequantize(linear))
        checkpoint.close()
        divergence = F.kl_div(F.log_softmax(model(unseen).logits, dim=-1), expected, reduction="sum", log_target=True)
        found[asymmetric] = float(divergence)
    assert found[True] < 0.97 * found[False]
