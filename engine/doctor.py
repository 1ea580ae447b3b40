"""What this machine runs: cores, memory, the kernels chosen for each op and why, the formats it can load."""

from __future__ import annotations

import platform
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import psutil
import torch

from dibit.kernels import dispatch, native
from dibit.kernels.formats import BITS, FRACTIONAL_BITS, GROUP_SIZES, Format
from dibit.kernels.qlinear import ACTIVATION_BITS
from dibit.kernels.triton import availability

REPORTED_PACKAGES = ("dibit", "torch", "transformers", "safetensors", "gguf", "fastapi", "uvicorn")


@dataclass(frozen=True)
class OpChoice:
    """The body chosen for an op; `refused` holds "backend: reason" of those passed over."""

    op: str
    backend: str
    refused: tuple[str, ...]


@dataclass(frozen=True)
class WidthChoice:
    """The backend of the quantized linear at one width of weights or activations."""

    bits: int
    backend: str


@dataclass(frozen=True)
class Examination:
    python: str
    packages: dict[str, str]
    cpu: str
    cores: int
    isa: str
    memory_bytes: int
    free_bytes: int
    gpus: tuple[str, ...]
    gpu_kernels: str
    ops: tuple[OpChoice, ...]
    widths: tuple[WidthChoice, ...]
    fractional: tuple[WidthChoice, ...]
    activations: tuple[WidthChoice, ...]
    loads: tuple[str, ...]
    advice: tuple[str, ...]

    def text(self) -> str:
        lines = [
            f"python    {self.python}",
            "packages  " + ", ".join(f"{name} {found}" for name, found in self.packages.items()),
            f"cpu       {self.cpu}, {self.cores} usable cores, kernels: {self.isa}",
            f"memory    {self.free_bytes / 2**30:.1f} GiB free of {self.memory_bytes / 2**30:.1f} GiB",
            f"gpu       {', '.join(self.gpus) or 'none'}; kernels (triton): {self.gpu_kernels}",
            "",
            "op               backend    passed over",
            *(f"{op.op:<16} {op.backend:<10} {'; '.join(op.refused) or '-'}" for op in self.ops),
            "",
            "low-bit linear   " + ", ".join(f"{w.bits} bits: {w.backend}" for w in self.widths),
            "fractional zeros " + ", ".join(f"{w.bits} bits: {w.backend}" for w in self.fractional),
            "low activations  " + ", ".join(f"{w.bits} bits: {w.backend}" for w in self.activations),
            "group sizes      " + ", ".join("per channel" if g == -1 else str(g) for g in GROUP_SIZES),
            "loads            " + "; ".join(self.loads),
        ]
        return "\n".join(lines + [f"\nnote: {note}" for note in self.advice])


LOADS = (
    "safetensors in fp32, fp16, bf16",
    "GPTQ v1 and v2, 2/3/4/8 bits, symmetric and asymmetric, no act-order",
    "AWQ (gemm, 4 bits)",
    "compressed-tensors pack-quantized, 2/3/4/8 bits",
    "EfficientQAT's own files, 2/3/4 bits",
    "BitBLAS, 2/4/8 bits",
    "fractional zero points, 2/3 bits",
    ".gguf of Llama architecture (dequantized)",
)


def examine() -> Examination:
    """Look at this machine. Never raises for what it finds missing: it says so."""
    reason = native.unavailable()
    advice = []
    if reason is not None:
        advice.append(f"the slow reference path serves: {reason}")
    gpus = tuple(torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count()))
    if gpus:
        advice.append("the GPU kernels have been proven in an interpreter only; `make gpu` tries and times them here")
    memory = psutil.virtual_memory()
    return Examination(
        python=platform.python_version(),
        packages={name: _version(name) for name in REPORTED_PACKAGES},
        cpu=cpu_name(),
        cores=native.usable_cores(),
        isa="none (reference ops in torch)" if reason else native.isa(),
        memory_bytes=memory.total,
        free_bytes=memory.available,
        gpus=gpus,
        gpu_kernels=availability.unavailable() or "ready",
        ops=tuple(
            OpChoice(r.op, r.backend, tuple(f"{name}: {why}" for name, why in r.refusals))
            for r in dispatch.report("cpu")
        ),
        widths=tuple(WidthChoice(bits, _backend(Format(bits, 64))) for bits in BITS),
        fractional=tuple(WidthChoice(bits, _backend(Format(bits, 64, "fractional"))) for bits in FRACTIONAL_BITS),
        activations=tuple(WidthChoice(bits, _backend(Format(4, 64), activation_bits=bits)) for bits in ACTIVATION_BITS),
        loads=LOADS,
        advice=tuple(advice),
    )


def cpu_name() -> str:
    """The processor's name as the system gives it."""
    info = Path("/proc/cpuinfo")
    if info.exists():
        for line in info.read_text(errors="replace").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "not installed"


def _backend(format: Format, *, activation_bits: int | None = None) -> str:
    return dispatch.resolve("qlinear", device="cpu", format=format, activation_bits=activation_bits).backend
