"""Charts of measured figures, out of the JSON that the bench commands write. What is drawn, not how.

A file is known by its keys: a result of `bench serve`, `bench decode`, `bench ops`, of the comparison with llama.cpp,
or of `make gpu` (gpu_charts.py). Speeds of different processors are never put into one chart: files that were measured
on several are refused, every GPU has its own charts.
"""

from __future__ import annotations

import json
import statistics
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

from dibit.engine.errors import ConfigError
from dibit.quantize.report_svg import Series, number

Record = Mapping[str, Any]
_COLOURS = 5
# From here on a product is bound by arithmetic, not by reading its weights.
_MANY_TOKENS = 64
_LATENCIES = {"ttft": "time to first token", "tpot": "time per output token", "e2el": "end-to-end latency"}


@dataclass(frozen=True)
class Chart:
    """`name` is that of its file, `note` what a reader must know."""

    name: str
    title: str
    x_label: str
    y_label: str
    series: Sequence[Series]
    note: str = ""
    log_x: bool = False
    log_y: bool = False


@dataclass(frozen=True)
class Table:
    """Rows of text under a header."""

    title: str
    header: Sequence[str]
    rows: Sequence[Sequence[str]]


@dataclass(frozen=True)
class Results:
    """What was read, by kind; `cpus` are the processors that it was measured on (or from), `unknown` no results."""

    serve: list[Record] = field(default_factory=list)
    decode: list[Record] = field(default_factory=list)
    ops: list[Record] = field(default_factory=list)
    comparisons: list[Record] = field(default_factory=list)
    gpus: list[Record] = field(default_factory=list)
    cpus: set[str] = field(default_factory=set)
    unknown: list[Path] = field(default_factory=list)


def read_results(paths: Iterable[Path]) -> Results:
    """Of files, and of all JSON files in directories. Raises ConfigError for a file that holds no results."""
    results = Results()
    for path in paths:
        if path.is_dir():
            for file in sorted(path.rglob("*.json")):
                if not _add(results, _load(file)):
                    results.unknown.append(file)
        elif not _add(results, _load(path)):
            raise ConfigError(
                f"{path} holds no results of bench serve, decode or ops, make gpu, or the comparison with llama.cpp"
            )
    if len(results.cpus) > 1:
        raise ConfigError(f"results of several processors ({', '.join(sorted(results.cpus))}); plot them one by one")
    return results


def charts_of(results: Results) -> list[Chart]:
    """All charts that the results have something for."""
    found = [*_serving(results.serve), *_decoding(results.decode), _roofline(results.ops)]
    return [chart for chart in found if chart is not None and any(series.points for series in chart.series)]


def tables_of(results: Results) -> list[Table]:
    found = [_serving_table(results.serve)] if results.serve else []
    return [*found, *(_comparison_table(one) for one in results.comparisons)]


def _serving_table(records: Sequence[Record]) -> Table:
    keys = {
        "req/s": "request_throughput",
        "good req/s": "request_goodput",
        "tok/s": "output_throughput",
        "failed": "failed",
        **{f"{name.upper()} median, ms": f"median_{name}_ms" for name in ("ttft", "tpot", "itl", "e2el")},
    }
    percentile = {f"{name.upper()} p99, ms": f"p99_{name}_ms" for name in ("ttft", "tpot", "itl", "e2el")}
    keys |= {label: key for label, key in percentile.items() if any(key in record for record in records)}
    rows = [
        (
            _run_name(record),
            str(record["request_rate"]),
            str(record.get("max_concurrency") or ""),
            *(number(record[key]) if record.get(key) is not None else "" for key in keys.values()),
        )
        for record in sorted(records, key=lambda one: (_run_name(one), str(one["request_rate"])))
    ]
    return Table("Runs of bench serve", ("run", "rate", "concurrency", *keys), rows)


def _comparison_table(one: Record) -> Table:
    return Table(
        f"Beside llama.cpp ({one['llama_cpp']})",
        ("model", "bits", "llama.cpp", "work", "unit", "dibit", "llama.cpp", "ratio", "to reach"),
        [
            (
                *(str(row[key]) for key in ("model", "bits", "type", "work", "unit")),
                *(f"{row[key]:.4g}" for key in ("dibit", "llama_cpp")),
                f"{row['ratio']:.2f}" if row["llama_cpp"] else "",
                row["goal"] + {True: " ✓", False: " ✗", None: ""}[row["met"]],
            )
            for row in one["rows"]
        ],
    )


def _load(path: Path) -> Any:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ConfigError(f"cannot read {path}: {error}") from error


def _add(results: Results, data: Any) -> bool:
    """Whether the data is of a known kind."""
    records = data if isinstance(data, list) else [data]
    if not records or not all(isinstance(record, dict) for record in records):
        return False
    kinds: tuple[tuple[str, list[Record]], ...] = (
        ("output_throughput", results.serve),
        ("decode_tok_s", results.decode),
        ("gmac_s", results.ops),
        ("llama_cpp", results.comparisons),
        ("timings", results.gpus),
    )
    for key, kind in kinds:
        if all(key in record for record in records):
            kind.extend(records)
            facts = (record.get("machine") or record.get("client") or {} for record in records)
            results.cpus.update(fact["cpu"] for fact in facts if "cpu" in fact)
            return True
    return False


def _serving(records: Sequence[Record]) -> list[Chart]:
    closed = [record for record in records if record["request_rate"] == "inf" and record.get("max_concurrency")]
    opened = [record for record in records if record["request_rate"] != "inf"]
    limit, rate = partial(_value, "max_concurrency"), partial(_value, "request_rate")
    throughput = Chart(
        "throughput-concurrency",
        "Throughput against concurrency",
        "requests under way at most",
        "output tokens / s",
        _lines(closed, limit, {"": "output_throughput"}),
        log_x=True,
    )
    charts = [throughput]
    if any(record.get("request_goodput") is not None for record in opened):
        names = {"": "request_throughput", ", good": "request_goodput"}
        charts.append(
            Chart("goodput-rate", "Requests answered", "requests sent / s", "requests / s", _lines(opened, rate, names))
        )
    for name, title in _LATENCIES.items():
        percentile = _highest_percentile(records, name)
        keys = {", median": f"median_{name}_ms"} | (
            {f", p{percentile}": f"p{percentile}_{name}_ms"} if percentile else {}
        )
        for file, label, some, x, log_x in (
            ("rate", "requests sent / s", opened, rate, False),
            ("concurrency", "requests under way at most", closed, limit, True),
        ):
            charts.append(
                Chart(
                    f"{name}-{file}",
                    f"{title[0].upper()}{title[1:]} against {file}",
                    label,
                    f"{name.upper()}, ms",
                    _lines(some, x, keys),
                    log_x=log_x,
                    log_y=True,
                )
            )
    return charts


def _lines(records: Sequence[Record], x: Callable[[Record], float], keys: Mapping[str, str]) -> list[Series]:
    """For every run name and key a line; the second key of a run has its colour, dashed."""
    groups: dict[str, list[Record]] = defaultdict(list)
    for record in records:
        groups[_run_name(record)].append(record)
    lines = []
    for i, (name, group) in enumerate(sorted(groups.items())):
        for dashed, (suffix, key) in zip((False, True), keys.items(), strict=False):
            points = medians((x(record), float(record[key])) for record in group if record.get(key) is not None)
            style = f"s{(i + 1) % _COLOURS}" + (" dashed" if dashed else "")
            lines.append(Series(name + suffix, points, style))
    return [line for line in lines if line.points]


def _run_name(record: Record) -> str:
    return record.get("label") or f"{record['model_id']}, {record['backend']}"


def _value(key: str, record: Record) -> float:
    return float(record[key])


def medians(points: Iterable[tuple[float, float]]) -> list[tuple[float, float]]:
    """One point for every place, in order: a run that was made again counts once."""
    places: dict[float, list[float]] = defaultdict(list)
    for x, y in points:
        places[x].append(y)
    return [(x, statistics.median(values)) for x, values in sorted(places.items())]


def _highest_percentile(records: Sequence[Record], name: str) -> str:
    found = {
        key[1:].split("_")[0]
        for record in records
        for key in record
        if key.startswith("p") and key.endswith(f"_{name}_ms")
    }
    return max(found, key=float, default="")


def _decoding(records: Sequence[Record]) -> list[Chart]:
    """Tokens per second by batch, beside what reading the weights once a step allows."""
    groups: dict[tuple[str, float, int], list[Record]] = defaultdict(list)
    for record in records:
        groups[record["model"], record["bits"], record["prompt_len"]].append(record)
    lines = []
    for i, ((model, bits, prompt_len), group) in enumerate(sorted(groups.items())):
        style = f"s{(i + 1) % _COLOURS}"
        name = f"{Path(model).name}, {bits:g} bits, after {prompt_len} tokens"
        speeds = medians((record["batch"], record["decode_tok_s"]) for record in group)
        limits = medians(
            (record["batch"], record["bandwidth_gb_s"] * 1e9 / record["weight_bytes_per_token"]) for record in group
        )
        lines += [Series(name, speeds, style), Series(f"{name}, limit of bandwidth", limits, f"{style} dashed")]
    note = (
        "The limit is the read bandwidth measured in the same run over the bytes of weights that a step reads. "
        "A model that stays in the processor's cache may pass it."
    )
    return [Chart("decode-batch", "Decode", "sequences", "tokens / s", lines, note, log_x=True, log_y=True)]


def _roofline(records: Sequence[Record]) -> Chart | None:
    """Products by how many operations they make of a byte, under the slope of the bandwidth, and where many tokens were
    multiplied at once, the level of the fastest product."""
    if not records:
        return None
    groups: dict[int, list[tuple[float, float]]] = defaultdict(list)
    for record in records:
        operations = 2.0 * record["m"] * record["n"] * record["k"]
        groups[record["bits"]].append((operations / record["weight_bytes"], record["gmac_s"] * 2))
    bandwidth = max(record["bandwidth_gb_s"] for record in records)
    places = [x for group in groups.values() for x, _ in group]
    low, high = min(places) / 1.5, max(places) * 1.5
    fastest = max(rate for group in groups.values() for _, rate in group)
    name, roof = f"{bandwidth:.1f} GB/s read", [(low, low * bandwidth), (high, high * bandwidth)]
    if max(record["m"] for record in records) >= _MANY_TOKENS and low < fastest / bandwidth < high:
        name += ", then the fastest product"
        roof = [roof[0], (fastest / bandwidth, fastest), (high, fastest)]
    series = [Series(name, roof, "s0 dashed")]
    for i, (bits, group) in enumerate(sorted(groups.items())):
        series.append(Series(f"{bits} bits", sorted(group), f"s{(i + 1) % _COLOURS}", joined=False))
    note = "Where the roof is level it is the fastest of these products, not a property of the machine."
    return Chart(
        "roofline",
        "Roofline of the quantized linear",
        "operations per byte of weights",
        "operations / s, 1e9",
        series,
        note,
        log_x=True,
        log_y=True,
    )
