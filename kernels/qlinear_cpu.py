"""The quantized linear on the C++ cpu backend (csrc/qlinear.h has the layout and the arithmetic).

Weights keep exactly their bits; scales stay float16 where that is exact and float32 otherwise; zero points stay
fields, and become numbers once per group. Activations are rounded to int8 once per call, symmetric, with one float32
scale per block of min(group_size, 32) columns, so an output differs from the reference by at most

    sum over blocks of  (s_a / 2) * sum over the block of |w|,        s_a = max|x| over the block / 127

plus float32 rounding of the sum over blocks. With `activation_bits` the scale is that of the whole row, as the
reference defines it, and only the rounding of the sum is left. A NaN or an infinity in a row of x makes the whole row
of y NaN; a NaN or infinite scale of w makes the outputs of its row NaN or infinite.

Rows of y are the same bits for every M, thread count and instruction set.
"""

from __future__ import annotations

import ctypes
from dataclasses import dataclass, field

import torch
from torch import Tensor

from dibit.kernels import native, tape
from dibit.kernels.contract import Dims
from dibit.kernels.formats import PER_CHANNEL, Format, FormatError, QTensor
from dibit.kernels.qlinear import check_activation_bits

PANEL_ROWS = 16
MAX_BLOCK = 32
# Of the bytes that `pack` makes; to be raised whenever they change, as packed weights outlive the process.
LAYOUT_VERSION = 1

_CODE_TOO_LARGE = 2


class QWeightStruct(ctypes.Structure):
    """`QWeight` of csrc/qlinear.h."""

    _fields_ = [
        ("codes", ctypes.c_void_p),
        ("scales", ctypes.c_void_p),
        ("zeros", ctypes.c_void_p),
        *((name, ctypes.c_int64) for name in ("n", "k", "padded", "block", "blocks", "groups")),
        *((name, ctypes.c_int64) for name in ("blocks_per_group", "bits", "scale_bytes")),
        *((name, ctypes.c_float) for name in ("zero_first", "zero_step")),
    ]


@dataclass(frozen=True)
class CpuQWeight:
    """A QTensor [N, K] in panels of 16 rows.

    codes   uint8 [panels, bytes]     see csrc/qlinear.h
    zeros   uint8 [panels, groups, 16]
    scales  float16 or float32 [panels, groups, 16]
    """

    codes: Tensor
    zeros: Tensor
    scales: Tensor
    n: int
    k: int
    format: Format
    native: QWeightStruct = field(repr=False, compare=False)

    @property
    def shape(self) -> tuple[int, int]:
        return self.n, self.k

    @property
    def nbytes(self) -> int:
        return self.codes.nbytes + self.zeros.nbytes + self.scales.nbytes


def block_columns(format: Format) -> int:
    """Columns that share one activation scale."""
    return MAX_BLOCK if format.group_size == PER_CHANNEL else min(format.group_size, MAX_BLOCK)


@dataclass(frozen=True)
class _Layout:
    """Shapes of the packed tensors of a weight [N, K]."""

    n: int
    k: int
    format: Format
    padded: int
    block: int
    blocks_per_group: int
    codes: tuple[int, int]
    groups: tuple[int, int, int]

    @classmethod
    def of(cls, n: int, k: int, format: Format) -> _Layout:
        block = block_columns(format)
        # A unit of 3-bit codes spans 32 columns, two blocks when groups have 16.
        unit = max(block, 32) if format.bits == 3 else block
        padded = -(-k // unit) * unit
        blocks = padded // block
        per_group = blocks if format.group_size == PER_CHANNEL else format.group_size // block
        panels = -(-n // PANEL_ROWS)
        codes = (panels, padded * PANEL_ROWS * format.bits // 8)
        return cls(n, k, format, padded, block, per_group, codes, (panels, blocks // per_group, PANEL_ROWS))


def _weight(codes: Tensor, zeros: Tensor, scales: Tensor, layout: _Layout) -> CpuQWeight:
    zero_first, zero_step = layout.format.zero_line
    struct = QWeightStruct(
        codes=codes.data_ptr(),
        scales=scales.data_ptr(),
        zeros=zeros.data_ptr(),
        n=layout.n,
        k=layout.k,
        padded=layout.padded,
        block=layout.block,
        blocks=layout.padded // layout.block,
        groups=layout.groups[1],
        blocks_per_group=layout.blocks_per_group,
        bits=layout.format.bits,
        scale_bytes=scales.element_size(),
        zero_first=zero_first,
        zero_step=zero_step,
    )
    return CpuQWeight(codes, zeros, scales, layout.n, layout.k, layout.format, struct)


def pack(w: QTensor) -> CpuQWeight:
    """The cpu layout of `w`. Raises FormatError for tensors elsewhere, an empty matrix, or codes beyond the width."""
    n, k = w.shape
    if n == 0 or k == 0:
        raise FormatError(f"a weight of shape [{n}, {k}]; expected at least one row and one column")
    for name, tensor in (("codes", w.codes), ("zeros", w.zeros), ("scales", w.scales)):
        if tensor.device.type != "cpu":
            raise FormatError(f"{name} on {tensor.device}; the cpu backend packs tensors in main memory")
    if int(w.zeros.max()) > w.format.qmax:
        raise FormatError(f"a zero point of {int(w.zeros.max())} in {w.format.name}; at most {w.format.qmax} fits")
    layout = _Layout.of(n, k, w.format)
    scales = _narrow(w.scales).contiguous()
    packed = _weight(
        torch.empty(layout.codes, dtype=torch.uint8),
        torch.empty(layout.groups, dtype=torch.uint8),
        torch.empty(layout.groups, dtype=scales.dtype),
        layout,
    )
    source = w.codes.contiguous()
    zeros = w.zeros.contiguous()
    status = native.entry("dibit_qlinear_pack", *_PACK_TYPES)(
        ctypes.byref(packed.native), source.data_ptr(), zeros.data_ptr(), scales.data_ptr(), w.zeros.shape[1]
    )
    if status == _CODE_TOO_LARGE:
        raise FormatError(f"codes up to {int(w.codes.max())} in {w.format.name}; at most {w.format.qmax} fits")
    if status != 0:
        raise native.NativeError(f"dibit_qlinear_pack refused [{n}, {k}] in {w.format.name} (status {status})")
    return packed


def assemble(codes: Tensor, zeros: Tensor, scales: Tensor, *, n: int, k: int, format: Format) -> CpuQWeight:
    """A weight [N, K] from the three tensors of one that `pack` made, wherever they were kept meanwhile.

    Raises FormatError for shapes or types that are not those of the layout; the bytes themselves are not looked at.
    """
    layout = _Layout.of(n, k, format)
    for name, tensor, shape, types in (
        ("codes", codes, layout.codes, (torch.uint8,)),
        ("zeros", zeros, layout.groups, (torch.uint8,)),
        ("scales", scales, layout.groups, (torch.float16, torch.float32)),
    ):
        if tuple(tensor.shape) != shape or tensor.dtype not in types or not tensor.is_contiguous():
            raise FormatError(
                f"packed {name} of {list(tensor.shape)} {tensor.dtype}; [{n}, {k}] in {format.name} has {list(shape)}"
            )
    return _weight(codes, zeros, scales, layout)


def qlinear(
    x: Tensor,
    w: CpuQWeight,
    bias: Tensor | None = None,
    *,
    activation_bits: int | None = None,
    out: Tensor | None = None,
) -> Tensor:
    """y = x · dequantize(w)ᵀ + bias, contract in qlinear.py.

    x     [M, K] float32, contiguous; bfloat16 and float16 are converted
    bias  [N] float32, or None
    activation_bits  4, 6 or 8: x is rounded so, a row at a time; None: as the module docstring says
    out   [M, N] to write into, dtype of x, or None
    y     [M, N], dtype of x
    """
    bits = 0 if activation_bits is None else check_activation_bits(activation_bits)
    dims = Dims("qlinear", N=w.n, K=w.k)
    dims.check("x", x, "M K", _INPUT_TYPES)
    if bias is not None:
        dims.check("bias", bias, "N", (torch.float32,))
    if out is not None:
        dims.check("out", out, "M N", (x.dtype,))
    m = x.shape[0]
    wide = x if x.dtype == torch.float32 else x.float()
    y = out if out is not None and out.dtype == torch.float32 else tape.empty(m, w.n)
    native.function("dibit_qlinear", *_QLINEAR_TYPES)(
        ctypes.byref(w.native), wide.data_ptr(), m, None if bias is None else bias.data_ptr(), bits, y.data_ptr()
    )
    if x.dtype == torch.float32:
        return y
    return y.to(x.dtype) if out is None else out.copy_(y)


_INPUT_TYPES = (torch.float32, torch.bfloat16, torch.float16)
_PACK_TYPES = (ctypes.POINTER(QWeightStruct), native.POINTER, native.POINTER, native.POINTER, native.INT)
_QLINEAR_TYPES = (
    ctypes.POINTER(QWeightStruct),
    native.POINTER,
    native.INT,
    native.POINTER,
    native.INT,
    native.POINTER,
)


def _narrow(scales: Tensor) -> Tensor:
    """Scales in float16 when that loses nothing (NaN stays NaN), else as they are."""
    if scales.dtype == torch.float16:
        return scales
    half = scales.to(torch.float16)
    exact = (half.float() == scales) | scales.isnan()
    return half if bool(exact.all()) else scales
