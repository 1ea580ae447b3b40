"""The `quantization_config` of a checkpoint that dibit writes, in the form other GPTQ loaders read.

Where formats differ between linears, the most common one stands at the top and `dynamic` names the others.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping
from importlib.metadata import version
from typing import Any

from dibit.engine.checkpoint.module_patterns import float_linears, module_patterns
from dibit.engine.checkpoint.progress import PackedModule
from dibit.kernels.formats import ZeroGrid

# Bits, group size and zero grid of a linear; None: in float.
_Kind = tuple[int, int, ZeroGrid] | None


def quantization_config(
    modules: Mapping[str, PackedModule],
    names: Iterable[str],
    *,
    method: str | None,
    facts: Mapping[str, str | int | float | bool | None],
) -> dict[str, Any]:
    """
    modules  every packed linear
    names    every tensor of the checkpoint; linears of layers that are not packed are declared float

    `zero_grid` is written where any linear has another than whole zero points, which only fractional.py may.
    """
    packed = {module: (info.bits, info.group_size, info.zero_grid) for module, info in modules.items()}
    kinds: dict[str, _Kind] = {**packed}
    (bits, group_size, zero_grid), _ = Counter(packed.values()).most_common(1)[0]
    kinds.update(dict.fromkeys(float_linears(names, modules)))
    config: dict[str, Any] = {
        "quant_method": "gptq",
        "checkpoint_format": "gptq_v2",
        "bits": bits,
        "group_size": group_size,
        "desc_act": False,
        "sym": all(info.symmetric for info in modules.values()),
        "lm_head": "lm_head" in modules,
        "pack_dtype": "int32",
        "meta": {"quantizer": f"dibit:{version('dibit')}", "method": method, **facts},
    }
    if any(grid != "integer" for _, _, grid in packed.values()):
        config["zero_grid"] = zero_grid
    dynamic = _dynamic(kinds, (bits, group_size, zero_grid))
    if dynamic:
        config["dynamic"] = dynamic
    return config


def _dynamic(kinds: Mapping[str, _Kind], default: tuple[int, int, ZeroGrid]) -> dict[str, dict[str, int | str]]:
    rules: dict[str, dict[str, int | str]] = {}
    for pattern, kind in module_patterns(kinds, default):
        if kind is None:
            rules[f"-:{pattern}"] = {}
        else:
            grid = {} if kind[2] == default[2] else {"zero_grid": kind[2]}
            rules[f"+:{pattern}"] = {"bits": kind[0], "group_size": kind[1], **grid}
    return rules
