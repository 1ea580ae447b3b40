"""What an error at a token is worth: it counts in proportion to the size of the token's hidden state.

Every block reads the residual stream through a norm, so what an error does there depends on its size beside the hidden
state it is added to. Absolute errors hide that where it matters most: in many models the first token of a text, and a
few delimiters, carry hidden states thousands of times as large as the others (Sun, Chen, Kolter and Liu, "Massive
Activations in Large Language Models", COLM 2024; in SmolLM2-135M the first token holds 98 % of all squares from block
11 to 20), and a squared error over all tokens is then one over that token. Whether it helps is another question: that
token is what attention rests on, and docs/quantize.md has the trial that says so.
"""

from __future__ import annotations

import torch
from torch import Tensor

from dibit.quantize.streams import HiddenStates

# Segments that are looked at at a time.
_SEGMENTS = 8


def relative_weights(outputs: HiddenStates) -> Tensor:
    """One over the mean square of every token of `outputs`, scaled to a mean of 1: float32 [samples, length]."""
    squares = torch.cat([x.square().mean(dim=-1) for _, x in outputs.batches(_SEGMENTS)])
    # Of a token that is all zeros nothing is known.
    weights = torch.where(squares > 0, squares.clamp(min=torch.finfo(torch.float32).tiny).reciprocal(), 0.0)
    return weights.div_(weights.mean())
