"""The quantization config of compressed-tensors, read strictly and written in the form that other loaders read.

`config_groups` give schemes to targets: module paths, regular expressions ("re:..."), or the class "Linear". The most
specific target of a module holds, in that order, and among expressions the first in the order of the alphabet; `ignore`
holds before all. Only weight-only integer schemes are supported: what else a config asks for (quantized activations,
transforms, sparsity) would change the product, and is refused.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from importlib.metadata import version
from typing import Any

from dibit.engine.checkpoint.checkpoint import ModuleRule, Quantization
from dibit.engine.checkpoint.module_patterns import float_linears, module_patterns
from dibit.engine.checkpoint.packing import Facts
from dibit.engine.checkpoint.progress import PackedModule
from dibit.engine.checkpoint.quantization_config import MAX_PATTERN, checked_format, quantizer_of, whole_number
from dibit.engine.errors import CheckpointError
from dibit.kernels.formats import PER_CHANNEL, Format

FORMAT = "pack-quantized"
_LINEAR = "Linear"
_ADVICE = "quantize the float model with `dibit quantize`, or use a weight-only checkpoint of it"
_NEUTRAL: tuple[object, ...] = (None, {}, [], False)
# Each of these would change the weights or what is computed from them.
_MUST_BE_UNSET = ("kv_cache_scheme", "transform_config", "moe_sparsity_config")
_MUST_BE_UNSET_IN_GROUP = ("input_activations", "output_activations")
# Columns reordered only while quantizing leave no trace in the file; by "group" they need a g_idx, which is checked.
_ORDERS = (None, False, "static", "weight", "group", "dynamic", True)


@dataclass(frozen=True)
class _Scheme:
    format: Format
    symmetric: bool


def parse_compressed_tensors(raw: Mapping[str, Any], source: str) -> Quantization:
    """Raises CheckpointError on another packing than pack-quantized, and on schemes that are not supported."""
    _check_format(raw.get("format"), source, mixed=True)
    for key in _MUST_BE_UNSET:
        if raw.get(key) not in _NEUTRAL:
            raise CheckpointError(f"{source} sets {key}, which is not supported; {_ADVICE}")
    sparsity = raw.get("sparsity_config")
    if sparsity not in _NEUTRAL and not (isinstance(sparsity, dict) and sparsity.get("format") in (None, "dense")):
        raise CheckpointError(f"{source} sets sparsity_config, which is not supported; {_ADVICE}")
    groups = raw.get("config_groups")
    if not isinstance(groups, dict) or not groups:
        raise CheckpointError(f"{source} has no config_groups; the config is damaged, download it again")
    targets: dict[str, _Scheme] = {}
    for name, group in groups.items():
        where = f"{source}, config group {name!r}"
        scheme = _scheme(group, where)
        for target in _strings(group.get("targets"), "targets", where):
            targets[target] = scheme
    default = targets.get(_LINEAR)
    first = default or next(iter(targets.values()), None)
    if first is None:
        raise CheckpointError(f"{source} has config_groups without targets; the config is damaged, download it again")
    ignored = _strings(raw.get("ignore") or [], "ignore", source)
    rules = [ModuleRule(_pattern(item, source), None) for item in ignored]
    # Names sort before expressions here as in the library, which orders by ("re:" in target, target).
    for target in sorted(targets, key=lambda t: ("re:" in t, t)):
        if target != _LINEAR:
            scheme = targets[target]
            rules.append(ModuleRule(_pattern(target, source), scheme.format, scheme.symmetric))
    if default is None:
        rules.append(ModuleRule("", None))
    return Quantization(
        method="compressed-tensors",
        bits=first.format.bits,
        group_size=first.format.group_size,
        symmetric=first.symmetric,
        checkpoint_format="pack-quantized",
        quantizer=quantizer_of(raw),
        dynamic=tuple(rules),
    )


def compressed_tensors_config(
    modules: Mapping[str, PackedModule], names: Iterable[str], *, method: str | None, facts: Facts
) -> dict[str, Any]:
    """See packing.Export.config. The most common scheme stands for all of "Linear", expressions name the others."""
    kinds: dict[str, tuple[int, int, bool] | None] = {
        module: (info.bits, info.group_size, info.symmetric) for module, info in modules.items()
    }
    default, _ = Counter(kinds.values()).most_common(1)[0]
    kinds.update(dict.fromkeys(float_linears(names, modules)))
    found: dict[tuple[int, int, bool] | None, list[str]] = {default: [_LINEAR], None: []}
    for pattern, kind in module_patterns(kinds, default):
        found.setdefault(kind, []).append(f"re:{pattern}")
    ignore = found.pop(None) + ([] if "lm_head" in modules else ["lm_head"])
    return {
        "quant_method": "compressed-tensors",
        "format": FORMAT,
        "quantization_status": "compressed",
        "global_compression_ratio": None,
        "kv_cache_scheme": None,
        "ignore": ignore,
        "config_groups": {
            f"group_{number}": _group(targets, *kind)
            for number, (kind, targets) in enumerate(found.items())
            if kind is not None
        },
        "meta": {"quantizer": f"dibit:{version('dibit')}", "method": method, **facts},
    }


def _group(targets: list[str], bits: int, group_size: int, symmetric: bool) -> dict[str, Any]:  # noqa: FBT001
    channel = group_size == PER_CHANNEL
    return {
        "targets": targets,
        "weights": {
            "num_bits": bits,
            "type": "int",
            "symmetric": symmetric,
            "strategy": "channel" if channel else "group",
            "group_size": None if channel else group_size,
            "dynamic": False,
            "actorder": None,
        },
        "input_activations": None,
        "output_activations": None,
    }


def _scheme(group: Any, where: str) -> _Scheme:
    if not isinstance(group, dict):
        raise CheckpointError(f"{where} is {group!r:.60}; expected an object with targets and weights, spelled out")
    _check_format(group.get("format"), where, mixed=False)
    for key in _MUST_BE_UNSET_IN_GROUP:
        if group.get(key) not in _NEUTRAL:
            raise CheckpointError(f"{where} sets {key}: only weights may be quantized here; {_ADVICE}")
    weights = group.get("weights")
    if not isinstance(weights, dict):
        raise CheckpointError(f"{where} has weights {weights!r:.60}; expected an object with num_bits and strategy")
    for key, value, allowed in (
        ("type", weights.get("type", "int"), ("int",)),
        ("strategy", weights.get("strategy"), ("group", "channel")),
        ("dynamic", weights.get("dynamic", False), (False, None)),
        ("actorder", weights.get("actorder"), _ORDERS),
        ("symmetric", weights.get("symmetric", True), (True, False)),
    ):
        if value not in allowed:
            raise CheckpointError(
                f"{where} has weights with {key} {value!r}; supported: {', '.join(map(str, allowed))}. To use this "
                f"model, {_ADVICE}"
            )
    bits = whole_number(weights.get("num_bits"), "num_bits", where)
    channel = weights["strategy"] == "channel"
    size = PER_CHANNEL if channel else whole_number(weights.get("group_size"), "group_size", where)
    return _Scheme(checked_format(bits, size, where), bool(weights.get("symmetric", True)))


def _check_format(found: Any, where: str, *, mixed: bool) -> None:
    allowed = (FORMAT, "mixed-precision") if mixed else (FORMAT, None)
    if found not in allowed:
        raise CheckpointError(
            f"{where} is compressed-tensors of format {found!r}; supported: {FORMAT}. To use this model, {_ADVICE}"
        )


def _strings(value: Any, key: str, where: str) -> list[str]:
    if not isinstance(value, list) or not all(isinstance(item, str) and item for item in value):
        raise CheckpointError(f"{where} has {key} {value!r:.60}; expected a list of names or `re:` expressions")
    return value


def _pattern(target: str, where: str) -> str:
    """A regular expression for `re.match` from a target."""
    if len(target) > MAX_PATTERN:
        raise CheckpointError(f"{where} has a target of {len(target)} characters; at most {MAX_PATTERN} are accepted")
    if not target.startswith("re:"):
        return re.escape(target) + "$"
    try:
        re.compile(target[3:])
    except re.error as error:
        raise CheckpointError(f"{where}: {target[:80]!r} is no regular expression: {error}") from error
    return target[3:]
