"""compressed-tensors: both 3-bit layouts, both ways bit for bit; groups, targets and what is refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from checkpoint_files import MODULE, random_qtensor, rounded_weight, same_weight, write_model
from hypothesis import given, settings
from hypothesis import strategies as st
from packed_by_hand import compressed_tensors_parts as by_hand

from dibit.engine.checkpoint import open_checkpoint
from dibit.engine.checkpoint.compressed_tensors import CompressedTensorsPacking, parse_compressed_tensors
from dibit.engine.checkpoint.compressed_tensors_config import compressed_tensors_config
from dibit.engine.checkpoint.packing import CannotHold
from dibit.engine.checkpoint.progress import PackedModule
from dibit.engine.errors import CheckpointError
from dibit.kernels.formats import BITS, Format, QTensor

CT = CompressedTensorsPacking()
I32 = torch.int32


def group(format: Format, *, symmetric: bool = False, targets: tuple[str, ...] = ("Linear",), **more: Any) -> Any:
    weights = {
        "num_bits": format.bits,
        "type": "int",
        "symmetric": symmetric,
        "strategy": "channel" if format.group_size == -1 else "group",
        "group_size": None if format.group_size == -1 else format.group_size,
        "dynamic": False,
        "actorder": None,
        "observer": "minmax",
    }
    return {"targets": list(targets), "weights": weights | more, "input_activations": None}


def config(*groups: Any, **more: Any) -> dict[str, Any]:
    return {
        "quant_method": "compressed-tensors",
        "format": "pack-quantized",
        "quantization_status": "compressed",
        "ignore": ["lm_head"],
        "kv_cache_scheme": None,
        "config_groups": {f"group_{i}": one for i, one in enumerate(groups)},
    } | more


def write_ct(folder: Path, tensors: dict[str, torch.Tensor], quantization: dict[str, Any]) -> Path:
    named = {f"{MODULE}.{part}": tensor for part, tensor in tensors.items()}
    return write_model(folder, named, quantization_config=quantization)


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("group_size", [-1, 16])
@pytest.mark.parametrize(("n", "k"), [(5, 48), (33, 80), (10, 112), (64, 64)])
@pytest.mark.parametrize("padded", [True, False])
def test_both_layouts_are_read(tmp_path: Path, *, bits: int, group_size: int, n: int, k: int, padded: bool) -> None:
    """48 and 80 inputs fill as many words in the one 3-bit layout as in the other."""
    q = random_qtensor(n, k, Format(bits, group_size))
    tensors = by_hand(q, padded=padded)
    checkpoint = open_checkpoint(write_ct(tmp_path, tensors, config(group(q.format))))
    assert same_weight(checkpoint.linear(MODULE), q)
    assert checkpoint.packed()[MODULE].shape == (n, k)
    assert checkpoint.zero_decision() is None
    if not padded:
        written = CT.pack(q, module=MODULE)
        assert all(torch.equal(written[part], tensor) for part, tensor in tensors.items())


@given(
    bits=st.sampled_from(BITS),
    group_size=st.sampled_from([-1, 16, 32]),
    n=st.integers(1, 70),
    k=st.integers(1, 5),
    symmetric=st.booleans(),
    seed=st.integers(0, 1000),
)
def test_round_trip(*, bits: int, group_size: int, n: int, k: int, symmetric: bool, seed: int) -> None:
    torch.manual_seed(seed)
    q = random_qtensor(n, 32 * k, Format(bits, group_size))
    if symmetric:
        q.zeros.fill_(1 << (bits - 1))
    packed = CT.pack(q, module=MODULE)
    assert not (symmetric and "weight_zero_point" in packed)
    assert same_weight(CT.unpack(packed, q.format, zeros="v2", module=MODULE, source="here"), q)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float16])
def test_a_symmetric_weight_has_no_zero_points(tmp_path: Path, dtype: torch.dtype) -> None:
    q = rounded_weight(24, 96, Format(3, 32), symmetric=True)
    tensors = by_hand(q, padded=False, symmetric=True) | {"weight_scale": q.scales.to(dtype)}
    checkpoint = open_checkpoint(write_ct(tmp_path, tensors, config(group(q.format, symmetric=True))))
    read = checkpoint.linear(MODULE)
    assert isinstance(read, QTensor)
    assert torch.equal(read.codes, q.codes)
    assert bool((read.zeros == 4).all())
    assert torch.equal(read.scales.float(), q.scales.to(dtype).float())
    assert checkpoint.quantization is not None
    assert checkpoint.quantization.symmetric


def test_zero_points_of_whole_bytes(tmp_path: Path) -> None:
    """The first versions did not pack them."""
    q = random_qtensor(24, 96, Format(4, 32))
    tensors = by_hand(q, padded=False) | {"weight_zero_point": (q.zeros.to(torch.int16) - 8).to(torch.int8)}
    assert same_weight(open_checkpoint(write_ct(tmp_path, tensors, config(group(q.format)))).linear(MODULE), q)


def test_the_older_key_of_the_config(tmp_path: Path) -> None:
    q = random_qtensor(24, 96, Format(4, 32))
    named = {f"{MODULE}.{part}": tensor for part, tensor in by_hand(q, padded=True).items()}
    folder = write_model(tmp_path, named, compression_config=config(group(q.format)))
    assert same_weight(open_checkpoint(folder).linear(MODULE), q)


def test_act_order_is_refused_and_its_trivial_case_is_not(tmp_path: Path) -> None:
    q = random_qtensor(24, 96, Format(4, 32))
    quantization = config(group(q.format, actorder="group"))
    plain = torch.arange(96, dtype=I32) // 32
    trivial = by_hand(q, padded=False) | {"weight_g_idx": plain}
    assert same_weight(open_checkpoint(write_ct(tmp_path / "a", trivial, quantization)).linear(MODULE), q)
    with pytest.raises(CheckpointError, match="act-order"):
        open_checkpoint(write_ct(tmp_path / "b", trivial | {"weight_g_idx": plain.flip(0)}, quantization))


def test_the_most_specific_target_holds() -> None:
    quantization = parse_compressed_tensors(
        config(
            group(Format(4, 64)),
            group(Format(2, 32), targets=("re:.*down_proj", "re:.*layers.1.*"), symmetric=True),
            group(Format(8, -1), targets=("model.layers.0.mlp.down_proj",)),
            ignore=["lm_head", "re:.*layers.2.*"],
        ),
        "config.json",
    )
    expected = {
        "model.layers.0.mlp.up_proj": Format(4, 64),
        "model.layers.0.mlp.down_proj": Format(8, -1),
        "model.layers.1.mlp.up_proj": Format(2, 32),
        "model.layers.2.mlp.down_proj": None,
        "lm_head": None,
    }
    assert {module: quantization.format_of(module) for module in expected} == expected
    assert quantization.symmetric_of("model.layers.1.mlp.up_proj")
    assert not quantization.symmetric_of("model.layers.0.mlp.up_proj")


def test_without_a_class_what_is_not_named_is_float() -> None:
    quantization = parse_compressed_tensors(config(group(Format(4, 64), targets=("re:.*up_proj",))), "config.json")
    assert quantization.format_of("model.layers.0.mlp.up_proj") == Format(4, 64)
    assert quantization.format_of("model.layers.0.mlp.down_proj") is None


G = group(Format(4, 32))
UNSUPPORTED: dict[str, tuple[dict[str, Any], str]] = {
    "float8": (config(G, format="float-quantized"), "format 'float-quantized'; supported: pack-quantized"),
    "naive": (config(G, format="int-quantized"), "format 'int-quantized'"),
    "group-format": (config(G | {"format": "nvfp4-pack-quantized"}), "group_0.*nvfp4"),
    "no-format": (config(G, format=None), "format None"),
    "activations": (config(G | {"input_activations": {"num_bits": 8}}), "input_activations: only weights"),
    "kv-cache": (config(G, kv_cache_scheme={"num_bits": 8}), "kv_cache_scheme"),
    "transforms": (config(G, transform_config={"config_groups": {"u": {}}}), "transform_config"),
    "sparsity": (config(G, sparsity_config={"format": "sparse-24-bitmask"}), "sparsity_config"),
    "no-groups": (config(), "no config_groups"),
    "preset": (config(["Linear"]), "spelled out"),
    "no-weights": (config({"targets": ["Linear"], "weights": None}), "weights None"),
    "no-targets": (config(G | {"targets": []}), "without targets"),
    "float": (config(group(Format(4, 32), type="float")), "type 'float'; supported: int"),
    "tensor": (config(group(Format(4, 32), strategy="tensor")), "strategy 'tensor'; supported: group, channel"),
    "dynamic": (config(group(Format(4, 32), dynamic=True)), "dynamic True"),
    "5-bit": (config(group(Format(4, 32), num_bits=5)), "supported: 2, 3, 4, 8"),
    "group-size": (config(group(Format(4, 32), group_size=256)), "group size 256; supported"),
    "regex": (config(group(Format(4, 32), targets=("re:(",))), "no regular expression"),
    "long": (config(group(Format(4, 32), targets=("re:" + "a" * 2000,))), "at most"),
    "ignored": (config(G, ignore=["re:.*self_attn.*"]), "declares it float"),
    "other-bits": (config(group(Format(8, 32))), "would have the shape"),
    "other-group": (config(group(Format(4, 16))), r"weight_scale would have the shape \[24, 6\]"),
}


@pytest.mark.parametrize("case", UNSUPPORTED)
def test_a_config_that_is_not_supported(tmp_path: Path, case: str) -> None:
    quantization, message = UNSUPPORTED[case]
    tensors = by_hand(random_qtensor(24, 96, Format(4, 32)), padded=False)
    with pytest.raises(CheckpointError, match=message):
        open_checkpoint(write_ct(tmp_path, tensors, quantization))


@pytest.mark.parametrize(
    ("part", "tensor", "message"),
    [
        ("weight_zero_point", None, "has no weight_zero_point"),
        ("weight_shape", None, "has no weight_shape"),
        ("weight_shape", torch.tensor([24, 0]), "does not belong"),
        ("weight_shape", torch.tensor([25, 96]), "does not belong"),
        ("weight_shape", torch.tensor([24, 96, 1]), "expected two numbers"),
        ("weight_shape", torch.tensor([24, 128]), r"weight_packed would have the shape \[24, 16\]"),
        ("weight_packed", torch.zeros(24, 12), "weight_packed of F32"),
        ("weight_zero_point", torch.zeros(4, 3, dtype=I32), r"weight_zero_point would have the shape \[3, 3\]"),
        ("weight_scale", torch.zeros(24, 3, dtype=I32), "weight_scale of I32"),
        ("weight_scale", torch.full((24, 3), float("nan")), "not finite"),
    ],
)
def test_broken_tensors(tmp_path: Path, part: str, tensor: torch.Tensor | None, message: str) -> None:
    tensors = by_hand(random_qtensor(24, 96, Format(4, 32)), padded=False) | {part: tensor}
    kept = {name: t for name, t in tensors.items() if t is not None}
    with pytest.raises(CheckpointError, match=message):
        open_checkpoint(write_ct(tmp_path, kept, config(G))).linear(MODULE)


def test_the_tensors_must_be_those_of_the_declared_method(tmp_path: Path) -> None:
    folder = write_ct(tmp_path, {"qweight": torch.ones(4, 4, dtype=I32)}, config(G))
    with pytest.raises(CheckpointError, match=r"called weight_packed, but has .*q_proj.qweight"):
        open_checkpoint(folder)


def test_a_fractional_grid_cannot_be_held() -> None:
    q = random_qtensor(16, 32, Format(2, 32, zero_grid="fractional"))
    with pytest.raises(CannotHold, match="whole zero points"):
        CT.pack(q, module=MODULE)


LINEARS = ("self_attn.q_proj", "self_attn.k_proj", "mlp.up_proj", "mlp.down_proj")
MODULES = [f"model.layers.{layer}.{name}" for layer in range(12) for name in LINEARS]
KINDS = st.sampled_from([Format(2, 64), Format(3, 64), Format(4, 64), Format(4, -1), Format(8, 32), None])


@settings(max_examples=30)
@given(st.lists(st.tuples(KINDS, st.booleans()), min_size=len(MODULES), max_size=len(MODULES)))
def test_mixed_formats_come_back(kinds: list[tuple[Format | None, bool]]) -> None:
    chosen = dict(zip(MODULES, kinds, strict=True))
    packed = {m: PackedModule(f.bits, f.group_size, symmetric) for m, (f, symmetric) in chosen.items() if f}
    if not packed:
        return
    names = [f"{m}.{'weight_packed' if form else 'weight'}" for m, (form, _) in chosen.items()]
    written = compressed_tensors_config(packed, names, method="rtn", facts={})
    read = parse_compressed_tensors(written, "config.json")
    for module, (form, symmetric) in chosen.items():
        assert read.format_of(module) == form, module
        if form is not None:
            assert read.symmetric_of(module) == symmetric, module
    assert read.format_of("lm_head") is None
