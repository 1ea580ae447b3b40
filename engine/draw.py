"""What a draw is: which tokens temperature, min_p, top_k and top_p leave, and the one that a number picks from them.

numpy's definition. The C++ library's (kernels/sampling_cpu.py), the GPU's (kernels/triton/sampling.py) and torch's
(device_sampling.py) are held to it.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

from dibit.engine.config import SamplingParams

Floats = npt.NDArray[np.floating[Any]]
Ids = npt.NDArray[np.intp]

# Scores are float32, about 1e-6 apart at usual sizes: below this temperature only ties are left to chance, and scores
# divided by it would overflow.
LEAST_TEMPERATURE = 1e-6
_UNIFORM_STEP = 2.0**-53
_BLOCK = 128


def kept(scores: Floats, params: SamplingParams) -> tuple[Ids, Floats]:
    """What is left to draw from: ids, ascending, and their unnormalised probabilities.

    scores [V]: after penalties, before temperature; the highest is finite. min_p keeps what is at least min_p times as
    likely as the likeliest; top_k what scores at least the k-th highest (all of its ties); top_p the fewest tokens,
    likeliest first and the lower id on ties, that hold at least top_p of what min_p and top_k left.
    """
    with np.errstate(over="ignore"):
        scaled = (scores - scores.max()) / max(params.temperature, LEAST_TEMPERATURE)
    weights = np.exp(scaled)
    ids = np.arange(len(scores)) if params.min_p == 0.0 else np.flatnonzero(weights >= params.min_p)
    if 0 < params.top_k < len(ids):
        left = scaled[ids]
        near = highest_and_more(left, params.top_k)
        least = np.partition(left[near], -params.top_k)[-params.top_k]
        ids = ids[near[left[near] >= least]]
    if params.top_p < 1.0:
        ids = ids[_nucleus(weights[ids], params.top_p)]
    return ids, weights if len(ids) == len(weights) else weights[ids]


def uniform(seed: int, count: int) -> float:
    """The number in [0, 1) that draws output token `count` of a request with this seed."""
    bits = np.random.Philox(key=seed % (1 << 128), counter=count).random_raw()
    return (int(bits) >> 11) * _UNIFORM_STEP


def place(weights: Floats, number: float) -> int:
    """Position whose share of the weights `number` falls into. In two levels, as a long running sum is slow."""
    starts = np.arange(0, len(weights), _BLOCK)
    ends = np.cumsum(np.add.reduceat(weights, starts, dtype=np.float64))
    target = number * ends[-1]
    block = int(np.searchsorted(ends, target, side="right"))
    inside = weights[block * _BLOCK : (block + 1) * _BLOCK]
    before = ends[block - 1] if block else 0.0
    position = int(np.searchsorted(np.cumsum(inside, dtype=np.float64), target - before, side="right"))
    # The two sums of a block may differ in the last bit; a target between them belongs to its last possible token.
    return block * _BLOCK + min(position, int(np.flatnonzero(inside)[-1]))


def _nucleus(weights: Floats, top_p: float) -> Ids:
    """Positions, ascending, of the fewest weights that hold top_p of their sum; earlier ones on ties."""
    total = weights.sum(dtype=np.float64)
    # What lies below this, all together, is less than the 1 - top_p that may be lost: no need to sort it.
    near = np.flatnonzero(weights >= 0.5 * (1.0 - top_p) * total / len(weights))
    values = weights[near]
    falling = np.sort(values)[::-1]
    count = int(np.searchsorted(np.cumsum(falling, dtype=np.float64), top_p * total)) + 1
    least = falling[min(count, len(falling)) - 1]
    above, ties = values > least, np.flatnonzero(values == least)
    above[ties[: count - int(np.count_nonzero(above))]] = True
    held: Ids = near[above]
    return held


def highest_and_more(values: Floats, count: int) -> Ids:
    """Positions, ascending, of a few values that include the `count` highest and all their ties.

    The array is folded into lanes; `count` lanes have a maximum of at least the count-th highest lane maximum, which
    therefore bounds the count-th highest value from below.
    """
    lanes = min(len(values), max(1024, 4 * count))
    folded = values[: len(values) // lanes * lanes].reshape(-1, lanes).max(axis=0)
    return np.flatnonzero(values >= np.partition(folded, -count)[-count])
