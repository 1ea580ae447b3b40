"""How one low-bit product is cut into programs: a function of shapes and of the GPU alone, or what was measured there.

`splits` and `run` depend on the weight and the GPU, never on the number of tokens: they decide the order in which
products are added, and a token's bits must not depend on its company.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field, replace

from dibit.kernels.formats import PER_CHANNEL, Format
from dibit.kernels.triton.layout import TILE_ROWS, Geometry

MAX_SPLITS = 16
MIN_RUN_STEPS = 4
PROGRAMS_PER_PROCESSOR = 3
SIDE_BY_SIDE_TOKENS = 64
"""Above this many tokens there are programs enough without computing the runs side by side."""
INTEGER_TOKENS = 32
"""Up to so many tokens memory is the limit, and integer products would be no faster."""
_INTEGER_COLUMNS = {80: 128, 90: math.inf, 100: 128}
"""Of a group, at least, by architecture. Where float16 is fast, scaling costs what integer products save."""
_EXACT = 1 << 24
WARPGROUPS = range(90, 120)
"""Architectures whose matrix instructions may be four warps'."""


@dataclass(frozen=True)
class Gpu:
    """processors: SMs. arch: compute capability as a number, 8.6 is 86."""

    processors: int
    arch: int


@dataclass(frozen=True)
class Plan:
    """block_rows x block_tokens outputs a program; `splits` runs of `run` steps, side by side when `partial`."""

    block_rows: int
    block_tokens: int
    splits: int
    run: int
    partial: bool
    warps: int
    stages: int

    def padded_tokens(self, m: int) -> int:
        return -(-m // self.block_tokens) * self.block_tokens


@dataclass(frozen=True)
class Config:
    """How a program computes its block; nothing that decides the order of a sum."""

    block_rows: int
    warps: int
    stages: int


CONFIGS = {
    "narrow": Config(64, 4, 3),
    "narrow-deep": Config(64, 4, 5),
    "narrow-pair": Config(64, 2, 4),
    "wide": Config(128, 4, 3),
    "wide-deep": Config(128, 4, 4),
    "wide-8": Config(128, 8, 3),
}
"""What autotune.py tries, by name."""


@dataclass(frozen=True)
class Tuned:
    """What was measured to be best for a weight's shape: splits, and names in CONFIGS by the tokens of a block. What is
    left out is what `plan` would choose."""

    splits: int | None = None
    configs: Mapping[int, str] = field(default_factory=dict)


def takes_integers(format: Format, geometry: Geometry, tokens: int, *, gpu: Gpu, activation_bits: int | None) -> bool:
    """Whether activations rounded to `activation_bits` meet a weight on integer tensor cores.

    Only where float32 holds the sums, so that products of fewer tokens, in float16, are the same to the bit; and where
    no step has several groups, except at 3 bits, whose fields stay within theirs (eight sums of groups of 32 would
    spill). A row of 8-bit codes would need sums of activations by run.
    """
    if activation_bits is None or tokens <= INTEGER_TOKENS:
        return False
    per_channel = format.group_size == PER_CHANNEL
    if per_channel and format.bits == 8:
        return False
    if not per_channel and format.group_size < _INTEGER_COLUMNS.get(gpu.arch, 0):
        return False
    columns = geometry.columns if per_channel else format.group_size
    exact = columns * format.qmax * (1 << (activation_bits - 1)) <= _EXACT
    return exact and geometry.groups_per_step <= (4 if format.bits == 3 else 1)


def runs(geometry: Geometry, padded_rows: int, *, processors: int) -> tuple[int, int]:
    """(splits, steps of a run): enough programs to keep `processors` busy, no run too short to fill a pipeline."""
    tiles = padded_rows // TILE_ROWS
    wanted = -(-PROGRAMS_PER_PROCESSOR * processors // tiles)
    splits = max(1, min(MAX_SPLITS, geometry.steps // MIN_RUN_STEPS, wanted))
    run = -(-geometry.steps // splits)
    return -(-geometry.steps // run), run


def plan(
    geometry: Geometry, padded_rows: int, m: int, *, gpu: Gpu, tuned: Tuned | None = None, integers: bool = False
) -> Plan:
    """The plan of a product of `m` tokens with a weight of `padded_rows` rows on `gpu`; `integers`: see
    `takes_integers`."""
    splits, run = runs(geometry, padded_rows, processors=gpu.processors)
    if tuned is not None and tuned.splits is not None:
        run = -(-geometry.steps // min(tuned.splits, geometry.steps))
        splits = -(-geometry.steps // run)
    partial = splits > 1 and m <= SIDE_BY_SIDE_TOKENS
    if integers:
        # Half as many reads of activations as with 64 rows; four warps for 128 rows would spill.
        rows = 2 * TILE_ROWS if padded_rows % (2 * TILE_ROWS) == 0 else TILE_ROWS
        return Plan(rows, 64, splits, run, partial, warps=rows // 16, stages=3)
    # Four warps on Hopper and data-centre Blackwell become a warpgroup, whose matrix instructions cost a step of few
    # tokens more instructions than the ordinary ones do (2.3 a 2-bit weight against 1.7) and, on Blackwell, a trip
    # through tensor memory for every plane; two warps cannot.
    warpgroups = gpu.arch in WARPGROUPS
    # Several groups a step hold several scales and sums at once, which the registers must have room for.
    several = geometry.groups_per_step > 2
    most = 16 if several and warpgroups else 32 if several or 100 <= gpu.arch < 120 else 64
    block_tokens = next((b for b in (8, 16, 32) if m <= b), most)
    pairs = warpgroups and block_tokens in (16, 32)
    wide = (
        not several
        and not (pairs and block_tokens == 32)
        and padded_rows % (2 * TILE_ROWS) == 0
        and padded_rows // TILE_ROWS * splits >= 2 * gpu.processors
    )
    chosen = Plan(
        block_rows=2 * TILE_ROWS if wide else TILE_ROWS,
        block_tokens=block_tokens,
        splits=splits,
        run=run,
        partial=partial,
        warps=2 if pairs else 8 if wide and block_tokens == 64 else 4,
        stages=4 if block_tokens <= 16 else 3,
    )
    name = None if tuned is None else tuned.configs.get(block_tokens)
    return chosen if name is None or not fits(name, chosen, padded_rows, gpu=gpu) else configured(chosen, CONFIGS[name])


def fits(name: str, chosen: Plan, padded_rows: int, *, gpu: Gpu) -> bool:
    """Whether a configuration cuts a weight of `padded_rows` rows evenly and computes with the instructions that
    `chosen` would: warpgroups' may round otherwise, and a token's bits must not depend on its company."""
    config = CONFIGS[name]
    same = gpu.arch not in WARPGROUPS or chosen.block_tokens == 8 or (config.warps < 4) == (chosen.warps < 4)
    return same and padded_rows % config.block_rows == 0


def configured(chosen: Plan, config: Config) -> Plan:
    return replace(chosen, block_rows=config.block_rows, warps=config.warps, stages=config.stages)
