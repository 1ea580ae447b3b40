"""SiLU-gated product, the elementwise half of a gated MLP (Shazeer 2020).

gate_up  [T, 2 I]  the gate's I columns, then up's
y        [T, I]    silu(gate) * up, dtype of gate_up; computed in float32
"""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor


def silu_mul_reference(gate_up: Tensor) -> Tensor:
    gate, up = gate_up.float().chunk(2, dim=-1)
    return (F.silu(gate) * up).to(gate_up.dtype)
