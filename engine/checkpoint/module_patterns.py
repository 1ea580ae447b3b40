"""Regular expressions that name linear modules, so that a config with mixed formats stays short and readable.

A layer that has one kind throughout gets one pattern, which also matches the fused names (qkv_proj) of other loaders.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Container, Hashable, Iterable, Mapping
from typing import TypeVar

Kind = TypeVar("Kind", bound=Hashable)
_LAYER = re.compile(r"(.*\.layers)\.(\d+)\.(.+)")


def float_linears(names: Iterable[str], packed: Container[str]) -> list[str]:
    """Projections inside layers that were left in float. Norms have no such name in any supported family.

    names   every tensor of the checkpoint
    packed  every packed module
    """
    found = [name.removesuffix(".weight") for name in names if name.endswith("_proj.weight")]
    return [module for module in found if _LAYER.fullmatch(module) and module not in packed]


def module_patterns(kinds: Mapping[str, Kind], default: Kind) -> list[tuple[str, Kind]]:
    """Patterns, to be matched from the start of a module's path, for all modules that are not of kind `default`.

    No two patterns match one module, so their order means nothing.
    """
    layers: dict[tuple[str, str], dict[str, Kind]] = defaultdict(dict)
    rules: list[tuple[str, Kind]] = []
    for module, kind in kinds.items():
        match = _LAYER.fullmatch(module)
        if match:
            layers[match[1], match[2]][match[3]] = kind
        elif kind != default:
            rules.append((re.escape(module) + "$", kind))
    whole: dict[tuple[str, Kind], list[str]] = defaultdict(list)
    parts: dict[tuple[str, str, Kind], list[str]] = defaultdict(list)
    for (prefix, layer), own in layers.items():
        if len(set(own.values())) == 1:
            whole[prefix, next(iter(own.values()))].append(layer)
        else:
            for module, kind in own.items():
                parts[prefix, module, kind].append(layer)
    for (prefix, module, kind), numbers in parts.items():
        if kind != default:
            rules.append((rf"{re.escape(prefix)}\.{_either(numbers)}\.{re.escape(module)}$", kind))
    for (prefix, kind), numbers in whole.items():
        if kind != default:
            rules.append((rf"{re.escape(prefix)}\.{_either(numbers)}\.", kind))
    return rules


def _either(numbers: list[str]) -> str:
    return numbers[0] if len(numbers) == 1 else f"(?:{'|'.join(numbers)})"


def in_a_layer(module: str) -> bool:
    return _LAYER.fullmatch(module) is not None
