"""dibit's half of the comparisons with other tools (interop_*.py): a checkpoint to hand over, and one read back."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from safetensors.torch import load_file

from dibit.engine.checkpoint import Checkpoint, CheckpointWriter, open_checkpoint
from dibit.engine.checkpoint.checkpoint import Quantization
from dibit.engine.checkpoint.dispatch import EXPORTS
from dibit.kernels.formats import Format, QTensor, dequantize


def write_rounded(model: Path, out: Path, formats: tuple[tuple[int, int], ...], *, to: str, symmetric: bool) -> None:
    """The float model rounded to nearest; `formats` has bits and group size of each layer, `to` names an export."""
    source = open_checkpoint(model)
    writer = CheckpointWriter(out, source, export=EXPORTS[to])
    for name in source.names():
        if name.endswith("_proj.weight"):
            w = source.tensor(name)
            form = Format(*formats[int(name.split(".")[2])])
            scales, zeros = form.ranges(w, symmetric=symmetric)
            writer.add_quantized(name.removesuffix(".weight"), form.encode(w, scales, zeros))
        else:
            writer.add_float(name, source.tensor(name))
    writer.finish(method="rtn")
    source.close()


@dataclass(frozen=True)
class Reading:
    """A checkpoint as dibit reads it, beside the weights that the other tool dequantized.

    mixed           some modules have another format
    max_difference  of any weight, both in float16
    """

    checkpoint: Checkpoint
    quantization: Quantization
    mixed: bool
    modules: int
    weights: int
    max_difference: float


def compare(checkpoint_dir: Path) -> Reading:
    """With the other tool's weights in `checkpoint_dir`.expected. Exits when modules or kinds of weights differ."""
    expected = load_file(checkpoint_dir.with_suffix(".expected"))
    checkpoint = open_checkpoint(checkpoint_dir)
    packed = checkpoint.packed()
    if set(packed) != set(expected) or not packed:
        raise SystemExit(f"{checkpoint_dir}: packed modules differ: {set(packed) ^ set(expected)}")
    worst, weights = 0.0, 0
    for module in packed:
        q = checkpoint.linear(module)
        if not isinstance(q, QTensor):
            raise SystemExit(f"{module} is packed but was read as a float")
        # The other tools multiply in float16, the type of the scales: the same product, rounded once.
        worst = max(worst, float((dequantize(q).half() - expected[module].half()).abs().max()))
        weights += q.codes.numel()
    if checkpoint.quantization is None:
        raise SystemExit(f"{checkpoint_dir} has no quantization config")
    mixed = len({linear.format for linear in packed.values()}) > 1
    return Reading(checkpoint, checkpoint.quantization, mixed, len(packed), weights, worst)
