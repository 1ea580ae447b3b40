"""Formats: the bit streams (fixed for ever by golden words), ranges and rounding, and what is refused."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from dibit.kernels.formats import (
    BITS,
    Format,
    FormatError,
    QTensor,
    concat_rows,
    dequantize,
    pack_stream,
    round_scales,
    unpack_stream,
    zero_fields,
    zero_points,
)

# 32 codes (5 i + 1) mod 2^bits as a stream of 32-bit words.
GOLDEN = {
    2: [0x39393939, 0x39393939],
    3: [0xF19D50F1, 0x50F19D50, 0x9D50F19D],
    4: [0x4FA50B61, 0xC72D83E9, 0x4FA50B61, 0xC72D83E9],
    8: [0x100B0601, 0x241F1A15, 0x38332E29, 0x4C47423D, 0x605B5651, 0x746F6A65, 0x88837E79, 0x9C97928D],
}


def signed(words: list[int]) -> torch.Tensor:
    return torch.tensor([w - (1 << 32) if w >= 1 << 31 else w for w in words], dtype=torch.int32)


@pytest.mark.parametrize("bits", BITS)
def test_streams_never_drift(bits: int) -> None:
    codes = torch.tensor([(5 * i + 1) % (1 << bits) for i in range(32)], dtype=torch.uint8)
    assert torch.equal(pack_stream(codes, bits), signed(GOLDEN[bits]))
    assert torch.equal(unpack_stream(signed(GOLDEN[bits]), bits), codes)


@settings(max_examples=60, deadline=None)
@given(data=st.data(), bits=st.sampled_from(BITS), rows=st.integers(1, 3), periods=st.integers(1, 4))
def test_streams_are_the_integer_they_describe_and_come_back(
    data: st.DataObject, bits: int, rows: int, periods: int
) -> None:
    count = 32 * periods
    values = [data.draw(st.lists(st.integers(0, (1 << bits) - 1), min_size=count, max_size=count)) for _ in range(rows)]
    codes = torch.tensor(values, dtype=torch.uint8)
    words = pack_stream(codes, bits)
    assert words.shape == (rows, count * bits // 32)
    for row, packed in zip(values, words.tolist(), strict=True):
        whole = sum(code << (i * bits) for i, code in enumerate(row))
        assert sum((word & 0xFFFFFFFF) << (32 * i) for i, word in enumerate(packed)) == whole
    assert torch.equal(unpack_stream(words, bits), codes)


def test_streams_of_part_of_a_word_are_refused() -> None:
    with pytest.raises(FormatError, match="7 codes of 4 bits"):
        pack_stream(torch.zeros(7, dtype=torch.uint8), 4)
    with pytest.raises(FormatError, match="4 words"):
        unpack_stream(torch.zeros(4, dtype=torch.int32), 3)


@pytest.mark.parametrize("symmetric", [False, True])
@pytest.mark.parametrize("group_size", [16, 128, -1])
@pytest.mark.parametrize("bits", BITS)
def test_encoding_rounds_to_the_nearest_code(bits: int, group_size: int, symmetric: bool) -> None:  # noqa: FBT001
    fmt = Format(bits=bits, group_size=group_size)
    w = torch.randn(5, 256) + 0.3
    scales, zeros = fmt.ranges(w, symmetric=symmetric)
    q = fmt.encode(w, scales, zeros)
    assert int(q.codes.max()) <= fmt.qmax
    step = scales.repeat_interleave(fmt.columns_per_group(256), dim=1)
    # A value may lie past the last code: by at most one step where the zero point was rounded, or, symmetric, where
    # the code +2^(bits-1) is missing.
    assert bool(((dequantize(q) - w).abs() <= step * 1.01).all())
    inside = (q.codes > 0) & (q.codes < fmt.qmax)
    assert bool(((dequantize(q) - w).abs()[inside] <= step[inside] * 0.5001).all())
    assert torch.equal(scales, scales.half().float()), "not what a float16 checkpoint holds"


def test_zero_is_exact_and_a_group_of_zeros_is_zero() -> None:
    fmt = Format(bits=4, group_size=16)
    w = torch.rand(3, 32) + 5
    w[0, 3] = 0
    w[1, 16:] = 0
    q = fmt.encode(w, *fmt.ranges(w))
    assert float(dequantize(q)[0, 3]) == 0
    assert bool((dequantize(q)[1, 16:] == 0).all())
    assert float(q.scales[1, 1]) == 1


def test_rounded_scales_are_normal_float16() -> None:
    scales = round_scales(torch.tensor([0.0, 1e-12, 1.0, 1e9]))
    assert scales.tolist() == [1.0, torch.finfo(torch.float16).tiny, 1.0, torch.finfo(torch.float16).max]


def test_dequantize_is_the_formula() -> None:
    q = QTensor(
        codes=torch.tensor([[0, 3] * 8 + [2, 1] * 8], dtype=torch.uint8),
        zeros=torch.tensor([[1, 2]], dtype=torch.uint8),
        scales=torch.tensor([[0.5, -4.0]], dtype=torch.float16),
        format=Format(bits=2, group_size=16),
    )
    assert dequantize(q).tolist() == [[-0.5, 1.0] * 8 + [0.0, 4.0] * 8]


def test_names_and_sizes() -> None:
    assert Format(bits=4, group_size=64).name == "int4-g64"
    assert Format(bits=3, group_size=-1).name == "int3-channel"
    assert Format(bits=2, group_size=64).bits_per_weight(4096) == 2 + 18 / 64
    assert Format(bits=8, group_size=-1).groups(100) == 1


def test_what_does_not_exist_is_refused() -> None:
    with pytest.raises(FormatError, match="5 bits per weight; supported: 2, 3, 4, 8"):
        Format(bits=5, group_size=64)
    with pytest.raises(FormatError, match="group size 100"):
        Format(bits=4, group_size=100)
    with pytest.raises(FormatError, match="zero grid 'float'"):
        Format(bits=2, group_size=64, zero_grid="float")  # type: ignore[arg-type]
    for bits in (4, 8):
        with pytest.raises(FormatError, match=f"fractional zero points at {bits} bits; they exist at 2 and 3 bits"):
            Format(bits=bits, group_size=64, zero_grid="fractional")
    with pytest.raises(FormatError, match="symmetric"):
        Format(2, 16, "fractional").ranges(torch.randn(2, 16), symmetric=True)
    with pytest.raises(FormatError, match="100 input columns do not divide into groups of 64"):
        Format(bits=4, group_size=64).groups(100)


@pytest.mark.parametrize("bits", BITS)
def test_integer_zero_fields_are_the_zero_points(bits: int) -> None:
    fmt = Format(bits, 64)
    fields = torch.arange(fmt.qmax + 1, dtype=torch.uint8)
    assert zero_points(fields, fmt).tolist() == fields.tolist()
    assert torch.equal(zero_fields(fields.float() + 0.4, fmt), fields)


def test_fractional_zero_fields_mean_thirds_and_fourteenths() -> None:
    two, three = Format(2, 64, "fractional"), Format(3, 64, "fractional")
    assert (two.name, three.name) == ("int2-g64-fractional", "int3-g64-fractional")
    for fmt, values in ((two, [1, 4 / 3, 5 / 3, 2]), (three, [2.25 + 5 * c / 14 for c in range(8)])):
        fields = torch.arange(fmt.qmax + 1, dtype=torch.uint8)
        z = zero_points(fields, fmt)
        assert z.dtype == torch.float32
        torch.testing.assert_close(z.double(), torch.tensor(values, dtype=torch.float64), rtol=1.2e-7, atol=0)
        assert (float(z[0]), float(z[-1])) == (values[0], values[-1])
        assert torch.equal(zero_fields(z, fmt), fields)
        assert zero_fields(torch.tensor([-9.0, 9.0]), fmt).tolist() == [0, fmt.qmax]


@pytest.mark.parametrize("group_size", [16, 64, -1])
@pytest.mark.parametrize("bits", [2, 3])
def test_fractional_encoding_covers_and_rounds_to_the_nearest_code(bits: int, group_size: int) -> None:
    fmt = Format(bits, group_size, "fractional")
    w = torch.randn(7, 128) + torch.linspace(-3, 3, 7)[:, None]
    w[0] = 0
    scales, zeros = fmt.ranges(w)
    assert int(zeros.max()) <= fmt.qmax
    q = fmt.encode(w, scales, zeros)
    step = scales.repeat_interleave(fmt.columns_per_group(128), dim=1)
    error = (dequantize(q) - w).abs()
    assert bool((error <= step * 0.502).all())
    # Any other zero point that covers the group needs a wider step.
    z = zero_points(zeros, fmt)
    grouped = w.view(7, fmt.groups(128), -1)
    for other in zero_points(torch.arange(fmt.qmax + 1, dtype=torch.uint8), fmt):
        wanted = torch.maximum(-grouped.amin(2) / other, grouped.amax(2) / (fmt.qmax - other)).clamp_min(0)
        assert bool((wanted >= scales * 0.999).logical_or(wanted == 0).all())
    again = fmt.encode(dequantize(q), scales, zeros)
    assert torch.equal(again.codes, q.codes)
    assert z.shape == scales.shape


def weight(**changed: object) -> QTensor:
    fields: dict[str, object] = {
        "codes": torch.zeros(2, 32, dtype=torch.uint8),
        "zeros": torch.zeros(2, 2, dtype=torch.uint8),
        "scales": torch.ones(2, 2),
        "format": Format(bits=4, group_size=16),
    }
    return QTensor(**(fields | changed))  # type: ignore[arg-type]


def test_tensors_that_do_not_belong_together_are_refused() -> None:
    with pytest.raises(FormatError, match=r"expected \[N, K\]"):
        weight(codes=torch.zeros(32, dtype=torch.uint8))
    with pytest.raises(FormatError, match=r"zeros of shape \(2, 1\)"):
        weight(zeros=torch.zeros(2, 1, dtype=torch.uint8))
    with pytest.raises(FormatError, match=r"scales of shape \(3, 2\)"):
        weight(scales=torch.ones(3, 2))
    with pytest.raises(FormatError, match="codes of type"):
        weight(codes=torch.zeros(2, 32, dtype=torch.int32))
    with pytest.raises(FormatError, match="scales of type"):
        weight(scales=torch.ones(2, 2, dtype=torch.float64))


def test_rows_and_concat_are_inverse() -> None:
    fmt = Format(bits=4, group_size=16)
    w = torch.randn(6, 32)
    q = fmt.encode(w, *fmt.ranges(w))
    joined = concat_rows([q.rows(0, 2), q.rows(2, 6)])
    assert torch.equal(dequantize(joined), dequantize(q))
    other = Format(bits=2, group_size=16)
    with pytest.raises(FormatError, match=r"int2-g16.*int4-g16"):
        concat_rows([q, other.encode(w, *other.ranges(w))])
