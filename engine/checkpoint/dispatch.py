"""From a quantization config to the packing that reads it: the one table of on-disk formats.

A checkpoint without a config has no other witness than the shapes of its tensors; only EfficientQAT writes such.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from dibit.engine.checkpoint.awq import AwqPacking, parse_awq
from dibit.engine.checkpoint.bitblas import BitblasPacking, parse_bitblas
from dibit.engine.checkpoint.checkpoint import Quantization
from dibit.engine.checkpoint.compressed_tensors import CompressedTensorsPacking, parse_compressed_tensors
from dibit.engine.checkpoint.fractional import FractionalPacking, parse_fractional
from dibit.engine.checkpoint.gptq import WORDWISE_TOOL, GptqPacking
from dibit.engine.checkpoint.packing import Export, Packing
from dibit.engine.checkpoint.quantization_config import alias, parse_quantization
from dibit.kernels.formats import Format

FRACTIONAL = FractionalPacking()
EXPORTS: Mapping[str, Export] = {
    "gptq": GptqPacking("v2"),
    "gptq-v1": GptqPacking("v1"),
    "awq": AwqPacking(),
    "compressed-tensors": CompressedTensorsPacking(),
}


def export_for(formats: Iterable[Format]) -> Export:
    """The format in which dibit writes such linears: the one that most tools read, GPTQ version 2, where it can."""
    return EXPORTS["gptq"] if all(form.zero_grid == "integer" for form in formats) else FRACTIONAL


@dataclass(frozen=True)
class Declared:
    """What a config says, and the packing that follows from it."""

    quantization: Quantization
    packing: Packing


def declared_packing(raw: Mapping[str, Any], source: str, *, default_method: str | None = None) -> Declared:
    """`source` names the file in messages; `default_method` holds where quant_method is absent.

    Raises CheckpointError on a method or a packing that is not supported, and on contradictory keys.
    """
    method = alias(raw, "quant_method", source) or default_method
    if method == FRACTIONAL.label:
        return Declared(parse_fractional(raw, source), FRACTIONAL)
    if method == "awq":
        return Declared(parse_awq(raw, source), AwqPacking())
    if method == "compressed-tensors":
        return Declared(parse_compressed_tensors(raw, source), CompressedTensorsPacking())
    if method == "bitblas" or (method == "gptq" and alias(raw, "checkpoint_format", source) == "bitblas"):
        return Declared(parse_bitblas(raw, source), BitblasPacking())
    quantization = parse_quantization(raw, source, default_method=default_method)
    wordwise = (quantization.quantizer or "").startswith(WORDWISE_TOOL)
    return Declared(quantization, GptqPacking(wordwise=wordwise))
