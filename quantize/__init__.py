"""A float model becomes a low-bit checkpoint. Offline."""

from __future__ import annotations

from dibit.quantize.methods import METHODS
from dibit.quantize.pipeline import quantize_checkpoint

__all__ = ["METHODS", "quantize_checkpoint"]
