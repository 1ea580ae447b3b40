"""The report of a quantization run as one page that needs nothing else: no network, no script.

It is made from `QuantizeReport` alone, so it can be made again from the JSON (`dibit report`). Names and messages that
come from a checkpoint or from a file name are escaped, every one of them.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from dibit.quantize.report import CHANNEL_QUANTILES, InputRange, QuantizeReport, SiteReport, TrainingReport, duration
from dibit.quantize.report_finetune import end_to_end_section
from dibit.quantize.report_style import STYLE
from dibit.quantize.report_svg import (
    Series,
    escape,
    legend,
    line_chart,
    number,
    ramp,
    ramp_legend,
    stacked_bars,
    value_map,
)

HTML_NAME = "quantize_report.html"

_BITS_COLOURS = {2: "#b45309", 3: "#d9a441", 4: "#6aa9c9", 8: "#1f5f8b"}
_OTHER_COLOUR = "#7c7c7c"
_PLACE = re.compile(r"(?:^|\.)(\d+)\.(.+)$")
# A list of sites longer than this is not read by anybody; the JSON has all.
_MOST_ROWS = 200


def write_html(report: QuantizeReport, directory: Path) -> Path:
    """Write the page beside the report, whole or not at all; its path. What finetune reported there is part of it."""
    path = directory / HTML_NAME
    aside = path.with_name(path.name + ".new")
    aside.write_text(render(report, end_to_end=end_to_end_section(directory)), encoding="utf-8")
    aside.replace(path)
    return path


def render(report: QuantizeReport, *, end_to_end: str = "") -> str:
    """The page; `end_to_end` is the content of that section."""
    title = f"{report.model}: {report.method}, {report.bits_per_weight:.2f} bits"
    sections = (
        ("Bits", _bits(report)),
        ("Weight error", _weight_errors(report)),
        ("Output error on the calibration text", _output_errors(report)),
        ("Training", _training(report)),
        ("End to end", end_to_end),
        ("Activation ranges", _activations(report)),
        ("Time and memory", _costs(report)),
        ("Importance of the blocks", _importance(report)),
        ("Fallbacks and notes", _notes(report)),
        ("Settings", _settings(report)),
    )
    body = "".join(f"<section><h2>{name}</h2>{content}</section>" for name, content in sections if content)
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>{escape(title)}</title><style>{STYLE}</style></head>\n"
        f"<body><h1>{escape(title)}</h1>{_facts(report)}{body}</body></html>\n"
    )


def _facts(report: QuantizeReport) -> str:
    errors = [site.weight_error for site in report.sites if math.isfinite(site.weight_error)]
    facts = {
        "checkpoint": report.out,
        "bits per quantized weight": f"{report.bits_per_weight:.3f}",
        "relative weight error, mean": number(_mean(errors)),
        "time": duration(report.seconds),
        "peak memory": _gib(report.peak_rss_bytes),
        "fallbacks": f"{len(report.fallbacks)} of {len(report.sites)} sites",
    }
    trained = [block for block in report.training if block is not None]
    ratios = [ratio for block in trained if math.isfinite(ratio := _gain(block))]
    if ratios:
        facts["held-out error over that of rounding to nearest, mean"] = f"{_mean(ratios):.3f}"
    cells = "".join(f"<div><dt>{escape(k)}</dt><dd>{escape(v)}</dd></div>" for k, v in facts.items())
    return f'<dl class="facts">{cells}</dl>'


def _bits(report: QuantizeReport) -> str:
    grid = _Grid.of(pair for site in report.sites for pair in _formats(site))
    widths = sorted({_bits_of(found) for found in grid.values.values()})

    def cell(row: int, column: int) -> tuple[str, str] | None:
        own = grid.at(row, column)
        if own is None:
            return None
        return _BITS_COLOURS.get(_bits_of(own), _OTHER_COLOUR), f"{grid.name(row, column)}: {own}"

    marks = "".join(
        f'<span><i style="background:{_BITS_COLOURS.get(bits, _OTHER_COLOUR)}"></i>'
        f"{f'{bits} bits' if bits else 'other'}</span> "
        for bits in widths
    )
    return value_map(grid.rows, grid.columns, cell, label="bits") + f'<p class="legend">{marks}</p>'


def _weight_errors(report: QuantizeReport) -> str:
    pairs = (
        pair
        for site in report.sites
        for pair in (
            [(part.module, part.weight_error) for part in site.parts]
            if site.parts
            else [(site.site, site.weight_error)]
        )
    )
    grid = _Grid.of(pairs)
    finite = [value for value in grid.values.values() if math.isfinite(value)]
    if not finite:
        return ""
    low, high = min(finite), max(finite)

    def cell(row: int, column: int) -> tuple[str, str] | None:
        value = grid.at(row, column)
        return None if value is None else (ramp(value, low, high), f"{grid.name(row, column)}: {number(value)}")

    worst = sorted((v, k) for k, v in grid.values.items() if math.isfinite(v))[-1]
    return (
        "<p>Squared error of each linear's weight over its squared norm"
        f" (highest: {escape(grid.full(worst[1]))}, {number(worst[0])}).</p>"
        + value_map(grid.rows, grid.columns, cell, label="relative weight error")
        + ramp_legend(low, high)
    )


def _output_errors(report: QuantizeReport) -> str:
    by_key = _by_key((site.site, site.output_error) for site in report.sites if site.output_error is not None)
    series = [Series(key, points, f"s{i % 5}") for i, (key, points) in enumerate(by_key.items())]
    chart = line_chart(series, x_label="block", y_label="relative squared error", log=True, dots=True)
    return chart and "<p>Of each site alone, given what the quantized blocks before it pass on.</p>" + chart


def _training(report: QuantizeReport) -> str:
    trained = [(layer, block) for layer, block in enumerate(report.training) if block is not None]
    if not trained:
        return ""
    gains = Series("held out over baseline", [(layer, _gain(block)) for layer, block in trained], "s1")
    even = Series("rounding to nearest", [(layer, 1.0) for layer, _ in trained], "s2 dashed")
    overview = line_chart([gains, even], x_label="block", y_label="loss ratio", dots=len(trained) < 60)
    curves = "".join(f"<figure><figcaption>block {layer}</figcaption>{_curve(b)}</figure>" for layer, b in trained)
    names = legend([("training batches", "s0"), ("held-out text", "s1"), ("rounded to nearest, held out", "s2 dashed")])
    return (
        "<p>Mean squared error of each block's output. Below 1 in the first picture, training was better than "
        f"rounding to nearest.</p>{overview}<h3>Loss by step</h3>{names}"
        f'<div class="small">{curves}</div>'
    )


def _curve(block: TrainingReport) -> str:
    steps = [step for step, _ in (*block.losses, *block.validation)]
    ends = (min(steps, default=0), max(steps, default=1))
    series = [
        Series("training", block.losses, "s0"),
        Series("held out", block.validation, "s1"),
        Series("baseline", [(step, block.baseline) for step in ends], "s2 dashed"),
    ]
    chart = line_chart(series, x_label="step", y_label="", log=True, width=236, height=150)
    return chart.partition("</svg>")[0] + "</svg>" if chart else "<p>nothing finite</p>"


def _activations(report: QuantizeReport) -> str:
    seen = [(site.site, site.input) for site in report.sites if site.input is not None]
    if not seen:
        return ""
    keys = list(_by_key((name, 0.0) for name, _ in seen))
    figures = []
    for key in keys:
        ranges = [(layer, found) for name, found in seen for layer, own in [_place(name)] if own == key]
        last = len(CHANNEL_QUANTILES) - 1
        series = [
            Series("loudest channel", [(layer, found.quantiles[last]) for layer, found in ranges], "s2"),
            Series("99 % of channels", [(layer, found.quantiles[last - 1]) for layer, found in ranges], "s3"),
            Series("median channel", [(layer, found.quantiles[1]) for layer, found in ranges], "s1"),
            Series("root mean square", [(layer, found.rms) for layer, found in ranges], "s0 dashed"),
        ]
        chart = line_chart(series, x_label="block", y_label="magnitude", log=True, width=372, height=200, dots=True)
        figures.append(f"<figure><figcaption>input of {escape(key)}</figcaption>{chart}</figure>")
    return (
        "<p>Largest magnitude of the channels that enter each site of the quantized model, on the calibration text. "
        f'One channel far above the median takes the scale of an activation for itself.</p><div class="small">'
        f"{''.join(figures)}</div>{_loudest(seen)}"
    )


def _loudest(seen: Sequence[tuple[str, InputRange]]) -> str:
    ratios = []
    for name, found in seen:
        median = found.quantiles[1]
        if found.largest and median > 0:
            ratios.append((found.largest[0][1] / median, name, found.largest))
    rows = [
        [name, f"{ratio:.1f}", ", ".join(f"{channel}: {number(value)}" for channel, value in largest)]
        for ratio, name, largest in sorted(ratios, reverse=True)[:8]
    ]
    return "<h3>Loudest inputs</h3>" + _table(["site", "loudest over median", "channel: magnitude"], rows)


def _costs(report: QuantizeReport) -> str:
    first = report.resumed_blocks
    seconds: dict[int, float] = {}
    for site in report.sites:
        layer, _ = _place(site.site)
        seconds[layer] = seconds.get(layer, 0.0) + site.seconds
    own = [min(seconds.get(first + i, 0.0), total) for i, total in enumerate(report.block_seconds)]
    rest = [total - part for total, part in zip(report.block_seconds, own, strict=True)]
    bars = stacked_bars(
        [("quantizing", "f1", own), ("reading, hidden states, writing", "f0", rest)],
        x_label="block",
        y_label="seconds",
        first=first,
    )
    memory = [(first + i, used / 2**30) for i, used in enumerate(report.block_rss_bytes)]
    chart = line_chart([Series("resident", memory, "s1")], x_label="block", y_label="GiB", height=140)
    rows = [[stage.name, duration(stage.seconds), _gib(stage.peak_rss_bytes)] for stage in report.stages]
    rows.append(["whole run", duration(report.seconds), _gib(report.peak_rss_bytes)])
    speeds = [block.tokens_per_s for block in report.training if block is not None and block.tokens_per_s]
    speed = f"<p>Training went through {_mean(speeds):.0f} tokens per second.</p>" if speeds else ""
    again = f"<p>{first} blocks were taken over from an interrupted run.</p>" if first else ""
    memory_title = "<h3>Resident memory at the end of each block</h3>" if chart else ""
    table = _table(["stage", "time", "peak memory so far"], rows)
    return f"{table}{again}{speed}<h3>Time of each block</h3>{bars}{memory_title}{chart}"


def _importance(report: QuantizeReport) -> str:
    allocation = report.allocation
    scores = None if allocation is None else allocation.get("scores")
    if not isinstance(scores, Sequence) or not scores:
        return ""
    points = [(float(layer), math.nan if score is None else float(score)) for layer, score in enumerate(scores)]
    return line_chart([Series("score", points, "s1")], x_label="block", y_label="score", dots=True)


def _notes(report: QuantizeReport) -> str:
    rows = [[site.site, site.method, site.fallback or ""] for site in report.fallbacks[:_MOST_ROWS]]
    parts = []
    if rows:
        parts.append(_table(["site", "quantized by", "because"], rows))
    notes = []
    for layer, block in enumerate(report.training):
        if block is not None:
            notes += [[str(layer), note] for note in block.notes]
    if notes:
        parts.append(_table(["block", "training"], notes[:_MOST_ROWS]))
    parts += [f"<p>{escape(note)}</p>" for note in report.notes]
    hidden = max(0, len(report.fallbacks) - _MOST_ROWS) + max(0, len(notes) - _MOST_ROWS)
    if hidden:
        parts.append(f"<p>{hidden} more are in the JSON.</p>")
    return "".join(parts) or "<p>None.</p>"


def _settings(report: QuantizeReport) -> str:
    rows = [["source", report.source], ["method", report.method]]
    rows += [[f"option {name}", str(value)] for name, value in report.options.items()]
    if report.activation_bits is not None:
        rows.append(["activation bits", str(report.activation_bits)])
    if report.calibration is not None:
        rows += [[f"calibration {name.replace('_', ' ')}", str(value)] for name, value in report.calibration.items()]
    rows += [["seed", str(report.seed)], ["threads", str(report.threads)]]
    rows += [[f"version of {name}", str(value)] for name, value in report.versions.items()]
    documents = {"plan": report.plan, "budget": report.allocation}
    blocks = "".join(
        f"<details><summary>{name}</summary><pre>{escape(_json(value))}</pre></details>"
        for name, value in documents.items()
        if value
    )
    return _table(["", ""], rows) + blocks


class _Grid:
    """Values by linear and block; `rows` are the linears in the order of their first appearance."""

    def __init__(self, values: Mapping[tuple[int, str], Any], names: Mapping[tuple[int, str], str]) -> None:
        self.values, self._names = values, names
        self.rows = list(dict.fromkeys(key for _, key in values))
        self.columns = max((layer for layer, _ in values), default=-1) + 1

    @classmethod
    def of(cls, pairs: Iterable[tuple[str, Any]]) -> _Grid:
        listed = list(pairs)
        return cls({_place(n): v for n, v in listed}, {_place(n): n for n, _ in listed})

    def at(self, row: int, column: int) -> Any:
        return self.values.get((column, self.rows[row]))

    def name(self, row: int, column: int) -> str:
        return self._names[column, self.rows[row]]

    def full(self, place: tuple[int, str]) -> str:
        return self._names[place]


def _place(name: str) -> tuple[int, str]:
    """Block and what is in it: "model.layers.3.self_attn.q_proj" is (3, "self_attn.q_proj")."""
    match = _PLACE.search(name)
    return (0, name) if match is None else (int(match[1]), match[2])


def _by_key(pairs: Iterable[tuple[str, float]]) -> dict[str, list[tuple[float, float]]]:
    """Points (block, value) of each kind of site."""
    found: dict[str, list[tuple[float, float]]] = {}
    for name, value in pairs:
        layer, key = _place(name)
        found.setdefault(key, []).append((layer, value))
    return found


def _formats(site: SiteReport) -> list[tuple[str, str]]:
    return [(part.module, part.format) for part in site.parts] or [(site.site, site.format)]


def _bits_of(format: str) -> int:
    """0 where the name does not say."""
    match = re.match(r"int(\d+)-", format)
    return 0 if match is None or "+" in format else int(match[1])


def _gain(block: TrainingReport) -> float:
    losses = [loss for _, loss in block.validation if math.isfinite(loss)]
    return min(losses) / block.baseline if losses and block.baseline > 0 else math.nan


def _table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    top = "".join(f"<th>{escape(name)}</th>" for name in head) if any(head) else ""
    body = "".join("<tr>" + "".join(f"<td>{escape(cell)}</td>" for cell in row) + "</tr>" for row in rows)
    return f"<table>{f'<tr>{top}</tr>' if top else ''}{body}</table>"


def _mean(values: Sequence[float]) -> float:
    return math.fsum(values) / len(values) if values else math.nan


def _gib(size_bytes: int) -> str:
    return f"{size_bytes / 2**30:.2f} GiB"


def _json(value: Any) -> str:
    return json.dumps(value, indent=1, ensure_ascii=False, default=str)
