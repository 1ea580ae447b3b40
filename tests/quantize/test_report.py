"""The report: read back as it was written, and a page that parses, needs nothing else and trusts no name."""

from __future__ import annotations

import dataclasses
import json
import math
import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest
import torch

from dibit.engine.errors import CheckpointError
from dibit.quantize.pipeline import quantize_checkpoint
from dibit.quantize.ranges import ChannelRange
from dibit.quantize.report import InputRange, PartReport, QuantizeReport, SiteReport, StageReport, TrainingReport
from dibit.quantize.report_html import HTML_NAME, render, write_html
from dibit.quantize.report_svg import Series, line_chart, stacked_bars, value_map

EVIL = '"><script>alert(1)</script>&'
VOID = {"meta", "br"}


class Page(HTMLParser):
    """Fails on tags that are not closed in order; collects tags, text and attributes."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: list[str] = []
        self.shown: list[str] = []
        self.attributes: list[tuple[str, str | None]] = []
        self.feed(page)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.attributes += attrs
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.attributes += attrs

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.shown.append(data)

    @property
    def text(self) -> str:
        return " ".join(self.shown)


def checked(report: QuantizeReport) -> Page:
    """The parsed page, its pictures well-formed, without script or anything from elsewhere."""
    text = render(report)
    for picture in re.findall(r"<svg.*?</svg>", text, re.DOTALL):
        for element in ElementTree.fromstring(picture).iter():
            for name, value in element.attrib.items():
                assert "nan" not in value.lower() or name == "aria-label"
                if name in ("width", "height"):
                    assert float(value) >= 0
    page = Page(text)
    assert "script" not in page.tags
    assert not [name for name, _ in page.attributes if name in ("src", "href") or name.startswith("on")]
    assert "http" not in text
    assert "url(" not in text
    return page


def training(**changes: Any) -> TrainingReport:
    fields: dict[str, Any] = {
        "steps": 8,
        "losses": ((4, 2e-3), (8, 1e-3)),
        "validation": ((0, 3e-3), (4, 2e-3), (8, 1.5e-3)),
        "best_step": 8,
        "baseline": 3e-3,
        "skipped": 0,
        "restarts": 0,
        "notes": (),
        "seconds": 2.0,
        "tokens_per_s": 900.0,
    }
    return TrainingReport(**{**fields, **changes})


def site(layer: int, key: str, **changes: Any) -> SiteReport:
    parts = tuple(PartReport(f"model.layers.{layer}.{key}.{i}", "int4-g64", 8, 64, 1e-3 * (i + 1)) for i in range(2))
    heard = InputRange(512, 0.7, (0.1, 1.0, 2.0, 3.0, 40.0), ((5, 40.0), (9, 3.0)))
    own = SiteReport(f"layers.{layer}.{key}", "int4-g64", "gptq", None, 1e-6, 1.5e-3, 2e-4, 1.0, parts, heard)
    return dataclasses.replace(own, **changes)


def whole(layers: int = 3, **changes: Any) -> QuantizeReport:
    fields: dict[str, Any] = {
        "model": "demo",
        "source": "demo.gguf",
        "out": "models/demo",
        "method": "block-ap",
        "options": {"steps": 8},
        "plan": {"default": "int4-g64"},
        "allocation": None,
        "bits_per_weight": 4.3,
        "calibration": {"text": "wiki.txt", "samples": 8},
        "seed": 0,
        "threads": 2,
        "sites": tuple(site(layer, key) for layer in range(layers) for key in ("qkv", "down")),
        "training": tuple(training() for _ in range(layers)),
        "resumed_blocks": 0,
        "seconds": 100.0,
        "block_seconds": tuple(2.5 for _ in range(layers)),
        "peak_rss_bytes": 2**30,
        "versions": {"dibit": "0"},
        "stages": (StageReport("blocks", 90.0, 2**30),),
        "block_rss_bytes": tuple(2**29 for _ in range(layers)),
        "activation_bits": 8,
    }
    return QuantizeReport(**{**fields, **changes})


def test_every_section_has_its_figures() -> None:
    page = checked(whole(sites=(site(0, "qkv"), site(1, "qkv", fallback="its scales are not finite", method="rtn"))))
    for words in ("block 2", "input of qkv", "its scales are not finite", "1.00 GiB", "int4-g64", "wiki.txt", "40.0"):
        assert words in page.text, words
    assert page.tags.count("figure") == 3 + 1
    assert "model.layers.1.qkv.1: 2.00e-03" in page.text or "model.layers.1.qkv.1: 0.002" in page.text


def test_what_comes_from_elsewhere_is_escaped() -> None:
    named = site(0, "qkv", site=f"layers.0.{EVIL}", fallback=EVIL, method=EVIL, format=EVIL, parts=())
    parts = (PartReport(f"model.layers.1.{EVIL}", EVIL, 1, 1, 0.1),)
    report = whole(
        model=EVIL,
        source=EVIL,
        out=EVIL,
        options={EVIL: EVIL},
        plan={EVIL: EVIL},
        calibration={EVIL: EVIL},
        versions={EVIL: EVIL},
        stages=(StageReport(EVIL, 1.0, 1),),
        sites=(named, site(1, "qkv", parts=parts)),
        training=(training(notes=(EVIL,)), None),
    )
    page = checked(report)
    assert page.text.count("alert(1)") >= 12


def test_a_run_without_text_has_no_curves() -> None:
    sites = tuple(site(layer, "qkv", output_error=None, input=None) for layer in range(2))
    page = checked(whole(layers=2, method="rtn", training=(), sites=sites, calibration=None))
    assert "Training" not in page.text
    assert "Activation ranges" not in page.text
    assert "Weight error" in page.text


def test_figures_that_are_not_finite_leave_gaps() -> None:
    sites = (site(0, "qkv", weight_error=math.nan, output_error=math.nan, parts=()), site(1, "qkv"))
    failed = training(validation=((0, math.nan),), losses=(), baseline=math.inf)
    assert "nothing finite" in checked(whole(sites=sites, training=(failed,))).text
    checked(whole(sites=(dataclasses.replace(sites[0]),), training=(None,), block_seconds=(), block_rss_bytes=()))


def test_a_large_model_makes_a_page_one_can_send() -> None:
    sites = tuple(
        dataclasses.replace(site(layer, key), parts=site(layer, key).parts[:2])
        for layer in range(80)
        for key in ("qkv", "o", "gate_up", "down")
    )
    report = whole(layers=80, sites=sites)
    checked(report)
    assert len(render(report)) < 1_000_000


def test_the_page_made_again_from_the_json_is_the_same(tmp_path: Path) -> None:
    report = whole(sites=(site(0, "qkv", weight_error=math.nan), site(1, "qkv")))
    report.write(tmp_path)
    again = QuantizeReport.read(tmp_path)
    assert render(again) == render(report)
    assert write_html(again, tmp_path).read_text(encoding="utf-8") == render(report)
    assert sorted(path.name for path in tmp_path.iterdir()) == [HTML_NAME, "quantize_report.json"]


def test_the_end_to_end_phase_is_on_the_page(tmp_path: Path) -> None:
    points = [
        {"step": step, "loss": loss, "kl": loss, "nll": 3.5, "agreement": None}
        for step, loss in ((0, 0.5), (4, 0.25), (8, 0.3))
    ]
    data = {
        "losses": [[4, 0.4], [8, None]],
        "held_out": points,
        "best_step": 4,
        "notes": [EVIL],
        "trained": 1234,
        "tokens": 77,
        "seconds": 3.0,
        "tokens_per_s": 25.0,
    }
    path = tmp_path / "finetune_report.json"
    path.write_text(json.dumps(data))
    text = write_html(whole(notes=(f"second {EVIL}",)), tmp_path).read_text(encoding="utf-8")
    page = Page(text)
    for words in ("1234 numbers trained on 77 tokens", "KL from the float model", "0.25", "second"):
        assert words in page.text
    assert page.text.count("alert(1)") == 2
    assert "script" not in page.tags
    assert "same first choice" not in text
    for broken in ("{}", "[", json.dumps({**data, "best_step": 5}), json.dumps({**data, "held_out": []})):
        path.write_text(broken)
        with pytest.raises(CheckpointError, match="not a report of this version"):
            write_html(whole(), tmp_path)


def test_reports_of_other_versions_and_broken_ones(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="cannot read"):
        QuantizeReport.read(tmp_path)
    path = tmp_path / "quantize_report.json"
    data = json.loads(json.dumps(dataclasses.asdict(whole())))
    for name in ("training", "stages", "block_rss_bytes", "allocation"):
        del data[name]
    for one in data["sites"]:
        del one["parts"], one["input"]
    path.write_text(json.dumps(data))
    older = QuantizeReport.read(tmp_path)
    assert older.training == ()
    assert "layers.0.qkv: int4-g64" in checked(older).text
    for broken in ("{", "[]", "{}", json.dumps({**data, "colour": "red"})):
        path.write_text(broken)
        with pytest.raises(CheckpointError, match="not a quantization report"):
            QuantizeReport.read(tmp_path)


def test_channel_ranges_are_those_of_all_rows() -> None:
    torch.manual_seed(0)
    x = torch.randn(3, 7, 5) * torch.tensor([1.0, 1, 1, 30, 1])
    heard = ChannelRange(5)
    for piece in x:
        heard.add(piece[None])
    found = heard.report()
    channels = x.reshape(-1, 5).abs().amax(dim=0)
    assert found.tokens == 21
    assert found.rms == pytest.approx(float(x.square().mean().sqrt()), rel=1e-5)
    assert found.quantiles[-1] == pytest.approx(float(channels.max()))
    assert found.quantiles[1] == pytest.approx(float(channels.median()))
    assert found.largest[0] == (3, pytest.approx(float(channels[3])))


@pytest.mark.parametrize("method", ["rtn", "gptq", "block-ap"])
def test_a_run_writes_the_page(tiny: Path, text: Path, tmp_path: Path, method: str) -> None:
    learns: dict[str, Any] = {} if method == "rtn" else {"calibration": text, "samples": 4, "sequence_length": 32}
    chosen: Any = method
    if method == "block-ap":
        from dibit.quantize.methods.block_ap import BlockAP

        chosen = BlockAP(steps=4, batch=2, held_out=0.25)
    report = quantize_checkpoint(str(tiny), tmp_path / "out", method=chosen, group_size=16, **learns)
    assert (tmp_path / "out" / HTML_NAME).read_text(encoding="utf-8") == render(report)
    checked(report)
    assert len(report.block_rss_bytes) == 3
    assert min(report.block_rss_bytes) > 0
    assert [stage.name for stage in report.stages] == ["input", "embedding, norms and head", "blocks"]
    assert math.fsum(stage.seconds for stage in report.stages) <= report.seconds
    assert [part.module for part in report.sites[0].parts] == [
        f"model.layers.0.self_attn.{key}_proj" for key in ("q", "k", "v")
    ]
    for one in report.sites:
        weights = [part.weight_error for part in one.parts]
        assert min(weights) <= one.weight_error <= max(weights)
        if method == "rtn":
            assert one.input is None
        else:
            assert one.input is not None
            assert one.input.tokens == 4 * 32
            assert one.input.quantiles[0] <= one.input.quantiles[2] <= one.input.quantiles[-1]


def test_charts_without_anything_to_draw() -> None:
    assert line_chart([Series("a", (), "s0")], x_label="x", y_label="y") == ""
    assert line_chart([Series("a", ((0, -1.0),), "s0")], x_label="x", y_label="y", log=True) == ""
    assert stacked_bars([("a", "f0", ())], x_label="x", y_label="y") == ""
    assert value_map([], 3, lambda row, column: None, label="nothing") == ""


@pytest.mark.parametrize("log", [True, False])
@pytest.mark.parametrize("values", [(3.1, 3.2), (0.62, 1.29), (1e-9, 1e9), (5.0, 5.0), (0.0, 0.0), (-2.0, 7.0)])
def test_axes_have_ticks_inside_the_picture(values: tuple[float, float], log: bool) -> None:  # noqa: FBT001
    chart = line_chart([Series("a", tuple(enumerate(values)), "s0")], x_label="x", y_label="y", log=log)
    if log and max(values) <= 0:
        assert chart == ""
        return
    picture = ElementTree.fromstring(chart)
    texts = [element for element in picture.iter("text") if element.get("class") == "right"]
    assert len(texts) >= 2
    assert all(0 <= float(element.get("y", "-1")) <= 220 for element in texts)
