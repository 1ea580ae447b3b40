"""GPTQ: round the columns one after another, and let the columns still to come absorb each rounding error.

Frantar, Ashkboos, Hoefler and Alistarh, "GPTQ: Accurate Post-Training Quantization for Generative Pre-trained
Transformers", ICLR 2023. It minimises ‖(W - Ŵ) Xᵀ‖² greedily. With the input Hessian H = mean of x xᵀ, damped, and U
the upper triangular factor of H⁻¹ = Uᵀ U, column i is rounded and the error spread over the columns after it:

    e = (w_i - ŵ_i) / U[i, i]        W[:, j] -= e · U[i, j]   for j > i

Columns go in blocks: inside a block the update touches only the block; all columns after it follow in one product.
Cost: O(K³) for the factor and O(N K²) for the updates. Rows do not influence each other, so linears that read the
same input may be stacked. The option that matters is `damp`, when calibration text is short.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from dibit.engine.errors import ConfigError
from dibit.kernels.formats import PER_CHANNEL, Format, QTensor
from dibit.quantize.methods.rtn import choose_ranges
from dibit.quantize.stats import Need, SiteFailure, Stats

# Past this share of the mean diagonal the Hessian says nothing any more.
MAX_DAMP = 1.0


@dataclass(frozen=True)
class GPTQ:
    """GPTQ with per-group or per-row ranges.

    symmetric       zero points in the middle of the code range
    damp            share of the Hessian's mean diagonal that is added to its diagonal
    damp_increment  added to damp when the Hessian cannot be factored, doubling with each failure
    block_columns   columns updated together (rounded up to whole groups); changes the speed only
    range_search    shrink each group's range to the least weight error instead of covering every weight
    static_groups   take all ranges from the original weights instead of the weights as updated so far
    act_order       round the columns with the largest inputs first; needs static_groups, and changes nothing on disk
    """

    needs: ClassVar[frozenset[Need]] = frozenset({"hessian"})

    symmetric: bool = False
    damp: float = 0.01
    damp_increment: float = 0.01
    block_columns: int = 128
    range_search: bool = False
    static_groups: bool = False
    act_order: bool = False

    def __post_init__(self) -> None:
        if not 0 <= self.damp <= MAX_DAMP:
            raise ConfigError(f"damp is {self.damp}; it must lie in [0, {MAX_DAMP}]")
        if not (self.damp_increment > 0 and math.isfinite(self.damp_increment)):
            raise ConfigError(f"damp_increment is {self.damp_increment}; it must be above 0")
        if self.block_columns < 1:
            raise ConfigError(f"block_columns is {self.block_columns}; it must be at least 1")
        if self.act_order and not self.static_groups:
            raise ConfigError(
                "act_order rounds columns out of order, so a group's range cannot wait for its columns; "
                "add static_groups, or leave act_order out"
            )

    def quantize(self, w: Tensor, format: Format, stats: Stats) -> QTensor:
        """Quantize `w` [N, K] under `stats.hessian` [K, K]. Raises SiteFailure when the Hessian cannot be factored."""
        if stats.hessian is None:
            raise SiteFailure("no input statistics were collected")
        k = w.shape[1]
        hessian = stats.hessian.clone()
        if not bool(torch.isfinite(hessian).all()):
            raise SiteFailure("the inputs seen during calibration are not finite")
        # A column whose input was always zero gives no error and takes none. It is rounded where it stands, not
        # dropped: other text may use it.
        diagonal = hessian.diagonal()
        diagonal[diagonal == 0] = 1
        order = torch.argsort(diagonal, descending=True, stable=True) if self.act_order else None
        if order is not None:
            hessian = hessian[order][:, order]
        factor = self._inverse_factor(hessian)
        del hessian
        static = None
        if self.static_groups or format.group_size == PER_CHANNEL:
            static = choose_ranges(w, format, symmetric=self.symmetric, search=self.range_search)
        # Transposed, so that a column of the weight is contiguous.
        columns = (w.T if order is None else w.T[order]).to(factor.dtype, copy=True).contiguous()
        groups = torch.arange(k) // format.columns_per_group(k)
        codes, scales, zeros = self._round(
            columns, factor, format, groups=(groups if order is None else groups[order]).tolist(), static=static
        )
        if order is not None:
            codes = torch.empty_like(codes).index_copy_(0, order, codes)
        return QTensor(codes=codes.T.contiguous(), zeros=zeros, scales=scales, format=format)

    def _inverse_factor(self, hessian: Tensor) -> Tensor:
        """Upper triangular U [K, K] with (H + damping)⁻¹ = Uᵀ U."""
        mean = float(hessian.diagonal().mean())
        extra = 0.0
        while self.damp + extra <= MAX_DAMP:
            damped = hessian.clone()
            damped.diagonal().add_((self.damp + extra) * mean)
            # Factored from the last column back, H = R Rᵀ with R upper triangular, so U = R⁻¹: one factorization and
            # one triangular solve, where inverting H first would cost two more and lose digits.
            lower, info = torch.linalg.cholesky_ex(damped.flip(0, 1))
            if int(info) == 0 and bool(torch.isfinite(lower).all()):
                upper = lower.flip(0, 1)
                identity = torch.eye(upper.shape[0], dtype=upper.dtype)
                factor: Tensor = torch.linalg.solve_triangular(upper, identity, upper=True)
                return factor
            extra = self.damp_increment if extra == 0 else extra * 2
        raise SiteFailure(f"the Hessian cannot be factored with damping up to {MAX_DAMP} of its mean diagonal")

    def _round(
        self,
        columns: Tensor,
        factor: Tensor,
        format: Format,
        *,
        groups: list[int],
        static: tuple[Tensor, Tensor] | None,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Rounds `columns` [K, N], which is consumed; groups[i] is the group of column i.

        Returns codes uint8 [K, N], scales float32 [N, K/G], zeros uint8 [N, K/G].
        """
        k, n = columns.shape
        width = format.columns_per_group(k)
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
                    found = choose_ranges(members, single, symmetric=self.symmetric, search=self.range_search)
                    scales[:, group], zeros[:, group] = found[0][:, 0], found[1][:, 0]
                scale, zero = scales[:, group], zeros[:, group].float()
                # In float32 as Format.encode does, so that without correlations the codes are exactly RTN's.
                code = (torch.round(block[i].float() / scale) + zero).clamp_(0, format.qmax)
                codes[start + i] = code.to(torch.uint8)
                row = factor[start + i, start:stop]
                errors[i] = (block[i] - (code - zero) * scale) / row[i]
                block[i + 1 :].addr_(row[i + 1 :], errors[i], alpha=-1)
            if stop < k:
                columns[stop:].addmm_(factor[start:stop, stop:].T, errors, alpha=-1)
        if not bool(torch.isfinite(columns).all()):
            raise SiteFailure("the weights grew beyond what a float holds while errors were spread")
        return codes, scales, zeros
