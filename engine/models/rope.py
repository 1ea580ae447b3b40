"""Angles of the rotary embedding and the laws that stretch them to longer contexts.

Tables are made in float32 in the order of operations that models are trained with; a "better" angle would be a
different model. Laws: linear (position interpolation, Chen et al. 2023), llama3 (Llama 3.1), yarn (Peng et al. 2023)
and dynamic NTK. Dynamic NTK changes the base with the length of the sequence, under which keys already in a cache
no longer fit: up to the original context it is the plain law, and there it ends here.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from dibit.engine.errors import ConfigError


@dataclass(frozen=True)
class Linear:
    """Positions are divided by `factor`."""

    factor: float


@dataclass(frozen=True)
class Dynamic:
    """Unscaled up to `original_positions`; longer sequences are refused."""

    factor: float
    original_positions: int


@dataclass(frozen=True)
class Llama3:
    """Wavelengths beyond original / low_factor are divided by `factor`, those below original / high_factor kept."""

    factor: float
    low_factor: float
    high_factor: float
    original_positions: int


@dataclass(frozen=True)
class Yarn:
    """Dimensions that turn less than beta_slow times in the original context are interpolated, those that turn more
    than beta_fast times kept; `attention_factor` multiplies cos and sin."""

    factor: float
    original_positions: int
    attention_factor: float
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    truncate: bool = True


Scaling = Linear | Dynamic | Llama3 | Yarn


@dataclass(frozen=True)
class Rope:
    """Rotary embedding over the first `dim` dimensions of a head, base `theta`."""

    theta: float
    dim: int
    scaling: Scaling | None = None

    def frequencies(self) -> Tensor:
        """Radians per position, [dim/2] float32."""
        powers = self.theta ** (torch.arange(0, self.dim, 2, dtype=torch.float32) / self.dim)
        plain = 1.0 / powers
        if isinstance(self.scaling, Linear):
            return plain / self.scaling.factor
        if isinstance(self.scaling, Llama3):
            return _llama3(plain, self.scaling)
        if isinstance(self.scaling, Yarn):
            ramp = _yarn_ramp(self.scaling, theta=self.theta, dim=self.dim)
            return 1.0 / (self.scaling.factor * powers) * ramp + plain * (1 - ramp)
        return plain

    def tables(self, max_len: int) -> tuple[Tensor, Tensor]:
        """cos and sin, each [max_len, dim/2] float32. Raises ConfigError where the law does not reach that far."""
        if isinstance(self.scaling, Dynamic) and max_len > self.scaling.original_positions:
            raise ConfigError(
                f"{max_len} positions with dynamic rope scaling, which re-rotates the whole cache beyond "
                f"{self.scaling.original_positions}; supported: up to {self.scaling.original_positions} positions, "
                "so lower max_model_len"
            )
        angles = torch.arange(max_len, dtype=torch.float32)[:, None] * self.frequencies()
        gain = self.scaling.attention_factor if isinstance(self.scaling, Yarn) else 1.0
        return angles.cos() * gain, angles.sin() * gain


def yarn_attention_factor(factor: float, mscale: float | None = None, mscale_all_dim: float | None = None) -> float:
    """The gain that a config without `attention_factor` means."""

    def gain(scale: float) -> float:
        return 1.0 if factor <= 1 else 0.1 * scale * math.log(factor) + 1.0

    return gain(mscale) / gain(mscale_all_dim) if mscale and mscale_all_dim else gain(1.0)


def _llama3(plain: Tensor, law: Llama3) -> Tensor:
    wavelengths = 2 * math.pi / plain
    scaled = torch.where(wavelengths > law.original_positions / law.low_factor, plain / law.factor, plain)
    smooth = (law.original_positions / wavelengths - law.low_factor) / (law.high_factor - law.low_factor)
    between = (1 - smooth) * scaled / law.factor + smooth * scaled
    medium = (wavelengths >= law.original_positions / law.high_factor) & (
        wavelengths <= law.original_positions / law.low_factor
    )
    return torch.where(medium, between, scaled)


def _yarn_ramp(law: Yarn, *, theta: float, dim: int) -> Tensor:
    """Share of interpolation per frequency, [dim/2], 0 for the fast ones and 1 for the slow ones."""

    def dimension(turns: float) -> float:
        return dim * math.log(law.original_positions / (turns * 2 * math.pi)) / (2 * math.log(theta))

    low, high = dimension(law.beta_fast), dimension(law.beta_slow)
    if law.truncate:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, dim - 1)
    if low == high:
        high += 0.001
    return ((torch.arange(dim // 2, dtype=torch.float32) - low) / (high - low)).clamp(0, 1)
