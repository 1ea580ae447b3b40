"""A quantized checkpoint in another on-disk format: the same codes, zero points and scales, in other words.

Nothing is quantized anew. Tensors pass through one linear at a time into a `CheckpointWriter`, so the result has its
name only when it is whole, and a killed run goes on. What the target has no room for is refused, as far as headers tell
before anything is written.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dibit.engine.checkpoint import open_checkpoint, resolve_model
from dibit.engine.checkpoint.checkpoint import Checkpoint, ZeroChoice
from dibit.engine.checkpoint.dispatch import EXPORTS
from dibit.engine.checkpoint.packing import CannotHold, Export, Facts, check_grid
from dibit.engine.checkpoint.progress import PackedModule
from dibit.engine.checkpoint.writer import CheckpointWriter
from dibit.engine.errors import CheckpointError, ConfigError
from dibit.kernels.formats import QTensor

Progress = Callable[[int, int, str], None]


@dataclass(frozen=True)
class Conversion:
    """
    packed      quantized linears
    floats      other tensors, copied as they are
    file_bytes  tensors of the result on disk
    """

    source: str
    source_format: str
    target_format: str
    out: str
    packed: int
    floats: int
    file_bytes: int
    seconds: float

    def text(self) -> str:
        return (
            f"{self.out}: {self.packed} quantized linears of {self.source} ({self.source_format}) as "
            f"{self.target_format}, {self.floats} other tensors; {self.file_bytes / 1e6:.1f} MB, {self.seconds:.1f} s"
        )


def convert_checkpoint(
    model: str | Path,
    out: Path,
    *,
    to: str,
    overwrite: bool = False,
    revision: str | None = None,
    gptq_zero: ZeroChoice = "auto",
    progress: Progress | None = None,
) -> Conversion:
    """Write the quantized checkpoint `model` (a directory or a Hub id) to `out` in the format `to` of EXPORTS.

    progress  called as progress(linears done, linears, module)
    Raises CheckpointError when `model` is not quantized or `out` is taken, CannotHold when the format has no room for
    some linear, ConfigError for a format that is not known.
    """
    if to not in EXPORTS:
        raise ConfigError(f"format {to!r} is not known; supported: {', '.join(EXPORTS)}")
    export = EXPORTS[to]
    start = time.monotonic()
    source = open_checkpoint(resolve_model(str(model), revision=revision), gptq_zero=gptq_zero)
    try:
        _check(source, export)
        decision = source.zero_decision()
        settings = {"convert": to, "zeros": None if decision is None else decision.convention}
        writer = CheckpointWriter(out, source, export=export, settings=settings, overwrite=overwrite)
        try:
            floats = _copy(source, writer, progress or (lambda done, total, module: None))
            path = writer.finish(**_provenance(source))
        except CannotHold:
            writer.discard()
            raise
        finally:
            writer.close()
        quantization = source.quantization
        assert quantization is not None
        return Conversion(
            source=source.name,
            source_format=f"{quantization.method} {quantization.format.name}",
            target_format=to,
            out=str(path),
            packed=len(source.packed()),
            floats=floats,
            file_bytes=sum(file.stat().st_size for file in path.glob("*.safetensors")),
            seconds=time.monotonic() - start,
        )
    finally:
        source.close()


def _check(source: Checkpoint, export: Export) -> None:
    packed = source.packed()
    if not packed:
        raise CheckpointError(
            f"{source.name} has no quantized linears that could be converted; `dibit quantize` makes a quantized "
            "checkpoint of it"
        )
    bits = source.quantization.activation_bits if source.quantization else None
    if bits is not None:
        raise CannotHold(
            f"{source.name} rounds its activations to {bits} bits, which {export.label} cannot say: another tool would "
            "compute another model. Serve it as it is, or quantize the float model again without activation bits"
        )
    for module, linear in packed.items():
        check_grid(linear.format, module=module, label=export.label)
        export.check(linear.format, *linear.shape, module=module)
    formats = {m: PackedModule(p.format.bits, p.format.group_size, symmetric=False) for m, p in packed.items()}
    # A config that cannot be written is better known before the tensors are.
    export.config(formats, [name for name in source.names() if name.endswith(".weight")], method=None, facts={})


def _copy(source: Checkpoint, writer: CheckpointWriter, progress: Progress) -> int:
    packed = source.packed()
    for done, module in enumerate(packed):
        progress(done, len(packed), module)
        if not writer.has_module(module):
            found = source.linear(module)
            assert isinstance(found, QTensor)
            writer.add_quantized(module, found)
    progress(len(packed), len(packed), "")
    stored = {name for linear in packed.values() for name in linear.tensors}
    floats = [name for name in source.names() if name not in stored]
    for name in floats:
        if not writer.has(name):
            writer.add_float(name, source.export(name))
    return len(floats)


def _provenance(source: Checkpoint) -> dict[str, Any]:
    """How the source says it was made, with what it was converted from."""
    quantization = source.quantization
    assert quantization is not None
    raw = source.config.get("quantization_config") or {}
    meta = raw.get("meta") if isinstance(raw, dict) else None
    meta = meta if isinstance(meta, Mapping) else {}
    facts: dict[str, Any] = {
        key: value
        for key, value in meta.items()
        if key not in ("quantizer", "method") and (value is None or isinstance(value, str | int | float | bool))
    }
    facts["converted_from"] = f"{quantization.method} ({quantization.checkpoint_format})"
    if quantization.quantizer is not None and "source_quantizer" not in facts:
        facts["source_quantizer"] = quantization.quantizer
    method = meta.get("method")
    found: Facts = facts
    return {"method": method if isinstance(method, str) else None, "facts": found}
