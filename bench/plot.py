"""Charts as one page that needs nothing else (inline SVG), and as PNG files where matplotlib is installed."""

from __future__ import annotations

import importlib.util
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from dibit.bench.charts import Chart, Results, Table, charts_of, tables_of
from dibit.bench.gpu_charts import gpu_charts, gpu_tables
from dibit.engine.errors import ConfigError
from dibit.quantize.report_style import STYLE
from dibit.quantize.report_svg import escape, line_chart, number

HTML_NAME = "bench.html"
_COLOURS = ("#7b8794", "#1f6fb2", "#c2570c", "#2f855a", "#8a4fbf")


def plot(results: Results, out: Path) -> list[Path]:
    """Write the page, and a PNG of every chart where that is possible. The files written, the page first.

    Raises ConfigError when there is nothing to draw, or `out` cannot be written.
    """
    charts = [*charts_of(results), *gpu_charts(results.gpus)]
    tables = [*tables_of(results), *gpu_tables(results.gpus)]
    if not charts and not tables:
        raise ConfigError(
            "there are no results to draw; bench serve, decode and ops write them with --save-result, --json"
        )
    try:
        out.mkdir(parents=True, exist_ok=True)
        page = out / HTML_NAME
        aside = page.with_name(page.name + ".partial")
        processors = sorted(results.cpus | {run["gpu"] for run in results.gpus})
        aside.write_text(render(charts, tables, measured_on=", ".join(processors)), encoding="utf-8")
        aside.replace(page)
        return [page, *(_write_png(chart, out) for chart in charts if has_png())]
    except OSError as error:
        raise ConfigError(f"cannot write {out}: {error}") from error


def has_png() -> bool:
    return importlib.util.find_spec("matplotlib") is not None


def render(charts: Sequence[Chart], tables: Sequence[Table], *, measured_on: str) -> str:
    """The page."""
    sections = [
        (
            chart.title,
            line_chart(
                chart.series,
                x_label=chart.x_label,
                y_label=chart.y_label,
                log=chart.log_y,
                log_x=chart.log_x,
                dots=True,
                height=300,
            )
            + (f"<p>{escape(chart.note)}</p>" if chart.note else ""),
        )
        for chart in charts
    ]
    sections += [(table.title, _table(table)) for table in tables]
    body = "".join(f"<section><h2>{escape(title)}</h2>{content}</section>" for title, content in sections)
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>dibit bench</title><style>{STYLE}</style></head>\n"
        f"<body><h1>dibit bench</h1><p>{escape(measured_on)}</p>{body}</body></html>\n"
    )


def _table(table: Table) -> str:
    head = "".join(f"<th>{escape(name)}</th>" for name in table.header)
    rows = "".join("<tr>" + "".join(f"<td>{escape(cell)}</td>" for cell in row) + "</tr>" for row in table.rows)
    return f"<table><tr>{head}</tr>{rows}</table>"


def _write_png(chart: Chart, out: Path) -> Path:
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 4.5), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots()
    for series in chart.series:
        dashed = "dashed" in series.style
        axes.plot(
            [x for x, _ in series.points],
            [y for _, y in series.points],
            color=_COLOURS[int(series.style[1])],
            linestyle="" if not series.joined else "--" if dashed else "-",
            marker="" if dashed else "o",
            label=series.name,
        )
    axes.set(title=chart.title, xlabel=chart.x_label, ylabel=chart.y_label)
    if chart.log_x:
        axes.set_xscale("log")
        _plain_numbers(axes.xaxis)
    if chart.log_y:
        axes.set_yscale("log")
        _plain_numbers(axes.yaxis)
    else:
        axes.set_ylim(bottom=0)
    axes.grid(visible=True, alpha=0.3)
    axes.legend(fontsize="small")
    path = out / f"{chart.name}.png"
    aside = path.with_name(path.name + ".partial")
    figure.savefig(aside, dpi=150, format="png")
    aside.replace(path)
    return path


def _plain_numbers(axis: Any) -> None:
    """1, 2, 5, 10, ... in place of powers of ten."""
    from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

    axis.set_major_locator(LogLocator(base=10, subs=(1.0, 2.0, 5.0)))
    axis.set_major_formatter(FuncFormatter(lambda value, _: number(value)))
    axis.set_minor_formatter(NullFormatter())
