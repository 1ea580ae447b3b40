"""GPTQ packing: bytes fixed by hand per width and version, and the way back, bit for bit."""

from __future__ import annotations

import pytest
import torch
from checkpoint_files import random_qtensor, rounded_weight
from hypothesis import given
from hypothesis import strategies as st

from dibit.engine.checkpoint.checkpoint import Quantization, ZeroConvention
from dibit.engine.checkpoint.gptq import GptqPacking, GptqTensors, from_gptq, to_gptq
from dibit.engine.checkpoint.packing import Sample
from dibit.engine.checkpoint.zero_convention import decide_zeros
from dibit.engine.errors import CheckpointError
from dibit.kernels.formats import BITS, Format, QTensor


def words(*values: int) -> torch.Tensor:
    """Column of int32 words from their unsigned values."""
    return torch.tensor([v - (1 << 32) if v >> 31 else v for v in values], dtype=torch.int32)


def ramp(bits: int, z: int) -> QTensor:
    """Codes 0, 1, 2, ... (modulo 2^bits) along K = 32 in every one of 32 rows, one group, every zero point z."""
    codes = (torch.arange(32) % (1 << bits)).to(torch.uint8).repeat(32, 1)
    zeros = torch.full((32, 1), z, dtype=torch.uint8)
    return QTensor(codes, zeros, torch.ones(32, 1, dtype=torch.float16), Format(bits, 32))


# Written out from the layout: field j at bit j * bits, and for 3 bits the stream in which codes 10 and 21 straddle.
GOLDEN_CODES = {
    2: (0xE4E4E4E4, 0xE4E4E4E4),
    3: (0x88FAC688, 0xC688FAC6, 0xFAC688FA),
    4: (0x76543210, 0xFEDCBA98, 0x76543210, 0xFEDCBA98),
    8: tuple(0x03020100 + 0x04040404 * i for i in range(8)),
}
GOLDEN_ZEROS = {
    (2, "v2"): (0xAAAAAAAA,) * 2,
    (2, "v1"): (0x55555555,) * 2,
    (3, "v2"): (0x24924924, 0x49249249, 0x92492492),
    (3, "v1"): (0xDB6DB6DB, 0xB6DB6DB6, 0x6DB6DB6D),
    (4, "v2"): (0x88888888,) * 4,
    (4, "v1"): (0x77777777,) * 4,
    (8, "v2"): (0x80808080,) * 8,
    (8, "v1"): (0x7F7F7F7F,) * 8,
}


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("version", ["v1", "v2"])
def test_golden_words(bits: int, version: ZeroConvention) -> None:
    q = ramp(bits, 1 << (bits - 1))
    packed = to_gptq(q, zeros=version)
    assert packed.qweight.shape == (bits, 32)
    assert torch.equal(packed.qweight, words(*GOLDEN_CODES[bits])[:, None].expand(bits, 32))
    assert torch.equal(packed.qzeros, words(*GOLDEN_ZEROS[bits, version])[None, :])
    assert packed.g_idx is not None
    assert packed.g_idx.tolist() == [0] * 32
    read = from_gptq(packed, q.format, zeros=version)
    assert torch.equal(read.codes, q.codes)
    assert torch.equal(read.zeros, q.zeros)


@given(
    bits=st.sampled_from(BITS),
    group=st.sampled_from([-1, 16, 32, 64]),
    n=st.integers(1, 3),
    k=st.integers(1, 3),
    version=st.sampled_from(["v1", "v2"]),
    seed=st.integers(0, 1000),
)
def test_round_trip(bits: int, group: int, n: int, k: int, version: ZeroConvention, seed: int) -> None:
    torch.manual_seed(seed)
    q = random_qtensor(32 * n, 64 * k, Format(bits, group), low=1 if version == "v1" else 0)
    packed = to_gptq(q, zeros=version)
    read = from_gptq(packed, q.format, zeros=version)
    assert torch.equal(read.codes, q.codes)
    assert torch.equal(read.zeros, q.zeros)
    assert torch.equal(read.scales, q.scales)
    again = to_gptq(read, zeros=version)
    assert torch.equal(again.qweight, packed.qweight)
    assert torch.equal(again.qzeros, packed.qzeros)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_wide_scales_are_kept_exactly(dtype: torch.dtype) -> None:
    q = random_qtensor(32, 64, Format(4, 32))
    packed = to_gptq(q)
    scales = (torch.rand(2, 32) / 3).to(dtype)
    read = from_gptq(GptqTensors(packed.qweight, packed.qzeros, scales), q.format, zeros="v2")
    assert read.scales.dtype == torch.float32
    assert torch.equal(read.scales, scales.float().T)
    assert torch.equal(to_gptq(read).scales.float(), scales.float())


def test_scales_that_float16_holds_are_stored_so() -> None:
    q = random_qtensor(32, 32, Format(4, 32))
    wide = QTensor(q.codes, q.zeros, q.scales.float(), q.format)
    assert to_gptq(wide).scales.dtype == torch.float16


@pytest.mark.parametrize(("n", "k", "bits"), [(12, 32, 2), (32, 16, 3), (20, 64, 3), (36, 32, 3), (2, 32, 8)])
def test_shapes_that_do_not_fill_words_are_refused(n: int, k: int, bits: int) -> None:
    q = random_qtensor(n, k, Format(bits, 16))
    with pytest.raises(CheckpointError, match="do not fill whole 32-bit words"):
        to_gptq(q)


def test_version_1_cannot_hold_a_zero_point_of_0() -> None:
    with pytest.raises(CheckpointError, match="zero points of 0"):
        to_gptq(ramp(4, 0), zeros="v1")


def test_codes_beyond_their_field_are_refused() -> None:
    q = ramp(4, 8)
    q.codes[3, 3] = 16
    with pytest.raises(CheckpointError, match="above 15"):
        to_gptq(q)


@pytest.mark.parametrize("bits", BITS)
def test_an_overflowed_version_1_zero_is_refused(bits: int) -> None:
    q = ramp(bits, (1 << bits) - 1)
    with pytest.raises(CheckpointError, match="overflowed"):
        from_gptq(to_gptq(q, zeros="v2"), q.format, zeros="v1")


@pytest.mark.parametrize("bits", [2, 4, 8])
def test_whole_word_subtraction_is_undone_exactly(bits: int) -> None:
    q = random_qtensor(32, 64, Format(bits, 32))
    q.zeros[::3] = 0
    packed = to_gptq(q, zeros="v2")
    ones = {2: 0x55555555, 4: 0x11111111, 8: 0x01010101}[bits]
    borrowed = [[((w & 0xFFFFFFFF) - ones) & 0xFFFFFFFF for w in row] for row in packed.qzeros.tolist()]
    v1 = torch.stack([words(*row) for row in borrowed])
    read = from_gptq(GptqTensors(packed.qweight, v1, packed.scales), q.format, zeros="v1", wordwise=True)
    assert torch.equal(read.zeros, q.zeros)


def test_act_order_is_refused_and_its_trivial_case_is_not() -> None:
    q = random_qtensor(32, 64, Format(4, 32))
    packed = to_gptq(q)
    from_gptq(GptqTensors(packed.qweight, packed.qzeros, packed.scales, torch.arange(64) // 32), q.format, zeros="v2")
    shuffled = (torch.arange(64) // 32).flip(0)
    with pytest.raises(CheckpointError, match="act-order"):
        from_gptq(GptqTensors(packed.qweight, packed.qzeros, packed.scales, shuffled), q.format, zeros="v2")


def test_scales_that_are_not_finite_are_refused() -> None:
    packed = to_gptq(random_qtensor(32, 64, Format(4, 32)))
    packed.scales[1, 5] = float("nan")
    with pytest.raises(CheckpointError, match="not finite"):
        from_gptq(packed, Format(4, 32), zeros="v2")


def sample(q: QTensor, written: ZeroConvention) -> Sample:
    return GptqPacking().sample(to_gptq(q, zeros=written).named(""), q.format)


def quantization(bits: int, *, symmetric: bool, label: str, quantizer: str | None = None) -> Quantization:
    return Quantization("gptq", bits, 32, symmetric, "gptq" if label == "gptq" else "gptq_v2", quantizer=quantizer)


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("written", ["v1", "v2"])
@pytest.mark.parametrize("label", ["gptq", "gptq_v2"])
def test_the_convention_is_found_whatever_the_label(
    bits: int, *, symmetric: bool, written: ZeroConvention, label: str
) -> None:
    form = Format(bits, 32)
    modules = []
    for _ in range(3):
        q = rounded_weight(64, 128, form, symmetric=symmetric)
        q.zeros.clamp_(min=1)
        modules.append(sample(q, written))
    decision, contradicts = decide_zeros(quantization(bits, symmetric=symmetric, label=label), modules)
    declared = "v2" if label == "gptq_v2" else "v1"
    # A step of 8 bits is too small for the means of asymmetric groups to tell.
    assert decision.convention == (declared if bits == 8 and not symmetric else written)
    assert contradicts == (decision.convention != declared)
    assert decision.convention in decision.reason
    assert label in decision.reason


def test_values_that_do_not_tell_leave_the_label() -> None:
    q = ramp(4, 3)
    between = QTensor((q.codes * 0 + 3).to(torch.uint8), q.zeros, q.scales, q.format)
    between.codes[:, ::2] += 1
    decision, contradicts = decide_zeros(
        quantization(4, symmetric=False, label="gptq", quantizer="sometool:1.0"), [sample(between, "v2")]
    )
    assert (decision.convention, contradicts) == ("v1", False)
    assert "sometool:1.0" in decision.reason
