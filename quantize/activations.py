"""Blocks as a model with low-bit activations computes them: the input of every quantized linear rounded first.

The rounding is that of the runtime (kernels.qlinear.quantize_activations), a token at a time. Nothing is cut off by it,
so its gradient is taken for the identity throughout (straight-through), scale included.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from dibit.engine.models.decoder import Block, Linear
from dibit.kernels.qlinear import quantize_activations
from dibit.quantize.fake_quantize import straight


@dataclass(slots=True)
class RoundedInput:
    """A linear that sees its input rounded to `bits` bits."""

    linear: Linear
    bits: int

    def __call__(self, x: Tensor) -> Tensor:
        return self.linear(straight(x, quantize_activations(x.detach(), bits=self.bits)))


def rounded_inputs(block: Block, bits: int | None) -> Block:
    """`block` with the inputs of its linears rounded; the block itself where `bits` is None."""
    if bits is None:
        return block
    linears: dict[str, Linear] = {key: RoundedInput(linear, bits) for key, linear in block.linears.items()}
    return block.with_linears(linears)
