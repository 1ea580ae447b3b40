"""Rows of a quantized embedding: the same bits as the reference, out of the linear's packed layout."""

from __future__ import annotations

import pytest
import torch

from dibit.kernels import embedding_cpu, native, qlinear_cpu
from dibit.kernels.contract import ContractError
from dibit.kernels.embedding import embedding_reference
from dibit.kernels.formats import BITS, Format, QTensor, dequantize

COLUMNS = {16: (16, 48), 32: (96,), 64: (192,), 128: (384,), -1: (7, 100)}


def table(v: int, k: int, format: Format) -> QTensor:
    groups = format.groups(k)
    return QTensor(
        codes=torch.randint(0, format.qmax + 1, (v, k), dtype=torch.uint8),
        zeros=torch.randint(0, format.qmax + 1, (v, groups), dtype=torch.uint8),
        scales=torch.randn(v, groups).half(),
        format=format,
    )


@pytest.mark.parametrize("group_size", COLUMNS)
@pytest.mark.parametrize("bits", BITS)
def test_rows_are_those_of_the_dequantized_table(bits: int, group_size: int, isas: tuple[str, ...]) -> None:
    for k in COLUMNS[group_size]:
        w = table(37, k, Format(bits=bits, group_size=group_size))
        ids = torch.tensor([0, 36, 5, 5, 16, 15, 31, 32])
        want = dequantize(w)[ids]
        assert torch.equal(embedding_reference(ids, w), want)
        for threads in (1, 3):
            native.set_threads(threads)
            assert torch.equal(embedding_cpu.embedding(ids, qlinear_cpu.pack(w)), want)


@pytest.mark.parametrize("group_size", COLUMNS)
@pytest.mark.parametrize("bits", [2, 3])
def test_fractional_zero_points_are_those_of_the_reference(bits: int, group_size: int, isas: tuple[str, ...]) -> None:
    """Every field and every code of the grid occur; the C++ value of a field is the reference's to the bit."""
    fmt = Format(bits, group_size, "fractional")
    for k in COLUMNS[group_size]:
        w = table(37, k, fmt)
        w.zeros[: fmt.qmax + 1] = torch.arange(fmt.qmax + 1, dtype=torch.uint8)[:, None]
        ids = torch.arange(37)
        assert torch.equal(embedding_cpu.embedding(ids, qlinear_cpu.pack(w)), dequantize(w))


@pytest.mark.parametrize("ids", [[37], [-1], [0, 1, 2**40]])
def test_ids_outside_the_table_are_refused(ids: list[int], isas: tuple[str, ...]) -> None:
    w = table(37, 64, Format(bits=4, group_size=64))
    with pytest.raises(IndexError, match="37 rows"):
        embedding_reference(torch.tensor(ids), w)
    with pytest.raises(IndexError, match="37 rows"):
        embedding_cpu.embedding(torch.tensor(ids), qlinear_cpu.pack(w))


def test_no_ids_and_wrong_ids(isas: tuple[str, ...]) -> None:
    packed = qlinear_cpu.pack(table(37, 64, Format(bits=4, group_size=64)))
    assert embedding_cpu.embedding(torch.empty(0, dtype=torch.int64), packed).shape == (0, 64)
    with pytest.raises(ContractError, match="int32"):
        embedding_cpu.embedding(torch.zeros(3, dtype=torch.int32), packed)
