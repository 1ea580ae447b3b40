"""Reading `quantization_config` (config.json) or quantize_config.json strictly.

This file is GPTQ's; dispatch.py has the other formats. Everything that changes how packed words are read is understood
or refused; keys that only tell how the model was calibrated are left alone.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any, cast

from dibit.engine.checkpoint.checkpoint import CheckpointFormat, ModuleRule, Quantization
from dibit.engine.errors import CheckpointError
from dibit.kernels.formats import Format, FormatError, ZeroGrid
from dibit.kernels.qlinear import ACTIVATION_BITS

SUPPORTED = (
    "GPTQ (checkpoint_format gptq or gptq_v2; 2, 3, 4 or 8 bits; no act-order), AWQ (version gemm), compressed-tensors "
    "(pack-quantized), EfficientQAT, BitBLAS, dibit's own, or an unquantized model"
)
MAX_PATTERN = 1000
_ALIASES = {
    "bits": ("bits", "w_bit", "wbits"),
    "group_size": ("group_size", "q_group_size", "groupsize"),
    "checkpoint_format": ("checkpoint_format", "format"),
    "quant_method": ("quant_method", "method"),
}
_HINTS = {
    "auto-round": "export it again with format auto_gptq",
}
# Each of these would change what the packed words mean or what is added to the product.
_MUST_BE_UNSET = ("is_marlin_format", "adapter", "lora")


def parse_quantization(raw: Mapping[str, Any], source: str, *, default_method: str | None = None) -> Quantization:
    """`source` names the file in messages; `default_method` holds where quant_method is absent.

    Raises CheckpointError on another method, an unsupported format, or contradictory keys.
    """
    method = alias(raw, "quant_method", source) or default_method
    if method != "gptq":
        found = f"quant_method {method!r}" if method else "no quant_method"
        hint = _HINTS.get(str(method), "quantize the float model with `dibit quantize`, or use a GPTQ checkpoint of it")
        raise CheckpointError(f"{source} has {found}; supported: {SUPPORTED}. To use this model, {hint}")
    label = alias(raw, "checkpoint_format", source) or "gptq"
    if label not in ("gptq", "gptq_v2"):
        raise CheckpointError(f"{source} has checkpoint_format {label!r}; supported: gptq, gptq_v2. Export it again so")
    if raw.get("pack_dtype", "int32") != "int32":
        raise CheckpointError(f"{source} packs into {raw['pack_dtype']}; supported: int32")
    if raw.get("zero_grid", "integer") != "integer":
        raise CheckpointError(
            f"{source} has zero_grid {raw['zero_grid']!r} under quant_method gptq, whose zero points are whole; only "
            "quant_method dibit has others. Correct the config, or quantize the float model again"
        )
    for key in _MUST_BE_UNSET:
        if raw.get(key):
            raise CheckpointError(f"{source} sets {key}, which is not supported; export the model again without it")
    bits = whole_number(alias(raw, "bits", source), "bits", source)
    group_size = whole_number(alias(raw, "group_size", source), "group_size", source)
    checked_format(bits, group_size, source)
    return Quantization(
        method="gptq",
        bits=bits,
        group_size=group_size,
        symmetric=symmetric_of(raw, source),
        checkpoint_format=cast(CheckpointFormat, label),
        act_order=bool(raw.get("desc_act", False)),
        quantizer=quantizer_of(raw),
        dynamic=dynamic_rules(raw.get("dynamic") or {}, bits, group_size, source),
        activation_bits=activation_bits_of(raw, source),
    )


def alias(raw: Mapping[str, Any], key: str, source: str) -> Any:
    found = {name: raw[name] for name in _ALIASES[key] if raw.get(name) is not None}
    if any(value != next(iter(found.values())) for value in found.values()):
        raise CheckpointError(f"{source} contradicts itself: {', '.join(f'{k}={v!r}' for k, v in found.items())}")
    return next(iter(found.values()), None)


def whole_number(value: Any, key: str, source: str) -> int:
    if type(value) is not int:
        raise CheckpointError(f"{source} has {key} {value!r}; expected a whole number")
    return value


def activation_bits_of(raw: Mapping[str, Any], source: str) -> int | None:
    """The width of activations that dibit notes in a config; None where it says nothing."""
    value = raw.get("activation_bits")
    if value is not None and (type(value) is not int or value not in ACTIVATION_BITS):
        allowed = ", ".join(map(str, ACTIVATION_BITS))
        raise CheckpointError(
            f"{source} has activation_bits {value!r}; supported: {allowed}, or nothing for weights only"
        )
    return value


def checked_format(bits: int, group_size: int, source: str, *, zero_grid: ZeroGrid = "integer") -> Format:
    try:
        return Format(bits, group_size, zero_grid)
    except FormatError as error:
        raise CheckpointError(f"{source}: {error}. Quantize the float model again with `dibit quantize`") from error


def symmetric_of(raw: Mapping[str, Any], source: str) -> bool:
    sym, zero_point = raw.get("sym"), raw.get("zero_point")
    for key, value in (("sym", sym), ("zero_point", zero_point)):
        if value is not None and not isinstance(value, bool):
            raise CheckpointError(f"{source} has {key} {value!r}; expected true or false")
    if sym is not None and zero_point is not None and sym == zero_point:
        raise CheckpointError(f"{source} contradicts itself: sym={sym}, zero_point={zero_point}")
    if sym is not None:
        return bool(sym)
    return zero_point is False


def quantizer_of(raw: Mapping[str, Any]) -> str | None:
    meta = raw.get("meta")
    value = meta.get("quantizer") if isinstance(meta, dict) else None
    if isinstance(value, list):
        value = value[0] if value else None
    return value if isinstance(value, str) else None


def dynamic_rules(
    raw: Any, bits: int, group_size: int, source: str, *, zero_grid: ZeroGrid | None = None
) -> tuple[ModuleRule, ...]:
    """`dynamic` of a config, whose other fields hold where an entry is silent.

    zero_grid  None: of a format that has whole zero points only
    """
    if not isinstance(raw, dict):
        raise CheckpointError(f"{source} has `dynamic` of type {type(raw).__name__}; expected an object of patterns")
    return tuple(_rule(key, value, bits, group_size, source, zero_grid) for key, value in raw.items())


def _rule(key: str, value: Any, bits: int, group_size: int, source: str, zero_grid: ZeroGrid | None) -> ModuleRule:
    negative = key.startswith("-:")
    pattern = key[2:] if key.startswith(("-:", "+:")) else key
    where = f"{source}, dynamic {key[:80]!r}"
    if len(pattern) > MAX_PATTERN:
        raise CheckpointError(f"{where}: a pattern of {len(pattern)} characters; at most {MAX_PATTERN} are accepted")
    try:
        re.compile(pattern)
    except re.error as error:
        raise CheckpointError(f"{where} is no regular expression: {error}") from error
    if negative:
        return ModuleRule(pattern, None)
    if not isinstance(value, dict):
        raise CheckpointError(f"{where} holds {value!r:.40}; expected an object with bits, group_size")
    own_bits, own_group = alias(value, "bits", where), alias(value, "group_size", where)
    own_grid = value.get("zero_grid", zero_grid or "integer")
    if zero_grid is None and own_grid != "integer":
        raise CheckpointError(f"{where} has zero_grid {own_grid!r}; only quant_method dibit has other than whole ones")
    return ModuleRule(
        pattern,
        checked_format(
            bits if own_bits is None else whole_number(own_bits, "bits", where),
            group_size if own_group is None else whole_number(own_group, "group_size", where),
            where,
            zero_grid=own_grid,
        ),
    )
