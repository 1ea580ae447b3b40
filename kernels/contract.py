"""Checks shapes against named dimensions, so that an op's docstring and its guard are the same words."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor


class ContractError(ValueError):
    """A tensor that breaks an op's contract."""


class Dims:
    """Binds letters to sizes across several tensors of one call.

    d = Dims("qlinear")
    d.check("x", x, "M K", (torch.float32,))
    d.check("bias", bias, "N")
    """

    def __init__(self, op: str, **sizes: int) -> None:
        self.op = op
        self.sizes: dict[str, int] = dict(sizes)

    def check(
        self,
        name: str,
        tensor: Tensor,
        dims: str,
        dtypes: Iterable[torch.dtype] | None = None,
        *,
        contiguous: bool = True,
    ) -> None:
        letters = dims.split()
        if tensor.dim() != len(letters):
            raise ContractError(f"{self.op}: {name} has shape {tuple(tensor.shape)}; expected [{', '.join(letters)}]")
        for axis, (letter, size) in enumerate(zip(letters, tensor.shape, strict=True)):
            expected = int(letter) if letter.isdigit() else self.sizes.setdefault(letter, size)
            if size != expected:
                raise ContractError(
                    f"{self.op}: {name} has shape {tuple(tensor.shape)}, so {letter} (axis {axis}) is {size}; "
                    f"expected {expected}"
                )
        if dtypes is not None:
            allowed = tuple(dtypes)
            if tensor.dtype not in allowed:
                raise ContractError(f"{self.op}: {name} is {tensor.dtype}; expected one of {list(allowed)}")
        if contiguous and not tensor.is_contiguous():
            raise ContractError(f"{self.op}: {name} has strides {tensor.stride()}; expected contiguous rows")
