"""Which site gets which format.

A plan is a default format and overrides by name, as one writes them down; `resolve` turns it into one format per site
and finds every misfit before anything is computed. Site names are those of the model's spec: "layers.3.qkv",
"layers.3.o", "layers.3.gate_up", "layers.3.down". An override may also name single linears, by the checkpoint's name
of the module ("model.layers.3.self_attn.v_proj"); a site whose linears then differ is kept in parts.
"""

from __future__ import annotations

import dataclasses
import json
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from dibit.engine.errors import ConfigError
from dibit.engine.models.spec import LinearSite, Part
from dibit.kernels.formats import (
    FRACTIONAL_BITS,
    GROUP_SIZES,
    PER_CHANNEL,
    ZERO_GRIDS,
    Format,
    FormatError,
    ZeroGrid,
)

MAX_SITES_IN_MESSAGE = 4


@dataclass(frozen=True)
class Override:
    """`format` for the sites and linears whose whole name the regular expression `pattern` matches."""

    pattern: str
    format: Format

    def matches(self, site: LinearSite, part: Part) -> bool:
        return any(re.fullmatch(self.pattern, name) for name in (site.name, part.module))


@dataclass(frozen=True)
class Plan:
    """A default format, and overrides of which the last that matches a linear, or the site it is in, wins."""

    default: Format
    overrides: tuple[Override, ...] = ()

    @classmethod
    def uniform(cls, format: Format) -> Plan:
        return cls(default=format)

    def override(self, pattern: str, format: Format) -> Plan:
        """This plan with `format` for what `pattern` matches. Raises ConfigError for a broken pattern."""
        try:
            re.compile(pattern)
        except re.error as error:
            raise ConfigError(f"{pattern!r} is not a regular expression over site names: {error}") from error
        return Plan(default=self.default, overrides=(*self.overrides, Override(pattern, format)))

    def resolve(self, sites: Sequence[LinearSite]) -> dict[str, Format]:
        """One format per site name, or per module name where the linears of a site differ, checked against the shapes.

        Raises ConfigError when an override matches nothing, a group size does not divide a site's inputs, or a
        linear's shape does not fill whole words of the checkpoint format.
        """
        for override in self.overrides:
            if not any(override.matches(site, part) for site in sites for part in site.parts):
                names = ", ".join(site.name for site in sites[:MAX_SITES_IN_MESSAGE])
                raise ConfigError(
                    f"the plan's pattern {override.pattern!r} matches no site and no linear; sites are: {names}, ...; "
                    f"linears: {', '.join(part.module for part in sites[0].parts)}, ..."
                )
        formats: dict[str, Format] = {}
        for site in sites:
            own = [self._format(site, part) for part in site.parts]
            if len(set(own)) == 1:
                formats[site.name] = own[0]
            else:
                formats.update((part.module, found) for part, found in zip(site.parts, own, strict=True))
        _check_groups(sites, formats)
        _check_words(sites, formats)
        return formats

    def _format(self, site: LinearSite, part: Part) -> Format:
        matching = [override.format for override in self.overrides if override.matches(site, part)]
        return matching[-1] if matching else self.default

    def to_dict(self) -> dict[str, Any]:
        """The content of a plan file."""
        entries = [{"sites": o.pattern, **_format_json(o.format)} for o in self.overrides]
        return {"default": _format_json(self.default), "overrides": entries}

    def to_json(self) -> str:
        return json.dumps(self.to_dict(), indent=2)

    @classmethod
    def from_json(cls, text: str) -> Plan:
        """Inverse of to_json. Raises ConfigError."""
        try:
            data = json.loads(text)
        except json.JSONDecodeError as error:
            raise ConfigError(f"a plan must be JSON: {error}") from error
        _check_keys(data, {"default"}, {"overrides"}, "a plan")
        plan = cls.uniform(_format_from(data["default"], "the plan's default"))
        entries = data.get("overrides", [])
        if not isinstance(entries, list):
            raise ConfigError("the plan's overrides must be a list")
        for i, entry in enumerate(entries):
            what = f"override {i} of the plan"
            _check_keys(entry, {"sites", "bits", "group_size"}, set(), what)
            if not isinstance(entry["sites"], str):
                raise ConfigError(f"the sites of {what} are {entry['sites']!r}; a regular expression is needed")
            rest = {key: value for key, value in entry.items() if key != "sites"}
            plan = plan.override(entry["sites"], _format_from(rest, what))
        return plan


def on_zero_grid(formats: Mapping[str, Format], zero_grid: ZeroGrid, *, symmetric: bool) -> dict[str, Format]:
    """The formats with zero points on `zero_grid`, those of a width that has it. Raises ConfigError where none has."""
    if zero_grid not in ZERO_GRIDS:
        raise ConfigError(f"zero grid {zero_grid!r}; supported: {', '.join(ZERO_GRIDS)}")
    if zero_grid == "integer":
        return dict(formats)
    if symmetric:
        raise ConfigError(
            "symmetric weights have their zero point in the middle, which the fractional zero grid does not hold; "
            "choose one of the two"
        )
    if not any(form.bits in FRACTIONAL_BITS for form in formats.values()):
        raise ConfigError(
            f"fractional zero points exist at {' and '.join(map(str, FRACTIONAL_BITS))} bits, and no linear has so "
            "few; choose fewer bits, or leave the zero grid out"
        )
    return {
        name: dataclasses.replace(form, zero_grid=zero_grid) if form.bits in FRACTIONAL_BITS else form
        for name, form in formats.items()
    }


def part_formats(site: LinearSite, formats: Mapping[str, Format]) -> tuple[Format, ...]:
    """Formats of the parts of a site, out of what `Plan.resolve` gave."""
    whole = formats.get(site.name)
    return tuple(formats[part.module] if whole is None else whole for part in site.parts)


def bits_per_weight(sites: Sequence[LinearSite], formats: Mapping[str, Format]) -> float:
    """Stored bits per quantized weight, scales and zero points included."""
    weights = sum(site.n * site.k for site in sites)
    return sum(part.n * site.k * own.bits_per_weight(site.k) for site, part, own in _each(sites, formats)) / weights


def _each(sites: Sequence[LinearSite], formats: Mapping[str, Format]) -> Iterator[tuple[LinearSite, Part, Format]]:
    for site in sites:
        for part, own in zip(site.parts, part_formats(site, formats), strict=True):
            yield site, part, own


def _check_groups(sites: Sequence[LinearSite], formats: Mapping[str, Format]) -> None:
    wrong = [(site, own) for site, _, own in _each(sites, formats) if not _divides(own.group_size, site.k)]
    if not wrong:
        return
    misfits = list({site.name: site for site, _ in wrong}.values())
    sizes = sorted({own.group_size for _, own in wrong})
    widths = sorted({site.k for site in misfits})
    working = [str(g) for g in GROUP_SIZES if all(_divides(g, k) for k in widths)]
    raise ConfigError(
        f"group size {', '.join(map(str, sizes))} does not divide the {', '.join(map(str, widths))} inputs of "
        f"{_names(misfits)}; group sizes that work there: {', '.join(working)} (-1 is one group per row)"
    )


def _check_words(sites: Sequence[LinearSite], formats: Mapping[str, Format]) -> None:
    """GPTQ packs codes along K and zero points along N of each linear into 32-bit words."""
    for site, part, own in _each(sites, formats):
        for what, size in (("inputs", site.k), (f"outputs of {part.module}", part.n)):
            if size * own.bits % 32:
                raise ConfigError(
                    f"{site.name} has {size} {what}: at {own.bits} bits they do not fill whole 32-bit words "
                    f"(a multiple of {_word_multiple(own.bits)} is needed); choose other bits for this site in a plan"
                )


def _word_multiple(bits: int) -> int:
    return 32 if bits == 3 else 32 // bits


def _divides(group_size: int, k: int) -> bool:
    return group_size == PER_CHANNEL or k % group_size == 0


def _names(sites: Sequence[LinearSite]) -> str:
    shown = ", ".join(site.name for site in sites[:MAX_SITES_IN_MESSAGE])
    more = len(sites) - MAX_SITES_IN_MESSAGE
    return f"{shown} and {more} more" if more > 0 else shown


def _format_json(format: Format) -> dict[str, int]:
    return {"bits": format.bits, "group_size": format.group_size}


def _format_from(data: Any, what: str) -> Format:
    _check_keys(data, {"bits", "group_size"}, set(), what)
    for key, value in data.items():
        if type(value) is not int:
            raise ConfigError(f"the {key} of {what} is {value!r}; a whole number is needed")
    try:
        return Format(bits=data["bits"], group_size=data["group_size"])
    except FormatError as error:
        raise ConfigError(f"{what}: {error}") from error


def _check_keys(data: Any, required: set[str], optional: set[str], what: str) -> None:
    if not isinstance(data, dict):
        raise ConfigError(f"{what} is {data!r}; a JSON object with {', '.join(sorted(required))} is needed")
    wrong = (set(data) - required - optional) | (required - set(data))
    if wrong:
        known = ", ".join(sorted(required | optional))
        raise ConfigError(f"{what} has missing or unknown keys: {', '.join(sorted(wrong))}; its keys are: {known}")
