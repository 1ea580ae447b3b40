"""The quantization methods by name: one file each, and a line here."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

from dibit.engine.errors import ConfigError
from dibit.quantize.block import BlockMethod
from dibit.quantize.methods.affinequant import AffineQuant
from dibit.quantize.methods.awq import AWQ
from dibit.quantize.methods.block_ap import BlockAP
from dibit.quantize.methods.efficientqat import EfficientQAT
from dibit.quantize.methods.gptq import GPTQ
from dibit.quantize.methods.omniquant import OmniQuant
from dibit.quantize.methods.rtn import RTN
from dibit.quantize.methods.smoothquant import SmoothQuant
from dibit.quantize.stats import Method

METHODS: dict[str, type[Method] | type[BlockMethod]] = {
    "rtn": RTN,
    "gptq": GPTQ,
    "awq": AWQ,
    "smoothquant": SmoothQuant,
    "omniquant": OmniQuant,
    "affinequant": AffineQuant,
    "block-ap": BlockAP,
    "efficientqat": EfficientQAT,
}


def make_method(name: str, options: Mapping[str, Any]) -> Method | BlockMethod:
    """The method `name` with `options` as its fields. Raises ConfigError for an unknown name or option."""
    if name not in METHODS:
        raise ConfigError(f"quantization method {name!r}; supported: {', '.join(METHODS)}")
    kind: Any = METHODS[name]
    known = [field.name for field in dataclasses.fields(kind)]
    unknown = sorted(set(options) - set(known))
    if unknown:
        raise ConfigError(f"method {name} has no option {', '.join(unknown)}; it has: {', '.join(known)}")
    method: Method | BlockMethod = kind(**options)
    return method
