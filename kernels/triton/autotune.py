"""Measures plans on the GPU at hand.

`plan` cuts every product by rules that were made without a GPU. `tune` tries the named configurations and numbers of
splits around them, some thirty kernels a shape, and takes what is faster by more than the noise. One that spills, or
that no processor holds, is compiled and not timed. The others are timed as they are served: in a CUDA graph, with the
launch after them that reads their runs. `dibit kernels tune` keeps what won (tuned_plans.py). Nothing is measured while
a model is served; where nothing was, the rules hold.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from enum import Enum
from functools import partial
from time import monotonic
from typing import Any, TypeVar

import torch
import triton

from dibit.kernels.formats import PER_CHANNEL, Format, QTensor
from dibit.kernels.triton import fused
from dibit.kernels.triton.availability import gpu_of
from dibit.kernels.triton.layout import TritonQWeight, pack
from dibit.kernels.triton.limits import resident_programs
from dibit.kernels.triton.plan import CONFIGS, Gpu, Plan, Tuned, configured, fits, plan
from dibit.kernels.triton.qlinear import Prepared, Runs, finish, launch, launch_runs, prepare
from dibit.kernels.triton.timing import cold_copies, graph_us
from dibit.kernels.triton.tuned_plans import key_of

BUCKETS = (1, 16, 32, 64)
"""Tokens at which the blocks of tokens are measured."""
NOISE = 0.02
MOST_SPLITS = 8
"""What follows a product of few tokens adds its splits beside a whole row (fused.py): with 16 of them one spills."""

Time = Callable[[Plan, int], float | None]
"""Microseconds of a plan for so many tokens; None where it does not fit the GPU."""

Name = TypeVar("Name", str, int)


class After(Enum):
    """What reads a product's runs. ROW, HALVES: a program a token, on its way to the next product (fused.py): the norm,
    which stands for attention too, or the SiLU. NOTHING: a launch of their own adds them."""

    ROW = "row"
    HALVES = "halves"
    NOTHING = "nothing"


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


def gpu_timer(
    w: TritonQWeight, *, after: After, measure: Callable[[Sequence[Callable[[], object]]], float] = graph_us
) -> Time:
    """Times products with `w` on the GPU that holds it, the weight not in its cache."""
    device = w.codes.device
    copies = [
        replace(w, codes=w.codes.clone(), scales=w.scales.clone(), zeros=w.zeros.clone())
        for _ in range(cold_copies(w.nbytes))
    ]
    follow = follower(after, w.n, device)

    def time(chosen: Plan, tokens: int) -> float | None:
        x = torch.randn(tokens, w.k, dtype=torch.float16, device=device) * w.k**-0.5
        made = prepare(x, w, padded_tokens=chosen.padded_tokens(tokens))
        try:
            kernel = launch(Runs.empty(made, w, chosen, bias=None))
        except (triton.runtime.errors.OutOfResources, triton.compiler.errors.CompilationError):
            return None
        if not holds(kernel, chosen, arch=gpu_of(device).arch):
            return None
        return measure([partial(_served, follow, made, copy, chosen) for copy in copies])

    return time


def holds(kernel: Any, chosen: Plan, *, arch: int) -> bool:
    """Whether a processor holds a program of `kernel`, what Triton made of a plan, without spilling."""
    if kernel is None:
        return True
    programs = resident_programs(
        registers=kernel.n_regs, shared_bytes=kernel.metadata.shared, warps=chosen.warps, arch=arch
    )  # fmt: skip
    return kernel.n_spills == 0 and programs > 0


def follower(after: After, n: int, device: torch.device) -> Callable[[Runs], object]:
    """The launch that reads a product of `n` columns."""
    if after is After.NOTHING:
        return _finish
    columns = n if after is After.ROW else n // 2
    codes = torch.zeros(1, columns, dtype=torch.uint8, device=device)
    one = torch.ones(1, 1, device=device)
    following = pack(QTensor(codes, torch.zeros_like(one, dtype=torch.uint8), one, Format(8, PER_CHANNEL)))
    if after is After.HALVES:
        return lambda runs: fused.silu_prepared(runs, following)
    weight = torch.ones(columns, device=device)
    return lambda runs: fused.norm_prepared(runs, None, weight, 1e-5, following)


def _finish(runs: Runs) -> None:
    if runs.plan.partial:
        shape = runs.prepared.tokens, runs.weight.n
        finish(runs, torch.empty(shape, dtype=torch.float32, device=runs.target.device))


def _served(follow: Callable[[Runs], object], x: Prepared, w: TritonQWeight, chosen: Plan) -> None:
    follow(launch_runs(x, w, chosen, bias=None))


def tune_all(
    weights: Iterable[TritonQWeight],
    *,
    gpu: Gpu,
    timer: Callable[[TritonQWeight], Time],
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
        measured[key] = tune(w, timer(w), gpu=gpu)
        progress(key, measured[key])
    return measured
