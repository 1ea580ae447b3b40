"""The sections of `make gpu`: cut off in time, peers left out with a reason; with a stopwatch that is made up."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence

import pytest
import torch
from torch import Tensor

from dibit.bench import gpu, gpu_sections
from dibit.bench.gpu_peers import Linear, Peer, torch_linear
from dibit.bench.gpu_records import Bandwidth, Note, PeerTiming, Row, Timing
from dibit.bench.gpu_sections import SECTIONS, peer_products, products, until
from dibit.kernels.formats import Format, QTensor

CPU = torch.device("cpu")


def test_a_section_ends_when_its_time_is_up_or_with_its_error() -> None:
    def rows(*, broken: bool) -> Iterator[Row]:
        yield Bandwidth(1.0)
        if broken:
            raise RuntimeError("an illegal memory access was encountered")
        yield Bandwidth(2.0)

    late = list(until(time.monotonic() - 1, "products", rows(broken=False)))
    assert late == [Bandwidth(1.0), Note("products", "time was up after 1 rows")]
    broken = list(until(time.monotonic() + 60, "products", rows(broken=True)))
    assert broken == [Bandwidth(1.0), Note("products", "RuntimeError: an illegal memory access was encountered")]
    assert list(until(time.monotonic() + 60, "products", rows(broken=False))) == [Bandwidth(1.0), Bandwidth(2.0)]


def measure(calls: Sequence[Callable[[], object]]) -> float:
    calls[0]()
    return 5.0


def timed_by(build: Callable[[QTensor], Linear], *, package: str = "torch") -> list[Row]:
    peer = Peer(package, (Format(4, 128),), build, zero=8)
    shapes = {"tiny": ((64, 256), (128, 128))}

    return list(peer_products("other", peer, CPU, None, shapes=shapes, measure=measure))


def test_peers_are_timed_and_left_out_with_the_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("dibit.bench.gpu_sections.cold_copies", lambda nbytes: 2)
    rows = timed_by(torch_linear)
    assert rows[0] == PeerTiming("other", "tiny", 64, 256, 1, 4, 5.0)
    assert len(rows) == 6
    assert timed_by(torch_linear, package="no_such_package") == [Note("other", "no_such_package is not installed")]

    def broken(w: QTensor) -> Linear:
        raise ImportError("undefined symbol: cudaGraphs")

    wanted = "tiny [64, 256] int4-g128: ImportError: undefined symbol: cudaGraphs"
    assert timed_by(broken)[0] == Note("other", wanted)

    def wrong(w: QTensor) -> Linear:
        def run(x: Tensor) -> Tensor:
            return torch_linear(w)(x) * 2

        return run

    found = timed_by(wrong)
    assert len(found) == 2
    assert all(isinstance(row, Note) and "WrongProduct: its result is off by 1 of" in row.text for row in found)


def test_sections_are_those_that_are_started() -> None:
    assert list(SECTIONS) == list(gpu.SHARES_S)


def test_products_are_timed_and_a_failing_one_is_noted(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpu_sections, "COPIED_BYTES", 4000)
    monkeypatch.setattr(gpu_sections, "cold_copies", lambda nbytes: 2)
    monkeypatch.setattr(gpu_sections, "TOKENS", (1, 3))
    monkeypatch.setattr(gpu_sections, "FORMATS", (Format(4, 128), Format(3, 128)))
    sound = gpu_sections.pack

    def pack(w: QTensor) -> object:
        if w.format.bits == 3:
            raise RuntimeError("out of memory")
        return sound(w)

    monkeypatch.setattr(gpu_sections, "pack", pack)
    shapes = {"tiny": ((64, 128),)}
    rows = list(products(CPU, None, shapes=shapes, measure=measure, gpu_name=lambda: "NVIDIA T4000"))
    nbytes = 64 * 128 // 2 + 64 * 3
    assert rows[0] == Bandwidth(2 * 4000 / 5.0 / 1e3)
    assert isinstance(rows[1], Note)
    assert "no figures of NVIDIA T4000" in rows[1].text
    assert rows[2:4] == [Timing("tiny", 64, 128, m, 4, 128, 5.0, None, nbytes) for m in (1, 3)]
    assert rows[4:] == [Note("products", "tiny [64, 128] int3-g128: RuntimeError: out of memory")]
