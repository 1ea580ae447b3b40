"""Charts and tables of what `make gpu` found (gpu_records.py), from its JSON."""

from __future__ import annotations

import statistics
from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence

from dibit.bench.charts import Chart, Record, Table, medians
from dibit.quantize.report_svg import Series

_STYLES = {2: "s1", 3: "s2", 4: "s3"}


def gpu_charts(runs: Iterable[Record]) -> list[Chart]:
    """Of every run: prediction and measurement, the share of the bandwidth, the ratio to each peer."""
    return [chart for run in runs for chart in (_predicted(run), _bandwidth(run), *_beside(run)) if chart.series]


def gpu_tables(runs: Iterable[Record]) -> list[Table]:
    return [table for run in runs for table in (_checks(run), _ratios(run), _speeds(run), _left_out(run)) if table.rows]


def _predicted(run: Record) -> Chart:
    known = [row for row in run["timings"] if row["predicted_us"] is not None]
    series = _by_bits(known, lambda row: (row["predicted_us"], row["us"]), joined=False)
    if series:
        ends = [value for row in known for value in (row["predicted_us"], row["us"])]
        series = [Series("as predicted", [(min(ends), min(ends)), (max(ends), max(ends))], "s0 dashed"), *series]
    return Chart(
        _name(run, "predicted"),
        f"{run['gpu']}: predicted and measured",
        "predicted, us",
        "measured, us",
        series,
        "A point is one shape and number of tokens.",
        log_x=True,
        log_y=True,
    )


def _bandwidth(run: Record) -> Chart:
    copied = max((row["gb_s"] for row in run["bandwidth"]), default=0.0)

    def share(row: Record) -> tuple[float, float]:
        return row["m"], 100 * row["weight_bytes"] / row["us"] / 1e3 / copied

    return Chart(
        _name(run, "bandwidth"),
        f"{run['gpu']}: share of the bandwidth",
        "tokens",
        "%",
        _by_bits(run["timings"], share) if copied else [],
        f"Bytes of the weight over the time, beside the {copied:.0f} GB/s of a long copy; medians over the shapes.",
        log_x=True,
    )


def _beside(run: Record) -> list[Chart]:
    return [
        Chart(
            _name(run, f"beside-{peer}"),
            f"{run['gpu']}: beside {peer}",
            "tokens",
            f"time of {peer} over dibit's",
            [
                Series(f"{bits} bits", medians((m, ratio) for _, m, ratio in rows), _STYLES.get(bits, "s4"))
                for bits, rows in sorted(found.items())
            ],
            "Above 1 dibit is faster; medians over the shapes.",
            log_x=True,
        )
        for peer, found in _compared(run).items()
    ]


def _compared(run: Record) -> dict[str, dict[int, list[tuple[str, int, float]]]]:
    """(shape, tokens, ratio) by peer and bits of dibit's weight."""
    own = defaultdict(list)
    for row in run["timings"]:
        own[row["n"], row["k"], row["m"]].append(row)
    found: dict[str, dict[int, list[tuple[str, int, float]]]] = defaultdict(lambda: defaultdict(list))
    for row in run["peers"]:
        for mine in own[row["n"], row["k"], row["m"]]:
            if row["bits"] in (16, mine["bits"]):
                entry = f"[{row['n']}, {row['k']}]", row["m"], row["us"] / mine["us"]
                found[row["peer"]][mine["bits"]].append(entry)
    return found


def _ratios(run: Record) -> Table:
    rows = []
    for peer, by_bits in _compared(run).items():
        for bits, entries in sorted(by_bits.items()):
            for m in sorted({m for _, m, _ in entries}):
                ratios = {shape: ratio for shape, at, ratio in entries if at == m}
                worst = min(ratios, key=ratios.__getitem__)
                median = statistics.median(ratios.values())
                rows.append((peer, str(bits), str(m), f"{median:.2f}", f"{ratios[worst]:.2f}", worst))
    return Table(f"{run['gpu']}: times as fast", ("as", "bits", "tokens", "median", "least", "at"), rows)


def _checks(run: Record) -> Table:
    failed = [(row["name"], row["detail"]) for row in run["checks"] if not row["passed"]]
    return Table(f"{run['gpu']}: {len(failed)} of {len(run['checks'])} checks failed", ("check", "why"), failed)


def _speeds(run: Record) -> Table:
    rows = [(row["model"], str(row["batch"]), f"{row['tok_s']:.1f}") for row in run["decoding"]]
    return Table(f"{run['gpu']}: decoding", ("model", "sequences", "tokens / s"), rows)


def _left_out(run: Record) -> Table:
    return Table(
        f"{run['gpu']}: left out", ("section", "why"), [(note["section"], note["text"]) for note in run["notes"]]
    )


def _by_bits(
    rows: Sequence[Record], point: Callable[[Record], tuple[float, float]], *, joined: bool = True
) -> list[Series]:
    """A series for every width: all points, or their medians joined by a line."""
    found = defaultdict(list)
    for row in rows:
        found[row["bits"]].append(point(row))
    return [
        Series(f"{bits} bits", medians(points) if joined else sorted(points), _STYLES.get(bits, "s4"), joined=joined)
        for bits, points in sorted(found.items())
    ]


def _name(run: Record, what: str) -> str:
    return f"{run['gpu'].replace(' ', '-')}-{what}"
