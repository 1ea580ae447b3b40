"""What `make gpu` finds. A section writes a line for every row as it goes, so that a crash leaves what there was; the
run of all sections is one JSON file.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path


@dataclass(frozen=True)
class Check:
    """`passed`, and by what figure: an error as a share of what is allowed, or what went wrong."""

    name: str
    passed: bool
    detail: str

    def __str__(self) -> str:
        return f"{'ok  ' if self.passed else 'FAIL'}  {self.name}: {self.detail}"


@dataclass(frozen=True)
class Bandwidth:
    """What a long copy in the GPU's memory reaches, 1e9 bytes read or written a second."""

    gb_s: float

    def __str__(self) -> str:
        return f"copying: {self.gb_s:.0f} GB/s"


@dataclass(frozen=True)
class Timing:
    """One product [n, k] of `m` tokens: median microseconds of a call.

    predicted_us  by the model of report_model.py, for GPUs it has figures of
    weight_bytes  packed, with scales and zero points
    """

    model: str
    n: int
    k: int
    m: int
    bits: int
    group_size: int
    us: float
    predicted_us: float | None
    weight_bytes: int

    def __str__(self) -> str:
        predicted = "" if self.predicted_us is None else f", predicted {self.predicted_us:.1f}"
        speed = self.weight_bytes / self.us / 1e3
        return f"{_product(self)}, {self.bits} bits: {self.us:.1f} us{predicted}, {speed:.0f} GB/s"


@dataclass(frozen=True)
class PeerTiming:
    """The same product by another's kernel. `bits` is 16 where it multiplies floats."""

    peer: str
    model: str
    n: int
    k: int
    m: int
    bits: int
    us: float

    def __str__(self) -> str:
        return f"{_product(self)}, {self.bits} bits, {self.peer}: {self.us:.1f} us"


@dataclass(frozen=True)
class Decoding:
    """Tokens per second of a model, all sequences together, sampling and text included."""

    model: str
    batch: int
    tokens: int
    tok_s: float

    def __str__(self) -> str:
        return f"{self.model}, {self.batch} sequences: {self.tok_s:.1f} tokens/s"


@dataclass(frozen=True)
class Note:
    """What a section left out, and why."""

    section: str
    text: str

    def __str__(self) -> str:
        return f"{self.section}: {self.text}"


Row = Check | Bandwidth | Timing | PeerTiming | Decoding | Note
_KINDS = {kind.__name__: kind for kind in (Check, Bandwidth, Timing, PeerTiming, Decoding, Note)}


@dataclass(frozen=True)
class GpuRun:
    """All that one run found on one GPU."""

    gpu: str
    capability: str
    torch: str
    triton: str
    checks: list[Check] = field(default_factory=list)
    bandwidth: list[Bandwidth] = field(default_factory=list)
    timings: list[Timing] = field(default_factory=list)
    peers: list[PeerTiming] = field(default_factory=list)
    decoding: list[Decoding] = field(default_factory=list)
    notes: list[Note] = field(default_factory=list)

    def add(self, rows: Iterable[Row]) -> None:
        for row in rows:
            if isinstance(row, Check):
                self.checks.append(row)
            elif isinstance(row, Bandwidth):
                self.bandwidth.append(row)
            elif isinstance(row, Timing):
                self.timings.append(row)
            elif isinstance(row, PeerTiming):
                self.peers.append(row)
            elif isinstance(row, Decoding):
                self.decoding.append(row)
            else:
                self.notes.append(row)


def append(path: Path, row: Row) -> None:
    with path.open("a", encoding="utf-8") as file:
        file.write(json.dumps({"row": type(row).__name__} | asdict(row)) + "\n")


def read(path: Path) -> Iterator[Row]:
    """Whole lines alone: the last one may be what a section was killed at."""
    if not path.exists():
        return
    for text in path.read_text(encoding="utf-8").split("\n")[:-1]:
        fields = json.loads(text)
        yield _KINDS[fields.pop("row")](**fields)


def _product(row: Timing | PeerTiming) -> str:
    return f"{row.model:<12} [{row.n:>5}, {row.k:>5}] M {row.m:<3}"
