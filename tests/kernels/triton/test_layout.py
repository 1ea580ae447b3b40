"""The planar layout: exact bytes, an exact way back, and planes where the kernels look for them."""

from __future__ import annotations

import itertools

import pytest
import torch
from random_weights import random_weight

from dibit.kernels.formats import BITS, GROUP_SIZES, PER_CHANNEL, Format, FormatError, QTensor
from dibit.kernels.triton.layout import Geometry, nbytes, pack, plane_shift, unpack


def weight(n: int, k: int, format: Format) -> QTensor:
    scales = torch.rand(n, format.groups(k)).add(0.01).half().float()
    return random_weight(n, k, format, scales=scales)


@pytest.mark.parametrize("group_size", GROUP_SIZES)
@pytest.mark.parametrize("bits", BITS)
def test_there_and_back(bits: int, group_size: int) -> None:
    fmt = Format(bits, group_size)
    columns = (7, 300) if group_size == PER_CHANNEL else (group_size, 5 * group_size, 640)
    for n, k in itertools.product((1, 63, 65, 130), columns):
        w = weight(n, k, fmt)
        packed = pack(w)
        back = unpack(packed)
        assert torch.equal(back.codes, w.codes)
        assert torch.equal(back.zeros, w.zeros)
        assert torch.equal(back.scales.float(), w.scales)
        assert packed.shape == (n, k)
        assert packed.nbytes == nbytes(fmt, n, k)


@pytest.mark.parametrize("bits", BITS)
def test_a_weight_takes_exactly_its_bits(bits: int) -> None:
    packed = pack(weight(128, 1024, Format(bits, 128)))
    assert packed.codes.nbytes * 8 == 128 * 1024 * bits
    assert packed.zeros.nbytes == 128 * 8
    assert packed.scales.nbytes == 128 * 8 * 2


@pytest.mark.parametrize("bits", BITS)
def test_planes_stand_where_the_kernels_mask_them(bits: int) -> None:
    """Column 16 p + r of a unit is in word r; masked after an even shift it is code * 2^plane_shift."""
    fmt = Format(bits, PER_CHANNEL)
    geometry = Geometry.of(fmt, 1)
    for plane in range(geometry.planes):
        codes = torch.zeros(1, geometry.columns, dtype=torch.uint8)
        codes[0, 16 * plane + 5] = fmt.qmax
        words = pack(QTensor(codes, torch.zeros(1, 1, dtype=torch.uint8), torch.ones(1, 1), fmt)).codes[0, 0, :, 0]
        assert bool((words[:, torch.arange(16) != 5] == 0).all())
        word = words[:, 5].to(torch.int32) & 0xFFFF
        if bits == 3 and plane == 15:
            assert (word >> 15).tolist() == [1, 1, 1]
            continue
        word_set, position = divmod(plane, 5) if bits == 3 else (0, plane)
        shift = position * bits - plane_shift(bits, plane)
        assert int(word[word_set]) >> shift == fmt.qmax << plane_shift(bits, plane)
        assert fmt.qmax << plane_shift(bits, plane) < 1024, "not a float16 subnormal"


def test_scales_that_float16_cannot_hold_stay_float32() -> None:
    w = weight(3, 32, Format(4, 32))
    w.scales[1, 0] = 1.0 + 2.0**-20
    packed = pack(w)
    assert packed.scales.dtype == torch.float32
    assert torch.equal(unpack(packed).scales, w.scales)


@pytest.mark.parametrize(("codes", "zeros", "found"), [(16, 0, "a code of 16"), (0, 200, "a zero point of 200")])
def test_what_does_not_fit_is_refused(codes: int, zeros: int, found: str) -> None:
    w = QTensor(
        torch.full((2, 32), codes, dtype=torch.uint8),
        torch.full((2, 1), zeros, dtype=torch.uint8),
        torch.ones(2, 1),
        Format(4, 32),
    )
    with pytest.raises(FormatError, match=f"{found} in int4-g32; at most 15 fits"):
        pack(w)
    with pytest.raises(FormatError, match=r"shape \[0, 32\]"):
        pack(QTensor(w.codes[:0], w.zeros[:0], w.scales[:0], w.format))
