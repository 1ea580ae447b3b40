"""GPTQ: round the columns one after another, and let the columns still to come absorb each rounding error.

Frantar, Ashkboos, Hoefler and Alistarh, "GPTQ: Accurate Post-Training Quantization for Generative Pre-trained
Transformers", ICLR 2023. It minimises ‖(W - Ŵ) Xᵀ‖² greedily. With the input Hessian H = mean of x xᵀ, damped, and U
the upper triangular factor of H⁻¹ = Uᵀ U, column i is rounded and the error spread over the columns after it:

    e = (w_i - ŵ_i) / U[i, i]        W[:, j] -= e · U[i, j]   for j > i

Columns go in blocks: inside a block the update touches only the block; all columns after it follow in one product.
Cost: O(K³) for the factor and O(N K²) for the updates. Rows do not influence each other, so linears that read the
same input may be stacked.

The sum of e² over all columns is the error that is left, so 1 / U[i, i]² is what an error in column i costs: by that
weight the ranges are searched (grid.py) before the first column is rounded. Once all codes are known, the scales of a
row solve a least squares problem under the whole H (`refit`). Together with the order of columns this halves the
error at 2 bits. The paper's own GPTQ is `range_search`, `static_groups`, `act_order` and `refit` all false.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from dibit.engine.errors import ConfigError
from dibit.engine.models.decoder import Block
from dibit.kernels.formats import PER_CHANNEL, Format, QTensor, round_scales, zero_points
from dibit.quantize.asymmetric import corrected
from dibit.quantize.block import BlockJob
from dibit.quantize.grid import search_grid
from dibit.quantize.permute import permuted
from dibit.quantize.rotate import rotated
from dibit.quantize.stats import Need, SiteFailure, Stats

# Past this share of the mean diagonal the Hessian says nothing any more.
MAX_DAMP = 1.0
REARRANGEMENTS: dict[str, Callable[[BlockJob], Block]] = {
    "none": lambda job: job.block,
    "permute": permuted,
    "rotate": rotated,
}
# Elements of the temporaries of a refit.
REFIT_ELEMENTS = 1 << 22


@dataclass(frozen=True)
class GPTQ:
    """GPTQ with per-group or per-row ranges.

    symmetric       zero points in the middle of the code range
    damp            share of the Hessian's mean diagonal that is added to its diagonal
    damp_increment  added to damp when the Hessian cannot be factored, doubling with each failure
    block_columns   columns updated together (rounded up to whole groups); changes the speed only
    range_search    ranges of least error instead of those that cover every weight
    static_groups   take all ranges from the original weights instead of the weights as updated so far
    act_order       round the columns with the largest inputs first; needs static_groups, and changes nothing on disk
    refit           solve for the scales again once the codes are known
    asymmetric      round towards what makes up for the errors of the blocks before (asymmetric.py)
    relative        errors count in proportion to the size of the hidden state of their token (relative.py)
    fisher          weight the calibration tokens by what errors there cost the model (fisher.py)
    rearrange       permute sorts channels inside the block by their inputs (permute.py), rotate turns the values of
                    attention (rotate.py), none leaves them; the block computes the same
    """

    symmetric: bool = False
    damp: float = 0.01
    damp_increment: float = 0.01
    block_columns: int = 128
    range_search: bool = True
    static_groups: bool = True
    act_order: bool = True
    refit: bool = True
    asymmetric: bool = False
    relative: bool = False
    fisher: bool = False
    rearrange: str = "none"

    @property
    def needs(self) -> frozenset[Need]:
        extra: dict[Need, bool] = {
            "cross": self.asymmetric,
            "token_weights": self.fisher,
            "relative": self.relative,
        }
        return frozenset({"hessian", *(need for need, wanted in extra.items() if wanted)})

    def __post_init__(self) -> None:
        if not 0 <= self.damp <= MAX_DAMP:
            raise ConfigError(f"damp is {self.damp}; it must lie in [0, {MAX_DAMP}]")
        if not (self.damp_increment > 0 and math.isfinite(self.damp_increment)):
            raise ConfigError(f"damp_increment is {self.damp_increment}; it must be above 0")
        if self.block_columns < 1:
            raise ConfigError(f"block_columns is {self.block_columns}; it must be at least 1")
        if self.rearrange not in REARRANGEMENTS:
            raise ConfigError(f"rearrange is {self.rearrange!r}; supported: {', '.join(REARRANGEMENTS)}")
        if self.act_order and not self.static_groups:
            raise ConfigError(
                "act_order rounds columns out of order, so a group's range cannot wait for its columns; "
                "add static_groups, or leave act_order out (-O act_order=false)"
            )

    def rearranged(self, job: BlockJob) -> Block:
        """A block that computes the same, of whose weights the codes are to be."""
        return REARRANGEMENTS[self.rearrange](job)

    def quantize(self, w: Tensor, format: Format, stats: Stats) -> QTensor:
        """Quantize `w` [N, K] under `stats.hessian` [K, K]. Raises SiteFailure when the Hessian cannot be factored."""
        found = stats.everything().hessian
        if found is None:
            raise SiteFailure("no input statistics were collected")
        k = w.shape[1]
        hessian = found.clone()
        if not bool(torch.isfinite(hessian).all()):
            raise SiteFailure("the inputs seen during calibration are not finite")
        if self.asymmetric:
            w, _ = corrected(w, stats)
        # A column whose input was always zero gives no error and takes none. It is rounded where it stands, not
        # dropped: other text may use it.
        diagonal = hessian.diagonal()
        diagonal[diagonal == 0] = 1
        order = torch.arange(k)
        if self.act_order:
            order = torch.argsort(diagonal, descending=True, stable=True)
        factor, damp = self._inverse_factor(hessian[order][:, order])
        costs = torch.empty(k, dtype=factor.dtype).index_copy_(0, order, factor.diagonal().square().reciprocal())
        static = None
        if self.static_groups or format.group_size == PER_CHANNEL:
            static = self._ranges(w, format, costs)
        # Transposed, so that a column of the weight is contiguous.
        columns = w.T[order].to(factor.dtype, copy=True).contiguous()
        groups = torch.arange(k) // format.columns_per_group(k)
        codes, scales, zeros = self._round(columns, factor, format, groups[order].tolist(), costs[order], static)
        codes = torch.empty_like(codes).index_copy_(0, order, codes).T.contiguous()
        quantized = QTensor(codes=codes, zeros=zeros, scales=scales, format=format)
        if self.refit:
            hessian.diagonal().add_(damp)
            quantized = refit_scales(quantized, w, hessian)
        return quantized

    def _ranges(self, w: Tensor, format: Format, costs: Tensor) -> tuple[Tensor, Tensor]:
        if self.range_search:
            return search_grid(w, format, symmetric=self.symmetric, importance=costs)
        return format.ranges(w, symmetric=self.symmetric)

    def _inverse_factor(self, hessian: Tensor) -> tuple[Tensor, float]:
        """Upper triangular U [K, K] with (H + damping)⁻¹ = Uᵀ U, and the damping."""
        mean = float(hessian.diagonal().mean())
        extra = 0.0
        while self.damp + extra <= MAX_DAMP:
            damping = (self.damp + extra) * mean
            damped = hessian.clone()
            damped.diagonal().add_(damping)
            # Factored from the last column back, H = R Rᵀ with R upper triangular, so U = R⁻¹: one factorization and
            # one triangular solve, where inverting H first would cost two more and lose digits.
            lower, info = torch.linalg.cholesky_ex(damped.flip(0, 1))
            if int(info) == 0 and bool(torch.isfinite(lower).all()):
                upper = lower.flip(0, 1)
                identity = torch.eye(upper.shape[0], dtype=upper.dtype)
                return torch.linalg.solve_triangular(upper, identity, upper=True), damping
            extra = self.damp_increment if extra == 0 else extra * 2
        raise SiteFailure(f"the Hessian cannot be factored with damping up to {MAX_DAMP} of its mean diagonal")

    def _round(
        self,
        columns: Tensor,
        factor: Tensor,
        format: Format,
        groups: list[int],
        costs: Tensor,
        static: tuple[Tensor, Tensor] | None,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Rounds `columns` [K, N], which is consumed; groups[i] is the group of column i, costs[i] of an error in it.

        Returns codes uint8 [K, N], scales float32 [N, K/G], zeros uint8 [N, K/G].
        """
        k, n = columns.shape
        width = format.columns_per_group(k)
        fractional = format.zero_grid == "fractional"
        single = Format(bits=format.bits, group_size=PER_CHANNEL, zero_grid=format.zero_grid)
        step = self.block_columns
        if static is None:
            # A block holds whole groups, or the range of a group would miss updates still pending in its block.
            step = math.ceil(step / width) * width
            scales, zeros = torch.empty(n, k // width), torch.empty(n, k // width, dtype=torch.uint8)
        else:
            scales, zeros = static
        codes = torch.empty(k, n, dtype=torch.uint8)
        for start in range(0, k, step):
            stop = min(start + step, k)
            block = columns[start:stop]
            errors = torch.empty_like(block)
            for i in range(stop - start):
                group = groups[start + i]
                if static is None and (start + i) % width == 0:
                    members = block[i : i + width].T.float()
                    found = self._ranges(members, single, costs[start + i : start + i + width])
                    scales[:, group], zeros[:, group] = found[0][:, 0], found[1][:, 0]
                scale, zero = scales[:, group], zero_points(zeros[:, group], format)
                # In float32 as Format.encode does, so that without correlations the codes are exactly RTN's.
                ratio = block[i].float() / scale
                code = torch.round(ratio + zero) if fractional else torch.round(ratio) + zero
                code = code.clamp_(0, format.qmax)
                codes[start + i] = code.to(torch.uint8)
                row = factor[start + i, start:stop]
                errors[i] = (block[i] - (code - zero) * scale) / row[i]
                block[i + 1 :].addr_(row[i + 1 :], errors[i], alpha=-1)
            if stop < k:
                columns[stop:].addmm_(factor[start:stop, stop:].T, errors, alpha=-1)
        if not bool(torch.isfinite(columns).all()):
            raise SiteFailure("the weights grew beyond what a float holds while errors were spread")
        return codes, scales, zeros


def refit_scales(found: QTensor, w: Tensor, hessian: Tensor) -> QTensor:
    """`found` with the scales that bring it nearest to `w` [N, K] under `hessian` [K, K], codes and zeros as they are.

    For every row the scales s of its groups solve B s = c with B[g, g'] = l_g H l_g'ᵀ and c[g] = l_g H wᵀ, where l_g
    are the levels (codes - zeros) of group g. Rows whose solution is not positive throughout, or not better once it
    is rounded to float16, keep their scales.
    """
    n, k = found.shape
    groups = found.scales.shape[1]
    width = k // groups
    kept = []
    for start in range(0, n, rows := max(1, REFIT_ELEMENTS // (k * groups))):
        part = found.rows(start, start + rows)
        zeros = zero_points(part.zeros, part.format)[..., None].to(hessian.dtype)
        levels = part.codes.view(-1, groups, width).to(hessian.dtype) - zeros
        target = w[start : start + rows].to(hessian.dtype)
        # l_g H for every group: [R, K/G, K]
        spread = torch.einsum("ngw,gwk->ngk", levels, hessian.view(groups, width, k))
        b = torch.einsum("nghw,nhw->ngh", spread.view(-1, groups, groups, width), levels)
        c = torch.einsum("ngk,nk->ng", spread, target)
        # Groups of zero levels have no scale to solve for.
        diagonal = b.diagonal(dim1=1, dim2=2)
        empty = diagonal <= 0
        diagonal.add_(torch.where(empty, 1.0, 1e-9 * diagonal))
        old = part.scales.to(hessian.dtype)
        solved = torch.linalg.solve(b, c)
        solved = torch.where(empty, old, solved)
        usable = (solved.isfinite() & (solved > 0)).all(dim=1)
        new = round_scales(torch.where(usable[:, None], solved, old).float()).to(old.dtype)
        better = usable & (_left(new, b, c) < _left(old, b, c))
        kept.append(torch.where(better[:, None], new, old).float())
    return QTensor(found.codes, found.zeros, torch.cat(kept), found.format)


def _left(scales: Tensor, b: Tensor, c: Tensor) -> Tensor:
    """The error of each row but for a constant."""
    return torch.einsum("ng,ngh,nh->n", scales, b, scales) - 2 * (scales * c).sum(dim=1)
