"""The plan that a budget comes to on a model: what may be spent, what every block would cost, which matter most."""

from __future__ import annotations

import json
import math
import tempfile
from collections.abc import Callable, Sequence
from fractions import Fraction
from pathlib import Path

from dibit.engine.checkpoint import Checkpoint
from dibit.engine.errors import ConfigError
from dibit.engine.models.spec import LinearSite, float_shapes
from dibit.kernels.formats import Format
from dibit.quantize.budget import Allocation, Budget, allocate, code_bits, packed_bytes, widening_steps
from dibit.quantize.importance import Model, Text, rank_blocks
from dibit.quantize.plan import Plan

# Upper bounds of what is written around the data: an entry of a safetensors header or index beside its name, the
# quantization_config without its patterns, a pattern without its layer numbers, a layer number.
ENTRY_BYTES = 110
CONFIG_BYTES = 2048
PATTERN_BYTES = 160
NUMBER_BYTES = 6


def choose_bits(
    budget: Budget,
    model: Model,
    *,
    group_size: int,
    symmetric: bool,
    text: Text | None,
    seed: int,
    progress: Callable[[int], None] | None = None,
) -> Allocation:
    """Widths of all blocks under `budget`. `text` is there when the importance needs it; `progress(block)`.

    Raises ConfigError when a width does not fit the model's shapes, or the lowest ones exceed the budget.
    """
    blocks = [model.sites(layer) for layer in range(model.sizes.layers)]
    formats = {bits: Format(bits, group_size) for bits in budget.choices}
    for choice in formats.values():
        Plan.uniform(choice).resolve([site for block in blocks for site in block])
    costs, limit = _costs(budget, model, blocks, formats)
    lowest = sum(cost[budget.choices[0]] for cost in costs)
    if lowest > limit:
        raise ConfigError(_too_small(budget, model.checkpoint, lowest - limit))
    importance = rank_blocks(
        budget.importance,
        model,
        text=None if text is None else Text(text.tokens[: budget.samples], text.streams, text.directory),
        formats=[formats[bits] for bits in budget.choices[: max(1, len(budget.choices) - 1)]],
        symmetric=symmetric,
        seed=seed,
        progress=progress,
    )
    broken = [layer for layer, score in enumerate(importance.scores) if not math.isfinite(score)]
    if broken:
        raise ConfigError(
            f"the {budget.importance} importance of blocks {', '.join(map(str, broken))} is not finite: the weights "
            "of the checkpoint are damaged, or its hidden states overflow; choose another importance"
        )
    steps = widening_steps(importance, costs, choices=budget.choices, reverse=budget.reverse)
    bits = allocate(costs, steps, choices=budget.choices, limit=limit)
    weights = sum(code_bits(block, 1) for block in blocks)
    spent = sum(code_bits(block, own) for block, own in zip(blocks, bits, strict=True))
    return Allocation(budget, importance, bits, spent / weights)


def _costs(
    budget: Budget, model: Model, blocks: Sequence[Sequence[LinearSite]], formats: dict[int, Format]
) -> tuple[list[dict[int, int]], Fraction]:
    """Cost of every block at every width, and what there is to spend: bits of code, or bytes on disk."""
    if budget.total_bytes is not None:
        costs = [{bits: packed_bytes(block, own) for bits, own in formats.items()} for block in blocks]
        return costs, Fraction(budget.total_bytes - _fixed_bytes(model, blocks, choices=len(formats)))
    costs = [{bits: code_bits(block, bits) for bits in formats} for block in blocks]
    # As it is written, 2.3, not the binary fraction just below.
    mean = Fraction(repr(budget.mean_bits))
    return costs, mean * sum(code_bits(block, 1) for block in blocks)


def _fixed_bytes(model: Model, blocks: Sequence[Sequence[LinearSite]], *, choices: int) -> int:
    """All of the checkpoint but the quantized linears: never less than it will be, and hardly more."""
    modules = [part.module for block in blocks for site in block for part in site.parts]
    packed = {f"{module}.weight" for module in modules}
    floats = [name for name in float_shapes(model.arch, model.sizes) if name not in packed]
    data = sum(model.checkpoint.export(name).nbytes for name in floats)
    names = [*floats, *(f"{module}.{part}" for module in modules for part in ("qweight", "qzeros", "scales", "g_idx"))]
    # Once in a shard's header, and once in the index of a checkpoint of several shards.
    entries = 2 * sum(len(name) + ENTRY_BYTES for name in names)
    quantization = CONFIG_BYTES + choices * PATTERN_BYTES + model.sizes.layers * NUMBER_BYTES
    # In config.json, and in a file of its own.
    config = len(json.dumps(model.checkpoint.config, indent=2).encode()) + 2 * quantization
    with tempfile.TemporaryDirectory() as directory:
        model.checkpoint.write_tokenizer(Path(directory))
        tokenizer = sum(path.stat().st_size for path in Path(directory).rglob("*") if path.is_file())
    return data + entries + config + tokenizer


def _too_small(budget: Budget, checkpoint: Checkpoint, missing: Fraction) -> str:
    widths = ", ".join(map(str, budget.choices))
    if budget.total_bytes is None:
        return (
            f"a budget of {budget.mean_bits} bits per weight is below the lowest width, {budget.choices[0]} (of "
            f"{widths}); give at least that, or allow lower widths"
        )
    least = (budget.total_bytes + math.ceil(missing)) / 1e6
    return (
        f"{checkpoint.name} does not fit into {budget.total_bytes / 1e6:.1f} MB: with every linear at "
        f"{budget.choices[0]} bits (the lowest of {widths}) it takes {least:.1f} MB, as embedding, head and norms stay "
        "in their float type; give at least that, or allow lower widths"
    )
