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
from dibit.kernels.formats import Format, ZeroGrid
from dibit.quantize.budget import Allocation, Budget, allocate, code_bits, packed_bytes, widening_steps
from dibit.quantize.fisher import Damage, visit_gradients
from dibit.quantize.importance import Importance, Model, Text, rank_blocks
from dibit.quantize.plan import Plan, on_zero_grid

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
    zero_grid: ZeroGrid = "integer",
    progress: Callable[[int], None] | None = None,
) -> Allocation:
    """Widths of all blocks or sites under `budget`. `text` is there when the importance needs it; `progress(block)`.

    zero_grid  of the widths that have it: what is scored is the rounding that will be done

    Raises ConfigError when a width does not fit the model's shapes, the lowest ones exceed the budget, or no width has
    such zero points.
    """
    blocks = [model.sites(layer) for layer in range(model.sizes.layers)]
    units = _units(blocks, per_site=budget.per_site)
    formats = {bits: Format(bits, group_size) for bits in budget.choices}
    for choice in formats.values():
        Plan.uniform(choice).resolve([site for block in blocks for site in block])
    rounding = on_zero_grid({str(bits): form for bits, form in formats.items()}, zero_grid, symmetric=symmetric)
    costs, limit = _costs(budget, model, list(units.values()), formats)
    lowest = sum(cost[budget.choices[0]] for cost in costs)
    if lowest > limit:
        raise ConfigError(_too_small(budget, model.checkpoint, lowest - limit))
    if text is not None:
        text = Text(text.tokens[: budget.samples], text.streams, text.directory)
    looked_at = [rounding[str(bits)] for bits in budget.choices[: max(1, len(budget.choices) - 1)]]
    if budget.importance == "fisher":
        importance = _by_gradients(model, units, text, looked_at, symmetric=symmetric, seed=seed, progress=progress)
    else:
        importance = rank_blocks(
            budget.importance, model, text=text, formats=looked_at, symmetric=symmetric, seed=seed, progress=progress
        )
    broken = [name for name, score in zip(units, importance.scores, strict=True) if not math.isfinite(score)]
    if broken:
        raise ConfigError(
            f"the {budget.importance} importance of {', '.join(broken)} is not finite: the weights of the checkpoint "
            "are damaged, or its hidden states overflow; choose another importance"
        )
    steps = widening_steps(importance, costs, choices=budget.choices, reverse=budget.reverse)
    bits = allocate(costs, steps, choices=budget.choices, limit=limit)
    weights = sum(code_bits(block, 1) for block in blocks)
    spent = sum(code_bits(unit, own) for unit, own in zip(units.values(), bits, strict=True))
    return Allocation(budget, importance, bits, spent / weights, tuple(units))


def _units(blocks: Sequence[Sequence[LinearSite]], *, per_site: bool) -> dict[str, tuple[LinearSite, ...]]:
    """What gets one width each, by name."""
    if per_site:
        return {site.name: (site,) for block in blocks for site in block}
    return {f"layers.{layer}": tuple(block) for layer, block in enumerate(blocks)}


def _by_gradients(
    model: Model,
    units: dict[str, tuple[LinearSite, ...]],
    text: Text | None,
    formats: Sequence[Format],
    *,
    symmetric: bool,
    seed: int,
    progress: Callable[[int], None] | None,
) -> Importance:
    if text is None:
        raise TypeError("fisher needs text")
    damage = Damage(formats, text.tokens.numel(), symmetric=symmetric)
    visit_gradients(model, text, damage, seed=seed, tell=progress)
    sums = {
        bits: tuple(math.fsum(found[site.name] for site in unit) for unit in units.values())
        for bits, found in damage.found.items()
    }
    return Importance("fisher", sums[formats[0].bits], sums)


def _costs(
    budget: Budget, model: Model, units: Sequence[Sequence[LinearSite]], formats: dict[int, Format]
) -> tuple[list[dict[int, int]], Fraction]:
    """Cost of every unit at every width, and what there is to spend: bits of code, or bytes on disk."""
    if budget.total_bytes is not None:
        costs = [{bits: packed_bytes(unit, own) for bits, own in formats.items()} for unit in units]
        return costs, Fraction(budget.total_bytes - _fixed_bytes(model, choices=len(formats), per_site=budget.per_site))
    costs = [{bits: code_bits(unit, bits) for bits in formats} for unit in units]
    # As it is written, 2.3, not the binary fraction just below.
    mean = Fraction(repr(budget.mean_bits))
    return costs, mean * sum(code_bits(unit, 1) for unit in units)


def _fixed_bytes(model: Model, *, choices: int, per_site: bool) -> int:
    """All of the checkpoint but the quantized linears: never less than it will be, and hardly more."""
    layers = range(model.sizes.layers)
    modules = [part.module for layer in layers for site in model.sites(layer) for part in site.parts]
    packed = {f"{module}.weight" for module in modules}
    floats = [name for name in float_shapes(model.arch, model.sizes) if name not in packed]
    data = sum(model.checkpoint.export(name).nbytes for name in floats)
    names = [*floats, *(f"{module}.{part}" for module in modules for part in ("qweight", "qzeros", "scales", "g_idx"))]
    # Once in a shard's header, and once in the index of a checkpoint of several shards.
    entries = 2 * sum(len(name) + ENTRY_BYTES for name in names)
    # Every layer is listed once; with widths per site, in patterns for each linear of a block.
    lists = len(modules) // len(layers) if per_site else 1
    quantization = CONFIG_BYTES + lists * (choices * PATTERN_BYTES + len(layers) * NUMBER_BYTES)
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
