"""What a quantization run did: settings, errors of every site, time and memory. Stored beside the checkpoint.

`quantize_report.json` holds all of it and is what programs read; `quantize_report.html` is the same for a person, made
from the JSON alone (report_html.py).
"""

from __future__ import annotations

import dataclasses
import json
import math
import resource
import sys
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dibit.engine.errors import CheckpointError

REPORT_NAME = "quantize_report.json"
FINETUNE_REPORT_NAME = "finetune_report.json"
# Shares of the channels at which InputRange gives their largest magnitudes.
CHANNEL_QUANTILES = (0.0, 0.5, 0.9, 0.99, 1.0)


@dataclass(frozen=True)
class PartReport:
    """One linear of a site: `module` is its name in the checkpoint, its weight is [rows, columns], weight_error its
    squared error over its squared norm."""

    module: str
    format: str
    rows: int
    columns: int
    weight_error: float


@dataclass(frozen=True)
class InputRange:
    """What goes into a site of the quantized model on the calibration text.

    tokens     rows that were seen
    rms        root mean square of all elements
    quantiles  of the largest magnitude of each channel, at CHANNEL_QUANTILES
    largest    channels with the largest magnitudes: (channel, magnitude)
    """

    tokens: int
    rms: float
    quantiles: tuple[float, ...]
    largest: tuple[tuple[int, float], ...]

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> InputRange:
        largest = tuple((int(channel), _number(value)) for channel, value in data["largest"])
        return cls(data["tokens"], _number(data["rms"]), tuple(map(_number, data["quantiles"])), largest)


@dataclass(frozen=True)
class SiteReport:
    """One site.

    site          its name, e.g. "layers.3.qkv"
    format        e.g. "int4-g64"
    method        what chose its integers: the run's method, or what took its place where that failed
    fallback      why it failed, else None
    weight_mse    mean squared error of the weight
    weight_error  squared error of the weight over its squared norm
    output_error  squared error of the output over its squared norm, on the calibration text; None without one
    seconds       time it took, statistics included
    parts         its linears, in order
    input         what goes into it; None without a calibration text
    """

    site: str
    format: str
    method: str
    fallback: str | None
    weight_mse: float
    weight_error: float
    output_error: float | None
    seconds: float
    parts: tuple[PartReport, ...] = ()
    input: InputRange | None = None

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> SiteReport:
        """Inverse of dataclasses.asdict, also after JSON."""
        parts = (
            PartReport(**{**part, "weight_error": _number(part["weight_error"])}) for part in data.get("parts", ())
        )
        found = data.get("input")
        converted = {
            "weight_mse": _number(data["weight_mse"]),
            "weight_error": _number(data["weight_error"]),
            "parts": tuple(parts),
            "input": None if found is None else InputRange.from_dict(found),
        }
        return cls(**{**data, **converted})


@dataclass(frozen=True)
class TrainingReport:
    """How the training of a block went. Losses are mean squared errors of the block's output.

    steps       that were made, those skipped included
    losses      of the training batches: (step, mean since the entry before)
    validation  on the held-out text: (step, loss), from step 0 on
    best_step   whose state was kept
    baseline    loss on the held-out text of the block rounded to nearest
    skipped     steps whose loss or gradient was not finite
    restarts    times the training began anew at half the rates
    notes       what else happened
    seconds     time it took
    tokens_per_s  tokens trained on per second, evaluations left out
    matmul_share  of the machine's float32 products per second, what the products of the training come to
    """

    steps: int
    losses: tuple[tuple[int, float], ...]
    validation: tuple[tuple[int, float], ...]
    best_step: int
    baseline: float
    skipped: int
    restarts: int
    notes: tuple[str, ...]
    seconds: float
    tokens_per_s: float
    matmul_share: float = 0.0

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> TrainingReport:
        """Inverse of dataclasses.asdict, also after JSON."""
        curves = {key: tuple((step, _number(loss)) for step, loss in data[key]) for key in ("losses", "validation")}
        return cls(**{**data, **curves, "baseline": _number(data["baseline"]), "notes": tuple(data["notes"])})


@dataclass(frozen=True)
class StageReport:
    """A stage of the run, its time, and the largest resident memory of the process so far at its end."""

    name: str
    seconds: float
    peak_rss_bytes: int


class StageClock:
    """Takes the times of a run's stages, one after the other."""

    def __init__(self) -> None:
        self._begun = self._last = time.monotonic()
        self.stages: tuple[StageReport, ...] = ()

    @property
    def seconds(self) -> float:
        """Since the beginning."""
        return time.monotonic() - self._begun

    def end(self, name: str) -> None:
        """What was done since the last stage ended is the stage `name`."""
        now = time.monotonic()
        self.stages += (StageReport(name, now - self._last, peak_rss_bytes()),)
        self._last = now


def peak_rss_bytes() -> int:
    """Largest resident memory that this process ever had."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


@dataclass(frozen=True)
class QuantizeReport:
    """A finished run.

    model, source      as named by the caller, and the file or directory it stands for
    out                the checkpoint that was written
    method, options    the method and its fields
    plan               default format and overrides
    allocation         what a budget came to: scores of the blocks, their order, bits of each; None without a budget
    bits_per_weight    of the quantized weights, scales and zero points included
    calibration        text (file, sha256, tokens), samples, sequence_length; None for a method without
    seed               of the calibration draw and of the method
    threads            compute threads: another number may change the last bits of a calibrated result
    sites              every site in order
    training           of every block, for a method that trains; else empty
    resumed_blocks     blocks taken over from an interrupted run
    seconds, block_seconds  of this run, and of each block that it computed
    peak_rss_bytes     peak resident memory of the process
    versions           of dibit, torch and Python
    stages             of this run, in order
    block_rss_bytes    resident memory at the end of each block of block_seconds
    notes              what else came of it, a line each
    activation_bits    to which the served model rounds the inputs of its linears; None: not at all
    """

    model: str
    source: str
    out: str
    method: str
    options: Mapping[str, Any]
    plan: Mapping[str, Any]
    allocation: Mapping[str, Any] | None
    bits_per_weight: float
    calibration: Mapping[str, Any] | None
    seed: int
    threads: int
    sites: tuple[SiteReport, ...]
    training: tuple[TrainingReport | None, ...]
    resumed_blocks: int
    seconds: float
    block_seconds: tuple[float, ...]
    peak_rss_bytes: int
    versions: Mapping[str, str]
    stages: tuple[StageReport, ...] = ()
    block_rss_bytes: tuple[int, ...] = ()
    notes: tuple[str, ...] = ()
    activation_bits: int | None = None

    @classmethod
    def read(cls, directory: Path) -> QuantizeReport:
        """The report of the checkpoint in `directory`. Raises CheckpointError."""
        path = directory / REPORT_NAME
        try:
            return cls.from_dict(json.loads(path.read_text(encoding="utf-8")))
        except OSError as error:
            raise CheckpointError(
                f"cannot read {path}: {error.strerror}; give the directory of a checkpoint that `dibit quantize` wrote"
            ) from error
        except (ValueError, TypeError, KeyError, AttributeError) as error:
            raise CheckpointError(
                f"{path} is not a quantization report of this version ({type(error).__name__}: {error}); "
                "quantize again to have one"
            ) from error

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> QuantizeReport:
        """Inverse of dataclasses.asdict, also after JSON, where a number that is not finite has become null."""
        training = (None if block is None else TrainingReport.from_dict(block) for block in data.get("training", ()))
        converted = {
            "sites": tuple(SiteReport.from_dict(site) for site in data["sites"]),
            "training": tuple(training),
            "stages": tuple(StageReport(**stage) for stage in data.get("stages", ())),
            "block_seconds": tuple(data["block_seconds"]),
            "block_rss_bytes": tuple(data.get("block_rss_bytes", ())),
            "notes": tuple(data.get("notes", ())),
        }
        return cls(**{"allocation": None, **data, **converted})

    @property
    def fallbacks(self) -> tuple[SiteReport, ...]:
        return tuple(site for site in self.sites if site.fallback is not None)

    def summary(self) -> str:
        """A few lines for a terminal."""
        worst = max(self.sites, key=lambda site: site.weight_error)
        lines = [
            f"{self.out}: {self.method}, {self.bits_per_weight:.2f} bits per quantized weight, "
            f"{self.seconds:.0f} s, peak memory {self.peak_rss_bytes / 2**30:.2f} GiB",
            f"relative weight error: mean {_mean([s.weight_error for s in self.sites]):.2e}, "
            f"worst {worst.weight_error:.2e} ({worst.site})",
        ]
        if self.allocation is not None:
            bits = [int(own) for own in self.allocation["bits"]]
            counts = ", ".join(f"{bits.count(own)} of {own} bits" for own in sorted(set(bits)))
            what = "linears" if self.allocation["budget"].get("per_site") else "blocks"
            lines.append(f"{what}: {counts}; {self.allocation['mean_bits']:.3f} bits of code on average")
        outputs = [s.output_error for s in self.sites if s.output_error is not None]
        if outputs:
            lines.append(f"relative output error on the calibration text: mean {_mean(outputs):.2e}")
        trained = [block for block in self.training if block is not None]
        if trained:
            ratios = [min(loss for _, loss in b.validation) / b.baseline for b in trained if b.baseline]
            lines.append(f"held-out block error over that of rounding to nearest: mean {_mean(ratios):.3f}")
        if self.resumed_blocks:
            lines.append(f"{self.resumed_blocks} blocks were taken over from an interrupted run")
        if self.fallbacks:
            named = ", ".join(site.site for site in self.fallbacks[:4])
            ways = {"rtn": "rounded to nearest"}
            how = " or ".join(dict.fromkeys(ways.get(s.method, f"quantized by {s.method}") for s in self.fallbacks))
            lines.append(f"{len(self.fallbacks)} sites were {how} instead ({named}): see {REPORT_NAME}")
        return "\n".join([*lines, *self.notes])

    def write(self, directory: Path) -> None:
        text = json.dumps(_finite(dataclasses.asdict(self)), indent=2, ensure_ascii=False)
        (directory / REPORT_NAME).write_text(text + "\n", encoding="utf-8")


def _number(value: float | None) -> float:
    """Inverse of what `_finite` does to a number."""
    return math.nan if value is None else value


def _finite(value: Any) -> Any:
    """NaN and infinity are not JSON: null."""
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(item) for item in value]
    return value


def _mean(values: list[float]) -> float:
    finite = [value for value in values if math.isfinite(value)]
    return math.fsum(finite) / len(finite) if finite else math.nan


def duration(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    if hours:
        return f"{hours} h {minutes} min"
    return f"{minutes} min" if minutes else f"{rest} s"
