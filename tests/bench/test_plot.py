"""Charts of results: what is read, that numbers land where they should, and that the page is whole."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest
from typer.testing import CliRunner

from dibit.bench import plot
from dibit.bench.charts import Results, charts_of, read_results, tables_of
from dibit.engine.errors import ConfigError
from dibit.quantize.report_svg import Series, line_chart
from dibit.server.cli import app

FACTS = {"cpu": "a processor"}


def serve_record(**fields: Any) -> dict[str, Any]:
    values: dict[str, Any] = {
        "model_id": "m<1>",
        "backend": "openai",
        "label": None,
        "request_rate": "inf",
        "max_concurrency": None,
        "request_throughput": 2.0,
        "output_throughput": 100.0,
        "request_goodput": None,
        "client": FACTS,
    }
    for name in ("ttft", "tpot", "itl", "e2el"):
        values |= {f"median_{name}_ms": 10.0, f"p50_{name}_ms": 10.0, f"p99_{name}_ms": 30.0}
    return values | fields


def decode_record(batch: int, speed: float, **fields: Any) -> dict[str, Any]:
    return {
        "model": "models/four",
        "bits": 4,
        "batch": batch,
        "prompt_len": 32,
        "decode_tok_s": speed,
        "weight_bytes_per_token": 1e8 / batch,
        "bandwidth_gb_s": 20.0,
        "machine": FACTS,
        **fields,
    }


def op_record(m: int, rate: float, *, bits: int = 4) -> dict[str, Any]:
    sizes = {"m": m, "n": 100, "k": 100, "bits": bits, "weight_bytes": 5000}
    return {**sizes, "gmac_s": rate, "bandwidth_gb_s": 20.0, "machine": FACTS}


def comparison() -> dict[str, Any]:
    row = {"model": "m", "bits": 2, "type": "Q2_K", "work": "decode 1", "unit": "tok/s", "dibit": 51.25}
    return {
        "llama_cpp": "version 7",
        "machine": FACTS,
        "rows": [{**row, "llama_cpp": 20.5, "ratio": 2.5, "goal": ">= 2 x", "met": True}],
    }


def write(directory: Path, name: str, data: Any) -> Path:
    path = directory / name
    path.write_text(json.dumps(data))
    return path


def test_charts_hold_the_figures() -> None:
    results = Results(
        serve=[
            serve_record(max_concurrency=8, output_throughput=300.0, median_ttft_ms=50.0),
            serve_record(max_concurrency=1, output_throughput=80.0, label="own name"),
            serve_record(max_concurrency=1, output_throughput=90.0),
            serve_record(request_rate=2.0, request_throughput=1.9, request_goodput=1.0, p99_tpot_ms=77.0),
            serve_record(request_rate=0.5, max_concurrency=4),
        ],
        decode=[decode_record(8, 700.0), *(decode_record(1, speed) for speed in (160.0, 150.0, 140.0))],
        ops=[op_record(1, 30.0), op_record(64, 500.0), op_record(1, 40.0, bits=2)],
    )
    charts = {chart.name: chart for chart in charts_of(results)}
    # A rate under a highest concurrency is no point of a closed loop.
    assert [(s.name, s.points) for s in charts["throughput-concurrency"].series] == [
        ("m<1>, openai", [(1.0, 90.0), (8.0, 300.0)]),
        ("own name", [(1.0, 80.0)]),
    ]
    assert [(s.name, s.points) for s in charts["tpot-rate"].series] == [
        ("m<1>, openai, median", [(0.5, 10.0), (2.0, 10.0)]),
        ("m<1>, openai, p99", [(0.5, 30.0), (2.0, 77.0)]),
    ]
    assert charts["ttft-concurrency"].series[0].points == [(1.0, 10.0), (8.0, 50.0)]
    assert [s.points for s in charts["goodput-rate"].series][1] == [(2.0, 1.0)]
    measured, limit = charts["decode-batch"].series
    assert measured.points == [(1, 150.0), (8, 700.0)]
    assert limit.points == [(1, pytest.approx(200.0)), (8, pytest.approx(1600.0))]
    roof, two, four = charts["roofline"].series
    assert two.points == [(4.0, 80.0)]
    assert four.points == [(4.0, 60.0), (256.0, 1000.0)]
    # Every point lies under the roof: 4 operations a byte at 20 GB/s, 1000 at most; the corner at 50.
    assert roof.points[1] == (pytest.approx(50.0), pytest.approx(1000.0))
    assert roof.points[0][1] == pytest.approx(roof.points[0][0] * 20)
    assert {"e2el-rate", "e2el-concurrency"} <= charts.keys()


def test_what_is_missing_makes_no_chart() -> None:
    assert [chart.name for chart in charts_of(Results(decode=[decode_record(1, 5.0)]))] == ["decode-batch"]
    bare = serve_record(request_rate=1.0)
    del bare["p99_ttft_ms"], bare["p50_ttft_ms"]
    [chart] = [c for c in charts_of(Results(serve=[bare])) if c.name == "ttft-rate"]
    assert [series.name for series in chart.series] == ["m<1>, openai, median"]


def test_files_are_known_by_their_keys(tmp_path: Path) -> None:
    write(tmp_path, "s.json", serve_record())
    write(tmp_path, "d.json", [decode_record(1, 5.0)])
    write(tmp_path, "c.json", comparison())
    other = write(tmp_path, "p.json", {"ppl": 17.0})
    results = read_results([tmp_path])
    assert [len(kind) for kind in (results.serve, results.decode, results.ops, results.comparisons)] == [1, 1, 0, 1]
    assert results.unknown == [other]
    serving, beside = tables_of(results)
    cells = dict(zip(serving.header, serving.rows[0], strict=True))
    assert (cells["run"], cells["rate"], cells["concurrency"]) == ("m<1>, openai", "inf", "")
    assert (cells["tok/s"], cells["TTFT median, ms"], cells["E2EL p99, ms"]) == ("100", "10", "30")
    assert cells["good req/s"] == ""
    assert beside.rows == [
        ("m", "2", "Q2_K", "decode 1", "tok/s", "51.25", "20.5", "2.50", ">= 2 x ✓"),
    ]
    with pytest.raises(ConfigError, match="holds no results"):
        read_results([other])
    write(tmp_path, "o.json", [decode_record(1, 5.0, machine={"cpu": "another"})])
    with pytest.raises(ConfigError, match="several processors"):
        read_results([tmp_path])


def test_the_page_is_whole_and_escaped(tmp_path: Path) -> None:
    files = [write(tmp_path, f"{n}.json", serve_record(max_concurrency=n)) for n in (1, 4)]
    files.append(write(tmp_path, "c.json", comparison()))
    done = CliRunner().invoke(app, ["bench", "plot", *map(str, files), "--out", str(tmp_path / "plots")])
    assert done.exit_code == 0, (done.output, done.exception)
    page = (tmp_path / "plots" / plot.HTML_NAME).read_text()
    assert "m&lt;1&gt;, openai" in page
    assert "m<1>" not in page
    assert "<td>51.25</td>" in page
    assert "http" not in page.replace("http://www.w3.org", "")
    pictures = [part.split("</svg>")[0] for part in page.split("<svg")[1:]]
    assert len(pictures) == 4
    for picture in pictures:
        ElementTree.fromstring(f"<svg{picture}</svg>")
    with_png = importlib.util.find_spec("matplotlib") is not None
    assert bool(list((tmp_path / "plots").glob("*.png"))) == with_png
    assert ("no PNG files" in done.output) != with_png
    assert isinstance(
        CliRunner().invoke(app, ["bench", "plot", str(write(tmp_path, "e.json", []))]).exception, ConfigError
    )


def test_a_logarithmic_axis_across() -> None:
    picture = line_chart(
        [Series("a", [(1.0, 1.0), (10.0, 2.0), (100.0, 3.0)], "s1", joined=False)], x_label="x", y_label="y", log_x=True
    )
    at = [float(part.split('"')[0]) for part in picture.split('cx="')[1:]]
    assert at[1] - at[0] == pytest.approx(at[2] - at[1], abs=0.2)
    assert 'class="s1" d=' not in picture
