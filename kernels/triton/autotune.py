"""Measures plans on the GPU at hand.

`plan` cuts every product by rules that were made without a GPU. `tune` tries the named configurations and numbers of
splits around them, some thirty kernels a shape, and takes what is faster by more than the noise. `dibit kernels tune`
keeps it (tuned_plans.py). Nothing is measured while a model is served; where nothing was, the rules hold.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from time import monotonic
from typing import TypeVar

import torch
import triton

from dibit.kernels.triton.layout import TritonQWeight
from dibit.kernels.triton.plan import CONFIGS, Gpu, Plan, Tuned, configured, fits, plan
from dibit.kernels.triton.qlinear import multiply, prepare
from dibit.kernels.triton.tuned_plans import key_of

BUCKETS = (1, 16, 32, 64)
"""Tokens at which the blocks of tokens are measured."""
NOISE = 0.02
MOST_SPLITS = 8
"""What follows a product of few tokens adds its splits beside a whole row (fused.py): with 16 of them one spills."""

Time = Callable[[Plan, int], float | None]
"""Microseconds of a plan for so many tokens; None where it does not fit the GPU."""

Name = TypeVar("Name", str, int)


def tune(w: TritonQWeight, time: Time, *, gpu: Gpu) -> Tuned:
    """The fastest plans for products with `w`."""

    def cut(tokens: int, tuned: Tuned | None = None) -> Plan:
        return plan(w.geometry, w.padded_rows, tokens, gpu=gpu, tuned=tuned)

    usual, most = cut(1), min(MOST_SPLITS, w.geometry.steps)
    tried = [splits for splits in (usual.splits // 2, usual.splits * 2, usual.splits * 4) if 0 < splits <= most]
    best = _fastest(usual, {splits: cut(1, Tuned(splits)) for splits in tried}, 1, time)
    configs: dict[int, str] = {}
    for tokens in BUCKETS:
        chosen = cut(tokens, Tuned(best))
        fitting = {n: configured(chosen, c) for n, c in CONFIGS.items() if fits(n, chosen, w.padded_rows, gpu=gpu)}
        name = _fastest(chosen, fitting, tokens, time)
        if name is not None:
            configs[chosen.block_tokens] = name
    return Tuned(best, configs)


def _fastest(usual: Plan, others: Mapping[Name, Plan], tokens: int, time: Time) -> Name | None:
    """Which of the others beats the usual plan, if any does."""
    found = time(usual, tokens)
    best, least = None, float("inf") if found is None else found * (1 - NOISE)
    for name, candidate in others.items():
        if candidate != usual and (taken := time(candidate, tokens)) is not None and taken < least:
            best, least = name, taken
    return best


def gpu_timer(w: TritonQWeight) -> Time:
    """Times products with `w` on the GPU that holds it, the weight not in its cache."""

    def time(chosen: Plan, tokens: int) -> float | None:
        x = torch.randn(tokens, w.k, dtype=torch.float16, device=w.codes.device)
        made = prepare(x, w, padded_tokens=chosen.padded_tokens(tokens))
        y = torch.empty(tokens, w.n, dtype=torch.float16, device=w.codes.device)
        try:
            median: float = triton.testing.do_bench(
                lambda: multiply(made, w, chosen, y, bias=None, residual=None), warmup=5, rep=20, return_mode="median"
            )
        except (triton.runtime.errors.OutOfResources, triton.compiler.errors.CompilationError):
            return None
        return median * 1e3

    return time


def tune_all(
    weights: Iterable[TritonQWeight],
    *,
    gpu: Gpu,
    timer: Callable[[TritonQWeight], Time] | None = None,
    limit_s: float,
    progress: Callable[[str, Tuned], None],
) -> dict[str, Tuned]:
    """`tune` for every shape among some weights, the largest first, until `limit_s` seconds have passed; a shape that
    was begun is finished. `progress` is told of each. Weights of one shape are measured once."""
    shapes: dict[str, TritonQWeight] = {}
    for w in sorted(weights, key=lambda w: -w.nbytes):
        shapes.setdefault(key_of(w), w)
    began = monotonic()
    measured: dict[str, Tuned] = {}
    for key, w in shapes.items():
        if monotonic() - began > limit_s:
            break
        measured[key] = tune(w, (timer or gpu_timer)(w), gpu=gpu)
        progress(key, measured[key])
    return measured
