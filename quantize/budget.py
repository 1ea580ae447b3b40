"""From a budget to bits per block: each block gets one width, the important ones a wider one; or each site of a block,
as the linears that are computed together share their width. What is said of blocks here holds for such units.

Widening blocks one after another in a fixed sequence of steps, and stopping before the first step that no longer
fits, has two consequences on purpose: the budget is never exceeded, and a larger budget never takes a bit away from
any block. The sequence comes from the importance (importance.py):

- from an order, by rungs: every block goes from the lowest width to the next in order of importance, then every block
  from there to the one after. With two widths this is the method of the paper: the k most important blocks get the
  higher.
- from measured damage at several widths, by what a step saves for each bit that it costs, the largest first; steps of
  one block that would save more together than the first alone are taken together (the lower convex hull of its curve
  of damage over bits, on which steps are optimal for the sum of damages).

Costs are counted in whole bits of codes, or whole bytes of the checkpoint, so that comparisons are exact.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction
from typing import Any

from dibit.engine.errors import ConfigError
from dibit.engine.models.spec import LinearSite
from dibit.kernels.formats import BITS, PER_CHANNEL, Format
from dibit.quantize.importance import IMPORTANCES, Importance, ImportanceKind
from dibit.quantize.plan import Plan

SAMPLES = 16
MEASURED_SAMPLES = 4


@dataclass(frozen=True)
class Budget:
    """What may be spent, and how it is divided.

    mean_bits    most bits of code per quantized weight on average; scales and zero points come on top, or
    total_bytes  most bytes of the whole checkpoint: tensors, configs and tokenizer, without the reports of the run
    choices      widths to choose from
    importance   what tells which blocks get more
    reverse      the least important ones get more instead: for comparison
    per_site     every site (q, k and v; o; gate and up; down) gets its own width; with importance "fisher"
    samples      calibration sequences that the importance looks at, at most; left out: 16, or 4 for "measured", which
                 takes far more work for each
    """

    mean_bits: float | None = None
    total_bytes: int | None = None
    choices: tuple[int, ...] = BITS
    importance: ImportanceKind = "lim"
    reverse: bool = False
    samples: int | None = None
    per_site: bool = False

    def __post_init__(self) -> None:
        if (self.mean_bits is None) == (self.total_bytes is None):
            raise ConfigError("give a budget either as bits per weight or as a size")
        if self.mean_bits is not None and not (self.mean_bits > 0 and math.isfinite(self.mean_bits)):
            raise ConfigError(f"a budget of {self.mean_bits} bits per weight; give for example 2.85")
        unknown = sorted(set(self.choices) - set(BITS))
        if unknown or not self.choices:
            found = ", ".join(map(str, unknown)) or "none"
            raise ConfigError(f"widths to choose from: {found}; supported: {', '.join(map(str, BITS))}")
        if self.importance not in IMPORTANCES:
            raise ConfigError(f"importance {self.importance!r} is not known; supported: {', '.join(IMPORTANCES)}")
        if self.per_site and self.importance != "fisher":
            raise ConfigError(f"importance {self.importance!r} tells of whole blocks; widths per linear need fisher")
        if self.samples is not None and self.samples < 1:
            raise ConfigError(f"importance samples is {self.samples}; it must be at least 1")
        if self.samples is None:
            object.__setattr__(self, "samples", MEASURED_SAMPLES if self.importance == "measured" else SAMPLES)
        object.__setattr__(self, "choices", tuple(sorted(set(self.choices))))


@dataclass(frozen=True)
class Allocation:
    """What a budget came to.

    budget      what was asked for
    importance  the scores that decided
    bits        width of every unit: of every block, or of every site
    units       their names, "layers.3" or "layers.3.down"
    mean_bits   bits of code per quantized weight on average
    """

    budget: Budget
    importance: Importance
    bits: tuple[int, ...]
    mean_bits: float
    units: tuple[str, ...]

    def plan(self, group_size: int) -> Plan:
        """The plan of these widths: the most common one as the default, an override for every other."""
        counts = {bits: self.bits.count(bits) for bits in sorted(set(self.bits))}
        default = max(counts, key=counts.__getitem__)
        plan = Plan.uniform(Format(default, group_size))
        for bits in counts:
            if bits != default:
                names = [name for name, own in zip(self.units, self.bits, strict=True) if own == bits]
                plan = plan.override(_pattern(names, whole=not self.budget.per_site), Format(bits, group_size))
        return plan

    def to_dict(self) -> dict[str, Any]:
        """For the report of the run."""
        importance = self.importance
        return {
            "budget": dataclasses.asdict(self.budget),
            "scores": list(importance.scores),
            "damage": {str(bits): list(values) for bits, values in importance.damage.items()},
            "order": list(importance.order(reverse=self.budget.reverse)),
            "bits": list(self.bits),
            "mean_bits": self.mean_bits,
            "units": list(self.units),
        }

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Allocation:
        """Inverse of to_dict, also after JSON."""
        budget = Budget(**{**data["budget"], "choices": tuple(data["budget"]["choices"])})
        damage = {int(bits): tuple(values) for bits, values in data["damage"].items()}
        importance = Importance(budget.importance, tuple(data["scores"]), damage)
        return cls(budget, importance, tuple(data["bits"]), data["mean_bits"], tuple(data["units"]))


def _pattern(names: Sequence[str], *, whole: bool) -> str:
    """Of the blocks of those names, or of the sites."""
    either = "|".join(name.removeprefix("layers.").replace(".", r"\.") for name in names)
    return rf"layers\.({either})" + (r"\..*" if whole else "")


Step = tuple[int, int]  # block, its new width


def allocate(
    costs: Sequence[Mapping[int, int]], steps: Sequence[Step], *, choices: Sequence[int], limit: Fraction
) -> tuple[int, ...]:
    """Width of every block: the lowest, and then as many of `steps`, one after another, as `limit` has room for.

    costs[i][b] is the cost of block i at width b, larger for wider ones. Raises ValueError when even the lowest
    widths exceed the limit.
    """
    lowest = min(choices)
    bits = [lowest] * len(costs)
    total = sum(cost[lowest] for cost in costs)
    if total > limit:
        raise ValueError(f"{total} at the lowest widths, above {limit}")
    for block, wider in steps:
        total += costs[block][wider] - costs[block][bits[block]]
        if total > limit:
            break
        bits[block] = wider
    return tuple(bits)


def widening_steps(
    importance: Importance, costs: Sequence[Mapping[int, int]], *, choices: Sequence[int], reverse: bool
) -> list[Step]:
    """The sequence in which blocks are widened; every block's widths rise in it from the lowest to the highest."""
    choices = sorted(choices)
    order = importance.order(reverse=reverse)
    if reverse or len(choices) < 3 or not importance.damage:
        return [(block, wider) for wider in choices[1:] for block in order]
    found: list[tuple[float, int, Step]] = []
    for rank, block in enumerate(order):
        # At the highest width nothing is measured; what is left there is small beside every lower one's.
        curve = {bits: importance.damage[bits][block] if bits in importance.damage else 0.0 for bits in choices}
        found.extend((-rate, rank, (block, wider)) for rate, wider in _hull(curve, costs[block]))
    # Rates fall along a hull, and the sort is stable, so that a block's steps stay in their order.
    return [step for _, _, step in sorted(found, key=lambda entry: entry[:2])]


def _hull(curve: Mapping[int, float], cost: Mapping[int, int]) -> list[tuple[float, int]]:
    """(damage saved per cost, width) along the lower convex hull of one block's curve, from the lowest width up."""
    steps: list[tuple[float, int]] = []
    widths = sorted(curve)
    at = 0
    while at < len(widths) - 1:
        here = widths[at]
        rates = {
            i: (curve[here] - curve[widths[i]]) / (cost[widths[i]] - cost[here]) for i in range(at + 1, len(widths))
        }
        # Of equal rates the nearest, so that steps stay small.
        at = max(rates, key=lambda i: (rates[i], -i))
        # Rounding must not let a later step of a block look better than the one it rests on.
        rate = min(rates[at], steps[-1][0]) if steps else rates[at]
        steps.append((rate, widths[at]))
    return steps


def code_bits(sites: Sequence[LinearSite], bits: int) -> int:
    """Bits of the codes alone."""
    return sum(site.n * site.k for site in sites) * bits


def packed_bytes(sites: Sequence[LinearSite], format: Format) -> int:
    """Bytes of the tensors in which a GPTQ checkpoint holds these linears."""
    total = 0
    for site in sites:
        groups = 1 if format.group_size == PER_CHANNEL else site.k // format.group_size
        codes, zeros, scales = (
            site.n * site.k * format.bits // 8,
            groups * site.n * format.bits // 8,
            2 * groups * site.n,
        )
        total += codes + zeros + scales + 4 * site.k * len(site.parts)
    return total
