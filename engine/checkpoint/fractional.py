"""dibit's own on-disk format, for weights whose zero fields stand for fractions.

The tensors are those of GPTQ version 2 (gptq.py), bit for bit, but a zero field means what kernels/formats.py says of
the fractional grid. A tool that knows GPTQ only would read them as whole numbers and compute nonsense, so the config
is one that such tools refuse by name: `quant_method` and `checkpoint_format` are "dibit", and there is no
quantize_config.json, which some of them read without asking for a method.

    "quant_method": "dibit", "checkpoint_format": "dibit", "bits": 2, "group_size": 64, "zero_grid": "fractional"

`zero_grid` may differ in an entry of `dynamic`: linears of 4 and 8 bits have whole zero points.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

from torch import Tensor

from dibit.engine.checkpoint.checkpoint import Quantization, ZeroConvention
from dibit.engine.checkpoint.export_config import quantization_config
from dibit.engine.checkpoint.gptq import PARTS, GptqPacking, GptqTensors, check_words, from_gptq, to_gptq
from dibit.engine.checkpoint.packing import Facts, Headers, Sample
from dibit.engine.checkpoint.progress import PackedModule
from dibit.engine.checkpoint.quantization_config import (
    activation_bits_of,
    alias,
    checked_format,
    dynamic_rules,
    quantizer_of,
    symmetric_of,
    whole_number,
)
from dibit.engine.errors import CheckpointError
from dibit.kernels.formats import ZERO_GRIDS, Format, QTensor

METHOD = "dibit"
_GPTQ = GptqPacking("v2")


@dataclass(frozen=True)
class FractionalPacking:
    """See packing.Packing and packing.Export."""

    parts: ClassVar[tuple[str, ...]] = PARTS
    side_file: ClassVar[str | None] = None
    zeros: ClassVar[ZeroConvention] = "v2"
    label: ClassVar[str] = METHOD

    def shape(self, headers: Headers) -> tuple[int, int]:
        return _GPTQ.shape(headers)

    def unpack(
        self, tensors: Mapping[str, Tensor], format: Format, *, zeros: ZeroConvention, module: str, source: str
    ) -> QTensor:
        return from_gptq(GptqTensors(**tensors), format, zeros="v2", module=module, source=source)

    def sample(self, tensors: Mapping[str, Tensor], format: Format) -> Sample | None:
        return None

    def check(self, format: Format, n: int, k: int, *, module: str) -> None:
        check_words(format, n, k, module=module)

    def pack(self, q: QTensor, *, module: str) -> dict[str, Tensor]:
        return to_gptq(q, zeros="v2", module=module).named("")

    def config(
        self, modules: Mapping[str, PackedModule], names: Iterable[str], *, method: str | None, facts: Facts
    ) -> dict[str, Any]:
        own = {"quant_method": METHOD, "checkpoint_format": METHOD}
        return quantization_config(modules, names, method=method, facts=facts) | own


def parse_fractional(raw: Mapping[str, Any], source: str) -> Quantization:
    """A config of this format. Raises CheckpointError for one that is not whole."""
    label = alias(raw, "checkpoint_format", source)
    if label != METHOD:
        raise CheckpointError(
            f"{source} has checkpoint_format {label!r} under quant_method {METHOD!r}; expected {METHOD!r}. The "
            "checkpoint was made by another version of dibit: use that one, or quantize the float model again"
        )
    grid: Any = raw.get("zero_grid")
    if grid not in ZERO_GRIDS:
        allowed = ", ".join(ZERO_GRIDS)
        raise CheckpointError(f"{source} has zero_grid {grid!r}; supported: {allowed}. Quantize the float model again")
    bits = whole_number(alias(raw, "bits", source), "bits", source)
    group_size = whole_number(alias(raw, "group_size", source), "group_size", source)
    checked_format(bits, group_size, source, zero_grid=grid)
    return Quantization(
        method="dibit",
        bits=bits,
        group_size=group_size,
        symmetric=symmetric_of(raw, source),
        checkpoint_format="dibit",
        quantizer=quantizer_of(raw),
        dynamic=dynamic_rules(raw.get("dynamic") or {}, bits, group_size, source, zero_grid=grid),
        zero_grid=grid,
        activation_bits=activation_bits_of(raw, source),
    )
