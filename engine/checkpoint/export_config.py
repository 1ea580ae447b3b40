"""The `quantization_config` of a checkpoint that dibit writes, in the form other GPTQ loaders read.

Where formats differ between linears, the most common one stands at the top and `dynamic` names the others. A layer
that has one format throughout gets one pattern, which also matches the fused names (qkv_proj) of other loaders.
"""

from __future__ import annotations

import re
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping
from importlib.metadata import version
from typing import Any

from dibit.engine.checkpoint.progress import PackedModule

_LAYER = re.compile(r"(.*\.layers)\.(\d+)\.(.+)")
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
    kinds.update(dict.fromkeys(_float_linears(names, modules)))
    config: dict[str, Any] = {
        "quant_method": "gptq",
        "checkpoint_format": "gptq_v2",
        "bits": bits,
        "group_size": group_size,
        "desc_act": False,
        "sym": all(info.symmetric for info in modules.values()),
        "lm_head": False,
        "pack_dtype": "int32",
        "meta": {"quantizer": f"dibit:{version('dibit')}", "method": method, **facts},
    }
    dynamic = _dynamic(kinds, (bits, group_size))
    if dynamic:
        config["dynamic"] = dynamic
    return config


def _float_linears(names: Iterable[str], modules: Mapping[str, PackedModule]) -> list[str]:
    """Projections inside layers that were left in float. Norms have no such name in any supported family."""
    found = [name.removesuffix(".weight") for name in names if name.endswith("_proj.weight")]
    return [module for module in found if _LAYER.fullmatch(module) and module not in modules]


def _dynamic(kinds: Mapping[str, _Kind], default: _Kind) -> dict[str, dict[str, int]]:
    layers: dict[tuple[str, str], dict[str, _Kind]] = defaultdict(dict)
    rules: dict[str, dict[str, int]] = {}
    for module, kind in kinds.items():
        match = _LAYER.fullmatch(module)
        if match:
            layers[match[1], match[2]][match[3]] = kind
        elif kind != default:
            rules |= _rule(re.escape(module) + "$", kind)
    whole: dict[tuple[str, _Kind], list[str]] = defaultdict(list)
    parts: dict[tuple[str, str, _Kind], list[str]] = defaultdict(list)
    for (prefix, layer), own in layers.items():
        if len(set(own.values())) == 1:
            whole[prefix, next(iter(own.values()))].append(layer)
        else:
            for module, kind in own.items():
                parts[prefix, module, kind].append(layer)
    for (prefix, module, kind), numbers in parts.items():
        if kind != default:
            rules |= _rule(rf"{re.escape(prefix)}\.{_either(numbers)}\.{re.escape(module)}$", kind)
    for (prefix, kind), numbers in whole.items():
        if kind != default:
            rules |= _rule(rf"{re.escape(prefix)}\.{_either(numbers)}\.", kind)
    return rules


def _either(numbers: list[str]) -> str:
    return numbers[0] if len(numbers) == 1 else f"(?:{'|'.join(numbers)})"


def _rule(pattern: str, kind: _Kind) -> dict[str, dict[str, int]]:
    return {f"-:{pattern}": {}} if kind is None else {f"+:{pattern}": {"bits": kind[0], "group_size": kind[1]}}
