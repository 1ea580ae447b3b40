"""How a QTensor lies in GPU memory: planar words, so that one 16-byte load feeds tensor cores without a shuffle.

A *unit* is a run of input columns of one row in 16 consecutive 16-bit words. Bit field p of word r, the *plane* p,
holds column 16 p + r of the unit, so a plane is 16 consecutive columns: what one matrix instruction multiplies.

    bits  columns  words    plane p of a unit
    2     128      16       bits 2p .. 2p+1
    4     64       16       bits 4p .. 4p+3
    8     32       16       bits 8p .. 8p+7
    3     256      3 x 16   p = 5 a + i < 15: bits 3i .. 3i+2 of word set a; plane 15: bit 15 of the three sets

A kernel masks a plane where it stands: `word & mask`, read as a float16, is the subnormal code * 2^-24 (exactly),
times the power of two that the plane stands at after the kernel's shift. `plane_shift` is that power; the
activations of such a plane are divided by it beforehand (device/prepare.py).

Rows come in tiles of 64, so that a thread block streams contiguous memory:

    codes   int16 [N' / 64, units, words / 16, 64, 16]     N' = N rounded up to 64
    scales  float16 or float32 [groups', N']               float16 where that is exact
    zeros   uint8 [groups', N']

Columns are padded to whole steps (`Geometry.step_columns`, what a kernel's loop covers at once); what is stored for
padding is zeros, and the activations there are zero. Every weight takes exactly its bits.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from dibit.kernels.formats import PER_CHANNEL, Format, FormatError, QTensor

TILE_ROWS = 64
PLANE_COLUMNS = 16
MAX_STEP_COLUMNS = 128


@dataclass(frozen=True)
class Geometry:
    """Sizes of the layout of a weight with `k` columns in `format`.

    planes           planes of a unit
    word_sets        runs of 16 words in a unit: 3 at 3 bits, else 1
    unit_columns     columns of a unit
    step_units       units that one pass of a kernel's loop multiplies; all of one group, or one unit of several
    steps            passes over all columns, padding included
    groups_per_step  groups that change within a pass (1 when a group is a pass, or longer than one)
    groups           stored groups of a row, padding included
    """

    planes: int
    word_sets: int
    unit_columns: int
    step_units: int
    steps: int
    groups_per_step: int
    groups: int

    @classmethod
    def of(cls, format: Format, k: int) -> Geometry:
        """Raises FormatError when the groups do not come out even."""
        format.groups(k)
        planes = 16 if format.bits == 3 else 16 // format.bits
        unit = planes * PLANE_COLUMNS
        per_channel = format.group_size == PER_CHANNEL
        span = MAX_STEP_COLUMNS if per_channel else format.group_size
        step_units = max(1, span // unit)
        step = step_units * unit
        steps = -(-k // step)
        return cls(
            planes=planes,
            word_sets=3 if format.bits == 3 else 1,
            unit_columns=unit,
            step_units=step_units,
            steps=steps,
            groups_per_step=1 if per_channel else max(1, step // format.group_size),
            groups=1 if per_channel else steps * step // format.group_size,
        )

    @property
    def step_columns(self) -> int:
        return self.step_units * self.unit_columns

    @property
    def columns(self) -> int:
        """K with its padding."""
        return self.steps * self.step_columns

    @property
    def units(self) -> int:
        return self.steps * self.step_units


@dataclass(frozen=True)
class TritonQWeight:
    """A QTensor [n, k] in the layout of the module docstring."""

    codes: Tensor
    zeros: Tensor
    scales: Tensor
    n: int
    k: int
    format: Format
    geometry: Geometry

    @property
    def shape(self) -> tuple[int, int]:
        return self.n, self.k

    @property
    def padded_rows(self) -> int:
        return self.codes.shape[0] * TILE_ROWS

    @property
    def nbytes(self) -> int:
        return self.codes.nbytes + self.zeros.nbytes + self.scales.nbytes


def plane_shift(bits: int, plane: int) -> int:
    """The power of two by which a plane's masked value exceeds code * 2^-24: the bits it stands above bit 0."""
    if bits == 8 or (bits == 3 and plane == 15):
        return 0
    position = plane % 5 if bits == 3 else plane
    return bits * (position % 2)


def nbytes(format: Format, n: int, k: int, *, scale_bytes: int = 2) -> int:
    """Bytes that a weight [n, k] takes in this layout."""
    geometry = Geometry.of(format, k)
    rows = -(-n // TILE_ROWS) * TILE_ROWS
    return rows * (geometry.columns * format.bits // 8 + geometry.groups * (1 + scale_bytes))


def pack(w: QTensor) -> TritonQWeight:
    """The layout of `w`, on its device. Raises FormatError for an empty matrix or for codes beyond the width."""
    n, k = w.shape
    if n == 0 or k == 0:
        raise FormatError(f"a weight of shape [{n}, {k}]; expected at least one row and one column")
    for name, tensor in (("code", w.codes), ("zero point", w.zeros)):
        if int(tensor.max()) > w.format.qmax:
            raise FormatError(f"a {name} of {int(tensor.max())} in {w.format.name}; at most {w.format.qmax} fits")
    geometry = Geometry.of(w.format, k)
    tiles = -(-n // TILE_ROWS)
    codes = torch.empty(
        tiles,
        geometry.units,
        geometry.word_sets,
        TILE_ROWS,
        PLANE_COLUMNS,
        dtype=torch.int16,
        device=w.codes.device,
    )
    for tile in range(tiles):
        # A tile at a time: 16-bit intermediates of a whole matrix would be several times its size.
        rows = w.codes[tile * TILE_ROWS : (tile + 1) * TILE_ROWS]
        padded = torch.nn.functional.pad(rows, (0, geometry.columns - k, 0, TILE_ROWS - rows.shape[0]))
        planes = padded.view(TILE_ROWS, geometry.units, geometry.planes, PLANE_COLUMNS).permute(1, 2, 0, 3)
        codes[tile] = _words(planes.to(torch.int32), w.format.bits).to(torch.int16)
    narrow = w.scales.to(torch.float16)
    exact = bool(((narrow.float() == w.scales) | w.scales.isnan()).all())
    pad = (0, tiles * TILE_ROWS - n, 0, geometry.groups - w.scales.shape[1])
    return TritonQWeight(
        codes=codes,
        zeros=torch.nn.functional.pad(w.zeros.T, pad).contiguous(),
        scales=torch.nn.functional.pad((narrow if exact else w.scales).T, pad).contiguous(),
        n=n,
        k=k,
        format=w.format,
        geometry=geometry,
    )


def unpack(w: TritonQWeight) -> QTensor:
    """The QTensor that was packed, bit for bit (scales in the type they are stored in)."""
    tiles, units, _, rows, columns = w.codes.shape
    words = w.codes.to(torch.int32) & 0xFFFF
    planes = torch.empty(tiles, units, w.geometry.planes, rows, columns, dtype=torch.uint8, device=words.device)
    mask = w.format.qmax
    for p in range(w.geometry.planes):
        if w.format.bits == 3 and p == 15:
            tops = [(words[:, :, a] >> 15) << a for a in range(3)]
            planes[:, :, p] = (tops[0] | tops[1] | tops[2]).to(torch.uint8)
        else:
            word_set, position = divmod(p, 5) if w.format.bits == 3 else (0, p)
            planes[:, :, p] = ((words[:, :, word_set] >> (w.format.bits * position)) & mask).to(torch.uint8)
    codes = planes.permute(0, 3, 1, 2, 4).reshape(tiles * rows, w.geometry.columns)[: w.n, : w.k]
    groups = w.format.groups(w.k)
    return QTensor(
        codes=codes.contiguous(),
        zeros=w.zeros[:groups, : w.n].T.contiguous(),
        scales=w.scales[:groups, : w.n].T.contiguous(),
        format=w.format,
    )


def _words(planes: Tensor, bits: int) -> Tensor:
    """int32 codes [units, planes, rows, 16] -> words [units, word_sets, rows, 16], as int32 in [0, 65535]."""
    units, count, rows, columns = planes.shape
    words = torch.zeros(units, 3 if bits == 3 else 1, rows, columns, dtype=torch.int32, device=planes.device)
    for p in range(count):
        if bits == 3 and p == 15:
            for a in range(3):
                words[:, a] |= ((planes[:, p] >> a) & 1) << 15
        else:
            word_set, position = divmod(p, 5) if bits == 3 else (0, p)
            words[:, word_set] |= planes[:, p] << (bits * position)
    return words
