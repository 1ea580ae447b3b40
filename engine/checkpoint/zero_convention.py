"""Which of GPTQ's two zero conventions a checkpoint follows: v1 (z = field + 1) or v2 (z = field).

The label is not enough: tools have written v2 zeros under the label of v1. A symmetric module decides by itself, all
its fields being 2^(bits-1) - 1 or 2^(bits-1). Otherwise the weights do: the mean of a group, in units of its scale, is
mean(codes) - z, and lies near 0 when z is read rightly and near 1 or -1 when it is not. At 8 bits a step is too small
a part of the range for that to tell, and the label holds.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from dibit.engine.checkpoint.checkpoint import Quantization, ZeroConvention, ZeroDecision
from dibit.engine.checkpoint.packing import Sample

SAMPLED_MODULES = 8
# Distance from the midpoint between the two readings at which the means count as evidence.
DECISIVE = 0.2
_MAX_BITS_FOR_MEANS = 4


@dataclass(frozen=True)
class _Evidence:
    symmetric: ZeroConvention | None
    offset: float | None


def decide_zeros(quantization: Quantization, modules: Iterable[Sample]) -> tuple[ZeroDecision, bool]:
    """The convention from label, tool and the values of some `modules`. No label but `gptq` means version 1.

    returns  the decision, and whether it contradicts the label
    """
    declared: ZeroConvention = "v1" if quantization.checkpoint_format == "gptq" else "v2"
    label = f"labelled {quantization.checkpoint_format}" + (
        f" by {quantization.quantizer}" if quantization.quantizer else ""
    )
    evidence = [_weigh(module) for module in modules]
    votes = {e.symmetric for e in evidence if e.symmetric is not None}
    if len(votes) == 1:
        found = votes.pop()
        field = "2^(bits-1)" if found == "v2" else "2^(bits-1) - 1"
        return ZeroDecision(found, f"{label}; symmetric zero fields are {field}, so {found}"), found != declared
    offsets = [e.offset for e in evidence if e.offset is not None]
    if not offsets:
        return ZeroDecision(declared, f"{label}; values do not tell, so {declared}"), False
    mean = sum(offsets) / len(offsets)
    if abs(mean - 0.5) < DECISIVE:
        reason = f"{label}; group means do not tell (codes lie {mean:+.2f} steps from the fields), so {declared}"
        return ZeroDecision(declared, reason), False
    found = "v1" if mean > 0.5 else "v2"
    reason = f"{label}; codes lie {mean:+.2f} steps from the zero fields on average, so {found}"
    return ZeroDecision(found, reason), found != declared


def _weigh(sample: Sample) -> _Evidence:
    fields, bits = sample.fields, sample.format.bits
    first = int(fields[0, 0])
    middle = 1 << (bits - 1)
    if first in (middle, middle - 1) and bool((fields == first).all()):
        return _Evidence("v2" if first == middle else "v1", None)
    if bits > _MAX_BITS_FOR_MEANS:
        return _Evidence(None, None)
    return _Evidence(None, _offset(sample))


def _offset(sample: Sample) -> float:
    codes = sample.codes
    fields = sample.fields[: codes.shape[0]]
    means = codes.reshape(*fields.shape, -1).float().mean(dim=2)
    return float((means - fields.float()).mean())
