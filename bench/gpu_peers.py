"""Others' kernels for the product of `make gpu`, given the weight that dibit is given.

torch     float16, the weight dequantized
gemlite   2 and 4 bits
marlin    4 bits with one zero point, 8, as GPTQ's symmetric checkpoints have it; the kernel that vLLM brings

Each is first made to multiply, and left out where that is not the product: a fast wrong answer is none.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor

from dibit.kernels.formats import Format, QTensor, dequantize, zero_points

Linear = Callable[[Tensor], Tensor]
MOST_ERROR = 0.02
"""Of the largest output; float16 sums of some thousand terms stay below."""


@dataclass(frozen=True)
class Peer:
    """
    package  what has to be installed
    formats  of weights that are compared
    build    x -> x · dequantize(w)ᵀ for one weight
    zero     the only zero point it knows; None: any
    bits     what it reads of a weight; None: its format's
    """

    package: str
    formats: tuple[Format, ...]
    build: Callable[[QTensor], Linear]
    zero: int | None = None
    bits: int | None = None

    def missing(self) -> str | None:
        return None if importlib.util.find_spec(self.package) is not None else f"{self.package} is not installed"

    def weight(self, w: QTensor) -> QTensor:
        """A weight that it can multiply, of the same size."""
        return w if self.zero is None else replace(w, zeros=torch.full_like(w.zeros, self.zero))


class WrongProduct(RuntimeError):
    """A peer's result is not the product."""


def checked(linear: Linear, w: QTensor, x: Tensor) -> Linear:
    """`linear`, once its product of x [M, K] with `w` was seen to be right. Raises WrongProduct."""
    found, want = linear(x).float(), F.linear(x, dequantize(w).to(x.dtype)).float()
    error = float((found - want).abs().max() / want.abs().max())
    if not error <= MOST_ERROR:
        raise WrongProduct(f"its result is off by {error:.2g} of the largest output")
    return linear


def torch_linear(w: QTensor) -> Linear:
    dense = dequantize(w).half()
    return lambda x: F.linear(x, dense)


def gemlite_linear(w: QTensor) -> Linear:
    from gemlite.core import DType, GemLiteLinearTriton

    n, k = w.shape
    linear = GemLiteLinearTriton(
        w.format.bits,
        group_size=w.format.group_size,
        in_features=k,
        out_features=n,
        input_dtype=DType.FP16,
        output_dtype=DType.FP16,
    )
    zeros = zero_points(w.zeros, w.format).half()
    linear.pack(w.codes, w.scales.half().reshape(-1, 1), zeros.reshape(-1, 1), None)
    return lambda x: linear(x)


def marlin_linear(w: QTensor) -> Linear:
    from vllm import _custom_ops
    from vllm.model_executor.layers.quantization.utils import marlin_utils
    from vllm.scalar_type import scalar_types

    n, k = w.shape
    device = w.codes.device
    # GPTQ's words: eight codes of a column, the first in the low bits.
    nibbles = w.codes.T.reshape(k // 8, 8, n).to(torch.int64)
    shifts = torch.arange(0, 32, 4, device=device)[None, :, None]
    words = (nibbles << shifts).sum(1)
    words = torch.where(words >= 1 << 31, words - (1 << 32), words).to(torch.int32).contiguous()
    order = marlin_utils.marlin_make_empty_g_idx(device)
    packed = _custom_ops.gptq_marlin_repack(words, order, k, n, 4)
    scales = marlin_utils.marlin_permute_scales(w.scales.half().T.contiguous(), k, n, w.format.group_size)
    workspace = marlin_utils.marlin_make_workspace_new(device)

    def run(x: Tensor) -> Tensor:
        y: Tensor = marlin_utils.apply_gptq_marlin_linear(
            input=x,
            weight=packed,
            weight_scale=scales,
            weight_zp=order,
            g_idx=order,
            g_idx_sort_indices=order,
            workspace=workspace,
            wtype=scalar_types.uint4b8,
            output_size_per_partition=n,
            input_size_per_partition=k,
            is_k_full=True,
        )
        return y

    return run


PEERS = {
    "torch": Peer("torch", (Format(4, 128),), torch_linear, bits=16),
    "gemlite": Peer("gemlite", (Format(2, 128), Format(4, 128)), gemlite_linear),
    "marlin": Peer("vllm", (Format(4, 128),), marlin_linear, zero=8),
}
