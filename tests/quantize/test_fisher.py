"""Gradients block by block: against transformers and autograd over the whole model; what is made of them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import LlamaForCausalLM

from dibit.engine.checkpoint import open_checkpoint
from dibit.engine.errors import CheckpointError
from dibit.engine.models import resolve_arch
from dibit.engine.models.spec import LinearSite
from dibit.kernels.formats import Format, dequantize
from dibit.quantize import quantize_checkpoint
from dibit.quantize.fisher import (
    FISHER_NAME,
    Damage,
    StoredWeights,
    TokenWeights,
    stored_token_weights,
    visit_gradients,
)
from dibit.quantize.grid import search_grid
from dibit.quantize.importance import Model, Text
from dibit.quantize.methods.gptq import GPTQ
from dibit.quantize.streams import StreamConfig

LINEARS = ("self_attn.q_proj", "self_attn.v_proj", "self_attn.o_proj", "mlp.up_proj", "mlp.down_proj")


def model_of(tiny: Path) -> Model:
    checkpoint = open_checkpoint(tiny)
    return Model(checkpoint, *resolve_arch(checkpoint.config))


class Recorded:
    def __init__(self) -> None:
        self.gradients: dict[str, list[Tensor]] = {}

    def block(self, layer: int, sites: Sequence[LinearSite], weights: Mapping[str, Tensor]) -> None:
        assert [site.name for site in sites] == list(weights)

    def site(self, site: LinearSite, start: int, x: Tensor, gradient: Tensor) -> None:
        assert x.shape[-1] == site.k
        for part, own in zip(site.parts, torch.split(gradient, [p.n for p in site.parts], dim=-1), strict=True):
            found = self.gradients.setdefault(part.module, [])
            assert len(found) == start
            found.append(own[0])

    def output(self, layer: int, start: int, gradient: Tensor) -> None:
        self.gradients.setdefault(f"layers.{layer}", []).append(gradient[0])


def expected_gradients(tiny: Path, tokens: Tensor, seed: int) -> dict[str, Tensor]:
    """By autograd through the whole of transformers' model, with the same draws."""
    reference: Any = LlamaForCausalLM.from_pretrained(tiny, dtype=torch.float32).eval()
    outputs: dict[str, Tensor] = {}

    def keep(name: str) -> Any:
        def hook(_: Any, args: Any, output: Any) -> None:
            output = output[0] if isinstance(output, tuple) else output
            output.retain_grad()
            outputs[name] = output

        return hook

    for layer in range(3):
        reference.get_submodule(f"model.layers.{layer}").register_forward_hook(keep(f"layers.{layer}"))
        for name in LINEARS:
            module = f"model.layers.{layer}.{name}"
            reference.get_submodule(module).register_forward_hook(keep(module))
    logits = reference(tokens).logits
    draws = torch.Generator().manual_seed(seed)
    drawn = torch.stack(
        [torch.multinomial(own.softmax(dim=-1), 1, generator=draws)[:, 0] for own in logits.detach().unbind()]
    )
    F.cross_entropy(logits.flatten(0, 1), drawn.flatten(), reduction="sum").backward()
    return {name: output.grad for name, output in outputs.items()}  # type: ignore[misc]


def test_gradients_are_those_of_the_whole_model(tiny: Path, unseen: Tensor, tmp_path: Path) -> None:
    for memory_bytes in (1 << 30, 0):
        found = Recorded()
        text = Text(unseen, StreamConfig(memory_bytes=memory_bytes), tmp_path)
        visit_gradients(model_of(tiny), text, found, seed=5)
        for name, expected in expected_gradients(tiny, unseen, 5).items():
            torch.testing.assert_close(torch.stack(found.gradients[name]), expected, rtol=1e-3, atol=1e-5)


def test_the_damage_is_the_divergence(tiny: Path, unseen: Tensor, tmp_path: Path) -> None:
    """For small changes: rounding one site to 4 bits, against the divergence of the changed model."""
    model, low = model_of(tiny), Format(4, 16)
    reference: Any = LlamaForCausalLM.from_pretrained(tiny, dtype=torch.float32).eval()
    for module, site in (
        ("model.layers.0.mlp.down_proj", "layers.0.down"),
        ("model.layers.2.self_attn.o_proj", "layers.2.o"),
    ):
        estimates = []
        for seed in range(6):
            damage = Damage([low], unseen.numel(), symmetric=False)
            visit_gradients(model, Text(unseen, StreamConfig(), tmp_path), damage, seed=seed)
            estimates.append(damage.found[4][site])
        changed: Any = LlamaForCausalLM.from_pretrained(tiny, dtype=torch.float32).eval()
        with torch.no_grad():
            w = changed.get_submodule(module).weight
            w.copy_(dequantize(low.encode(w, *search_grid(w, low))))
            before, after = (F.log_softmax(m(unseen).logits, dim=-1) for m in (reference, changed))
            divergence = float(F.kl_div(after, before, reduction="sum", log_target=True)) / unseen.numel()
        assert sum(estimates) / len(estimates) == pytest.approx(divergence, rel=0.35)


def test_fewer_bits_do_more_damage(tiny: Path, unseen: Tensor, tmp_path: Path) -> None:
    damage = Damage([Format(2, 16), Format(3, 16), Format(4, 16)], unseen.numel(), symmetric=False)
    visit_gradients(model_of(tiny), Text(unseen, StreamConfig(), tmp_path), damage, seed=0)
    assert len(damage.found[2]) == 12
    for site, worst in damage.found[2].items():
        assert worst > 2 * damage.found[3][site] > 4 * damage.found[4][site] > 0


def test_weights_are_kept_and_read_back(tiny: Path, unseen: Tensor, tmp_path: Path) -> None:
    model, text, path = model_of(tiny), Text(unseen, StreamConfig(), tmp_path), tmp_path / FISHER_NAME
    stored = stored_token_weights(path, model, text, seed=0)
    exact = TokenWeights(*unseen.shape)
    visit_gradients(model, text, exact, seed=0)
    written, seen = path.stat().st_mtime_ns, []
    stored = stored_token_weights(path, model, text, seed=0, tell=seen.append)
    assert path.stat().st_mtime_ns == written
    assert not seen, "the pass was made again"
    found = stored.of_block(1, model.sites(1))
    assert set(found) == {"layers.1", *(part.module for site in model.sites(1) for part in site.parts)}
    for name, own in found.items():
        assert own.shape == unseen.shape
        assert float(own.mean()) == pytest.approx(1.0, abs=1e-4)
        assert float(own.min()) >= 0.5
        raw = exact.found[name].flatten()
        order = raw.argsort()[: raw.numel() // 2]
        assert bool((own.flatten()[order].diff() >= -1e-6).all())


def test_gradients_that_are_not_finite_are_named(tmp_path: Path) -> None:
    from safetensors.torch import save_file

    save_file({"layers.0": torch.tensor([[1.0, float("nan")]])}, str(tmp_path / FISHER_NAME))
    with pytest.raises(CheckpointError, match=r"gradients at layers\.0 are not finite"):
        StoredWeights(tmp_path / FISHER_NAME).of_block(0, ())


def test_a_run_with_token_weights(tiny: Path, text: Path, tmp_path: Path) -> None:
    """It is continued without another pass, and leaves no scratch behind."""
    options: dict[str, Any] = {
        "method": GPTQ(fisher=True, asymmetric=True),
        "bits": 2,
        "group_size": 16,
        "calibration": text,
        "samples": 12,
        "sequence_length": 40,
    }
    notes: list[str] = []
    whole = quantize_checkpoint(str(tiny), tmp_path / "whole", **options)
    assert not whole.fallbacks
    assert all(site.output_error is not None for site in whole.sites)

    def stop(done: int, total: int, note: str) -> None:
        if done == 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        quantize_checkpoint(str(tiny), tmp_path / "out", progress=stop, **options)
    quantize_checkpoint(str(tiny), tmp_path / "out", progress=lambda *seen: notes.append(seen[2]), **options)
    assert not any("gradients" in note for note in notes)
    assert not (tmp_path / "out" / FISHER_NAME).exists()
    names = sorted(path.name for path in (tmp_path / "out").glob("*.safetensors"))
    assert names == sorted(path.name for path in (tmp_path / "whole").glob("*.safetensors"))
    for name in names:
        assert (tmp_path / "out" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()
    plain = quantize_checkpoint(str(tiny), tmp_path / "plain", **{**options, "method": GPTQ(asymmetric=True)})
    assert [site.weight_mse for site in plain.sites] != [site.weight_mse for site in whole.sites]
