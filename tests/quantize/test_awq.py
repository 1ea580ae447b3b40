"""AWQ: never worse than rounding on what it looks at, much better with loud channels, and an ordinary checkpoint."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from random_blocks import KEYS, random_block, run, sizes
from tiny_models import Paged
from torch import Tensor

from dibit.engine.checkpoint import open_checkpoint
from dibit.engine.config import EngineConfig
from dibit.engine.errors import ConfigError
from dibit.engine.loader import load_decoder
from dibit.engine.models.decoder import Block, FloatLinear
from dibit.engine.models.spec import LinearSite, Part
from dibit.kernels.formats import Format, dequantize
from dibit.quantize import quantize_checkpoint
from dibit.quantize.block import BlockJob
from dibit.quantize.budget import Budget
from dibit.quantize.fold import copied
from dibit.quantize.methods.awq import AWQ, clip_rows
from dibit.quantize.methods.rtn import RTN
from dibit.quantize.plan import Plan
from dibit.quantize.stats import Stats
from dibit.quantize.streams import HiddenStates, StreamConfig

INT3 = Format(3, 16)


def site(block: Block, key: str) -> LinearSite:
    own = block.sizes
    widths = {
        "qkv": (own.q_width, own.kv_width, own.kv_width),
        "o": (own.hidden,),
        "gate_up": (own.intermediate, own.intermediate),
        "down": (own.hidden,),
    }[key]
    linear: Any = block.linears[key]
    k = linear.weight.shape[1]
    parts = tuple(Part(f"{key}{i}", n) for i, n in enumerate(widths))
    return LinearSite(f"layers.0.{key}", parts, sum(widths), k, "x", bias=True)


def with_weights(block: Block, weights: dict[str, Tensor]) -> Block:
    linears: dict[str, Any] = {key: FloatLinear(w, block.linears[key].bias) for key, w in weights.items()}  # type: ignore[attr-defined]
    return Block(block.sizes, linears=linears, attn_norm=block.attn_norm, mlp_norm=block.mlp_norm)


def rounded_to_nearest(block: Block, low: Format) -> Block:
    weights: dict[str, Tensor] = {}
    for key in KEYS:
        linear: Any = block.linears[key]
        weights[key] = dequantize(RTN().quantize(linear.weight, low, Stats()))
    return with_weights(block, weights)


def loud(block: Block) -> Tensor:
    """Hidden states whose norm brings out a few channels, as real models have them."""
    block.attn_norm[::11] *= 20
    block.mlp_norm[::13] *= 20
    return torch.randn(4, 24, block.sizes.hidden, generator=torch.Generator().manual_seed(3))


def test_clipping_never_raises_the_error_of_a_group() -> None:
    rng = torch.Generator().manual_seed(5)
    w = torch.randn(24, 64, generator=rng)
    w[torch.rand(w.shape, generator=rng) < 0.03] *= 6
    x = torch.randn(200, 64, generator=rng) * torch.linspace(0.1, 3, 64)
    for low in (Format(2, 16), Format(3, 32), Format(4, -1)):
        plain = dequantize(low.encode(w, *low.ranges(w))) - w
        clipped = clip_rows(w, x, low, symmetric=False)
        found = dequantize(low.encode(w, *low.ranges(clipped))) - w
        width = low.columns_per_group(64)
        for start in range(0, 64, width):
            columns = slice(start, start + width)
            before = (x[:, columns] @ plain[:, columns].T).square().sum(0)
            after = (x[:, columns] @ found[:, columns].T).square().sum(0)
            assert bool((after <= before * (1 + 1e-4)).all())
        assert float((x @ found.T).square().mean()) < float((x @ plain.T).square().mean())


def job(block: Block, x: Tensor, low: Format, directory: Path) -> BlockJob:
    listed = tuple(site(block, key) for key in KEYS)
    stream = HiddenStates(*x.shape, config=StreamConfig(), directory=directory)
    stream.write(0, x)
    cos, sin = block.sizes.rope.tables(x.shape[1])
    return BlockJob(
        layer=0,
        block=block,
        sites=listed,
        formats={own.name: low for own in listed},
        quantized=stream,
        float_stream=None,
        cos=cos,
        sin=sin,
        batch=2,
        seed=0,
    )


@pytest.mark.parametrize("heads", [(6, 2), (4, 4)], ids=str)
def test_scaling_alone_changes_nothing_before_rounding(tmp_path: Path, heads: tuple[int, int]) -> None:
    block = random_block(sizes(*heads))
    x = loud(block)
    scaled = copied(block)
    AWQ().scale(job(block, x, INT3, tmp_path), scaled, x, torch.float32)
    assert not torch.equal(scaled.attn_norm, block.attn_norm)
    error = float((run(scaled, x) - run(block, x)).norm() / run(block, x).norm())
    assert error < 1e-5


@pytest.mark.parametrize("bits", [3, 4])
@pytest.mark.parametrize("clip", [False, True])
def test_loud_channels_are_served_better_than_by_rounding(tmp_path: Path, bits: int, *, clip: bool) -> None:
    block = random_block(sizes(6, 2))
    x = loud(block)
    low = Format(bits, 16)
    method = AWQ(clip=clip)
    scaled = copied(block)
    given = job(block, x, low, tmp_path)
    method.scale(given, scaled, x, torch.float32)
    found = method.rounded(given, scaled, x)
    awq = with_weights(scaled, {key: dequantize(found[f"layers.0.{key}"]) for key in KEYS})
    reference = run(block, x)
    plain = float((run(rounded_to_nearest(block, low), x) - reference).square().mean())
    # Other hidden states like those that were looked at do as well.
    unseen = torch.randn(x.shape, generator=torch.Generator().manual_seed(4))
    expected = run(block, unseen)
    assert float((run(awq, x) - reference).square().mean()) < 0.8 * plain
    plain = float((run(rounded_to_nearest(block, low), unseen) - expected).square().mean())
    assert float((run(awq, unseen) - expected).square().mean()) < 0.9 * plain


def test_one_ratio_without_clipping_is_rounding_to_nearest(tmp_path: Path) -> None:
    block = random_block(sizes(6, 2))
    x = loud(block)
    method, scaled = AWQ(ratios=1, clip=False), copied(block)
    given = job(block, x, INT3, tmp_path)
    method.scale(given, scaled, x, torch.float32)
    found = method.rounded(given, scaled, x)
    for key in KEYS:
        linear: Any = block.linears[key]
        expected = RTN().quantize(linear.weight, INT3, Stats())
        assert torch.equal(found[f"layers.0.{key}"].codes, expected.codes)
        assert torch.equal(found[f"layers.0.{key}"].scales, expected.scales)


def test_a_checkpoint_with_folded_scales_is_closer_to_the_model(
    tiny: Path, text: Path, unseen: Tensor, tmp_path: Path
) -> None:
    """Norms, biases and rows that the scales went into are written, and an interrupted run continues with them."""
    calibration: dict[str, Any] = {"calibration": text, "samples": 24, "sequence_length": 40}
    settings: dict[str, Any] = {"bits": 3, "group_size": 16}
    quantize_checkpoint(str(tiny), tmp_path / "rtn", **settings)
    report = quantize_checkpoint(str(tiny), tmp_path / "awq", method="awq", **settings, **calibration)
    assert {own.method for own in report.sites} == {"awq"}
    assert all(0 < own.weight_error < 0.1 for own in report.sites)
    source, found = open_checkpoint(tiny), open_checkpoint(tmp_path / "awq")
    shared = [name for name in source.names() if found.has(name)]
    changed = [name for name in shared if not torch.equal(source.tensor(name), found.tensor(name))]
    source.close()
    found.close()
    kinds = {name.split(".", 3)[3] for name in changed}
    assert kinds >= {"input_layernorm.weight", "post_attention_layernorm.weight", "self_attn.v_proj.bias"}
    assert divergence(tiny, tmp_path / "awq", unseen) < 0.95 * divergence(tiny, tmp_path / "rtn", unseen)

    def stop(done: int, total: int, note: str) -> None:
        if done == 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        quantize_checkpoint(str(tiny), tmp_path / "again", method="awq", progress=stop, **settings, **calibration)
    report = quantize_checkpoint(str(tiny), tmp_path / "again", method="awq", **settings, **calibration)
    assert report.resumed_blocks == 2
    assert (tmp_path / "again/model.safetensors").read_bytes() == (tmp_path / "awq/model.safetensors").read_bytes()


@pytest.mark.parametrize("symmetric", [False, True])
def test_widths_by_block_and_groups_as_long_as_rows(
    tiny: Path, text: Path, unseen: Tensor, tmp_path: Path, *, symmetric: bool
) -> None:
    calibration: dict[str, Any] = {"calibration": text, "samples": 24, "sequence_length": 40}
    budget = Budget(mean_bits=3.4, choices=(3, 4), importance="lim", samples=4)
    settings: dict[str, Any] = {"group_size": -1, "symmetric": symmetric, **calibration}
    report = quantize_checkpoint(
        str(tiny), tmp_path / "awq", method="awq", plan=budget, save_plan=tmp_path / "plan", **settings
    )
    assert sorted({own.format for own in report.sites}) == ["int3-channel", "int4-channel"]
    found = open_checkpoint(tmp_path / "awq")
    assert found.quantization is not None
    assert found.quantization.symmetric == symmetric
    found.close()
    quantize_checkpoint(
        str(tiny), tmp_path / "rtn", plan=Plan.from_json((tmp_path / "plan").read_text()), symmetric=symmetric
    )
    assert divergence(tiny, tmp_path / "awq", unseen) < divergence(tiny, tmp_path / "rtn", unseen)


def divergence(model: Path, low: Path, tokens: Tensor) -> float:
    """Mean KL of the served predictions of the checkpoint `low` from those of the float model."""
    logits = []
    for path in (model, low):
        checkpoint = open_checkpoint(path)
        paged = Paged(load_decoder(checkpoint, config=EngineConfig(backend="reference", head_bits=16)), block_size=16)
        logits.append(torch.cat([paged.logits((paged.request(row), 0, len(row))) for row in tokens.tolist()]))
        checkpoint.close()
    reference, found = (F.log_softmax(own.double(), -1) for own in logits)
    return float((reference.exp() * (reference - found)).sum(-1).mean())


@pytest.mark.parametrize(
    ("options", "message"), [({"ratios": 0}, "ratios is 0"), ({"search_tokens": 0}, "search_tokens is 0")]
)
def test_options_out_of_range(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        AWQ(**options)
