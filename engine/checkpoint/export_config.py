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

_Kind = tuple[int, int] | None


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
    """
    kinds: dict[str, _Kind] = {module: (info.bits, info.group_size) for module, info in modules.items()}
    (bits, group_size), _ = Counter((info.bits, info.group_size) for info in modules.values()).most_common(1)[0]
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
    dynamic = _dynamic(kinds, (bits, group_size))
    if dynamic:
        config["dynamic"] = dynamic
    return config


def _dynamic(kinds: Mapping[str, _Kind], default: _Kind) -> dict[str, dict[str, int]]:
    rules: dict[str, dict[str, int]] = {}
    for pattern, kind in module_patterns(kinds, default):
        rules |= _rule(pattern, kind)
    return rules


def _rule(pattern: str, kind: _Kind) -> dict[str, dict[str, int]]:
    return {f"-:{pattern}": {}} if kind is None else {f"+:{pattern}": {"bits": kind[0], "group_size": kind[1]}}
