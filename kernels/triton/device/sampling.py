"""A draw from each row of scores without sorting it: weights, two searches for a bar, and the place of a number.

A weight lies in [0, 1], so its float32 bits, 30 of them, are ordered as it is. Six steps of five binary digits find the
bar of top_k (a count of the weights at or above it), and six that of top_p (their sum): a step tallies what lies at or
above 32 candidates at once and leaves one of 32 ranges. Several programs share a row; what they find is added up in
64-bit integers, sums of weights too, so the order in which they come does not matter.

The weights are those of csrc/sample.cpp bit for bit: the same operations, none of them fused (the launches ask for
that). Only sums differ: there they are float64, here whole units of 2^-44.
"""

from __future__ import annotations

import triton
import triton.language as tl

UNIT = tl.constexpr(17592186044416.0)  # a weight of 1; 2^18 of them fit 64 bits
LEAST_TEMPERATURE = tl.constexpr(1e-6)
STEPS = tl.constexpr(6)
DIGITS = tl.constexpr(5)
RANGES = tl.constexpr(32)
ENTRIES = tl.constexpr(13)  # one before each step of both searches, and one before the draw


@triton.jit
def exp_of(x):
    """e^x for x in [-88, 0] with the rounding of the C++ library's."""
    shifted = x * 1.4426950216293335 + 12582912.0
    n = shifted - 12582912.0
    r = n * 0.00021219444170128554 + (n * -0.693359375 + x)
    p = 0.001381422160193324 * r + 0.00836889911442995
    p = p * r + 0.04166840389370918
    p = p * r + 0.1666651964187622
    p = p * r + 0.4999999403953552
    p = (r * r) * p + r + 1.0
    return p * ((shifted.to(tl.int32, bitcast=True) << 23) + 0x3F800000).to(tl.float32, bitcast=True)


@triton.jit(do_not_specialize=["R"])
def weigh_kernel(scores, peaks, settings, weights, tallies, R, V, BLOCK: tl.constexpr, TALLIES: tl.constexpr):
    """weights [R, V] int32: the bits of e^((score - peak) / temperature), 0 below min_p and in a row whose peak is not
    finite; tallies [R, 12, 32] = 0. settings [5, R] float64: temperature, min_p, top_k, top_p, number. Programs (R,
    blocks of V)."""
    r = tl.program_id(0).to(tl.int64)
    v = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    temperature = tl.maximum(tl.load(settings + r).to(tl.float32), LEAST_TEMPERATURE)
    least = tl.load(settings + R + r).to(tl.float32)
    peak = tl.load(peaks + r)
    sound = tl.abs(peak) < float("inf")
    s = tl.load(scores + r * V + v, mask=v < V, other=float("-inf"))
    x = tl.div_rn(tl.where(sound, s - tl.where(sound, peak, 0.0), float("-inf")), temperature)
    w = tl.where(x >= -87.0, exp_of(tl.maximum(x, -87.0)), 0.0)
    tl.store(weights + r * V + v, tl.where(w >= least, w, 0.0).to(tl.int32, bitcast=True), mask=v < V)
    if tl.program_id(1) == 0:
        at = tl.arange(0, TALLIES)
        size = (ENTRIES - 1) * RANGES
        tl.store(tallies + r * size + at, tl.full([TALLIES], 0, tl.int64), mask=at < size)


@triton.jit
def narrowed(tallies, entries, settings, r, R, STEP, SEARCH: tl.constexpr):
    """After a step: the first candidate of the range that is left, and what of the goal the ranges above it do not
    hold. The bar is the highest candidate at or above which the goal is reached."""
    at = tl.arange(0, RANGES)
    found = tl.load(tallies + (r * (ENTRIES - 1) + STEPS * SEARCH + STEP) * RANGES + at)
    if STEP == 0:
        first = tl.full([], 0, tl.int64)
        whole = tl.sum(tl.where(at == 0, found, 0), 0)
        if SEARCH == 0:
            k = tl.load(settings + 2 * R + r)
            goal = tl.where(k > 0, tl.minimum(k, whole.to(tl.float64)), whole.to(tl.float64)).to(tl.int64)
        else:
            goal = tl.ceil(tl.load(settings + 3 * R + r) * whole.to(tl.float64)).to(tl.int64)
            goal = tl.minimum(tl.maximum(goal, 1), whole)
    else:
        entry = entries + (r * ENTRIES + STEPS * SEARCH + STEP) * 2
        first = tl.load(entry)
        goal = tl.load(entry + 1)
    range_ = tl.maximum(tl.sum((found >= goal).to(tl.int32), 0) - 1, 0)
    above = tl.sum(tl.where(at == range_ + 1, found, 0), 0)
    return first + (range_.to(tl.int64) << (DIGITS * (STEPS - 1 - STEP))), goal - above


@triton.jit(do_not_specialize=["R", "STEP"])
def tally_kernel(
    weights,
    settings,
    tallies,
    entries,
    R,
    V,
    STEP,
    SEARCH: tl.constexpr,
    AFTER_TOP_K: tl.constexpr,
    BLOCK: tl.constexpr,
    TILE: tl.constexpr,
):
    """One of six steps of a search: top_k's (0), or top_p's (1) within what top_k leaves. Adds this block's share to
    tallies [R, 12, 32]; entries [R, 13, 2] int64 is what `narrowed` goes on from. Programs (R, blocks of V)."""
    r = tl.program_id(0).to(tl.int64)
    shift = DIGITS * (STEPS - 1 - STEP)
    first = tl.full([], 0, tl.int64)
    bar = tl.full([], 0, tl.int64)
    if STEP > 0:
        first, goal = narrowed(tallies, entries, settings, r, R, STEP - 1, SEARCH)
        if tl.program_id(1) == 0:
            entry = entries + (r * ENTRIES + STEPS * SEARCH + STEP) * 2
            tl.store(entry, first)
            tl.store(entry + 1, goal)
    elif AFTER_TOP_K:
        bar, goal = narrowed(tallies, entries, settings, r, R, STEPS - 1, 0)
    bar = bar.to(tl.int32)
    first = first.to(tl.int32)
    candidates = tl.arange(0, RANGES)[None, :]
    sums = tl.full([TILE, RANGES], 0, tl.int64)
    start = tl.program_id(1) * BLOCK
    for at in range(start, tl.minimum(start + BLOCK, V), TILE):
        v = at + tl.arange(0, TILE)
        w = tl.load(weights + r * V + v, mask=v < V, other=0)
        digit = (w - first) >> shift
        digit = tl.where((w >= bar) & (v < V) & (w >= first) & (digit < RANGES), digit, -1)
        # Late ranges are so narrow that most tiles have nothing in them.
        if tl.max(digit, 0) >= 0:
            value = (
                tl.full([TILE], 1, tl.int64) if SEARCH == 0 else (w.to(tl.float32, bitcast=True) * UNIT).to(tl.int64)
            )
            sums += tl.where(digit[:, None] >= candidates, value[:, None], 0)
    share = tl.sum(sums, 0)
    at = tl.arange(0, RANGES)
    tl.atomic_add(
        tallies + (r * (ENTRIES - 1) + STEPS * SEARCH + STEP) * RANGES + at, share, mask=share > 0, sem="relaxed"
    )


@triton.jit(do_not_specialize=["R"])
def hold_kernel(
    weights,
    settings,
    tallies,
    entries,
    block_sums,
    block_ties,
    R,
    V,
    BLOCKS,
    SEARCH: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """What each block holds: block_sums [R, BLOCKS] int64 above the bar, block_ties [R, BLOCKS] int32 at it.
    SEARCH, the last one: -1 for none, 0 for top_k (everything at its bar stays), 1 for top_p (the first few do).
    Programs (R, blocks of V)."""
    r = tl.program_id(0).to(tl.int64)
    b = tl.program_id(1)
    bar = tl.full([], -1, tl.int64)
    ties = tl.full([], 0, tl.int64)
    if SEARCH >= 0:
        bar, goal = narrowed(tallies, entries, settings, r, R, STEPS - 1, SEARCH)
        if SEARCH == 0:
            bar -= 1
        else:
            each = tl.maximum((bar.to(tl.int32).to(tl.float32, bitcast=True) * UNIT).to(tl.int64), 1)
            ties = (goal + each - 1) // each
    if b == 0:
        tl.store(entries + (r * ENTRIES + ENTRIES - 1) * 2, bar)
        tl.store(entries + (r * ENTRIES + ENTRIES - 1) * 2 + 1, ties)
    v = b * BLOCK + tl.arange(0, BLOCK)
    w = tl.load(weights + r * V + v, mask=v < V, other=0)
    tl.store(
        block_sums + r * BLOCKS + b,
        tl.sum(tl.where(w > bar, (w.to(tl.float32, bitcast=True) * UNIT).to(tl.int64), 0), 0),
    )
    tl.store(block_ties + r * BLOCKS + b, tl.sum(((w == bar) & (v < V)).to(tl.int32), 0))


@triton.jit(do_not_specialize=["R"])
def draw_kernel(
    weights,
    settings,
    entries,
    block_sums,
    block_ties,
    best,
    ids,
    R,
    V,
    BLOCKS,
    BLOCK: tl.constexpr,
    MOST_BLOCKS: tl.constexpr,
):
    """ids [R] int64: the token that the row's number falls to, in the order of ids, or with a temperature of 0 the one
    in `best` [R]. BLOCKS <= MOST_BLOCKS. Programs (R)."""
    r = tl.program_id(0).to(tl.int64)
    bar = tl.load(entries + (r * ENTRIES + ENTRIES - 1) * 2)
    held_ties = tl.load(entries + (r * ENTRIES + ENTRIES - 1) * 2 + 1)
    each = tl.where(bar >= 0, (tl.maximum(bar, 0).to(tl.int32).to(tl.float32, bitcast=True) * UNIT).to(tl.int64), 0)
    b = tl.arange(0, MOST_BLOCKS)
    ties = tl.load(block_ties + r * BLOCKS + b, mask=b < BLOCKS, other=0).to(tl.int64)
    ties_before = tl.cumsum(ties, 0) - ties
    sums = tl.load(block_sums + r * BLOCKS + b, mask=b < BLOCKS, other=0)
    sums += each * tl.minimum(tl.maximum(held_ties - ties_before, 0), ties)
    total = tl.sum(sums, 0)
    target = (tl.load(settings + 4 * R + r) * total.to(tl.float64)).to(tl.int64)
    target = tl.minimum(target, total - 1)
    ends = tl.cumsum(sums, 0)
    # Without any weight at all it is the first.
    block = tl.sum((ends <= target).to(tl.int32), 0)
    before = tl.sum(tl.where(b == block, ends - sums, 0), 0)
    held_ties -= tl.sum(tl.where(b == block, ties_before, 0), 0)
    i = tl.arange(0, BLOCK)
    v = block * BLOCK + i
    w = tl.load(weights + r * V + v, mask=v < V, other=0)
    tie = (w == bar) & (v < V)
    held = (w > bar) | (tie & (tl.cumsum(tie.to(tl.int64), 0) <= held_ties))
    place = tl.sum(
        (tl.cumsum(tl.where(held, (w.to(tl.float32, bitcast=True) * UNIT).to(tl.int64), 0), 0) <= target - before).to(
            tl.int32
        ),
        0,
    )
    drawn = tl.minimum(block * BLOCK + place, V - 1).to(tl.int64)
    tl.store(ids + r, tl.where(tl.load(settings + r) > 0.0, drawn, tl.load(best + r)))
