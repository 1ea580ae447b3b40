"""What the Triton backend runs on: an NVIDIA GPU, or Triton's interpreter on the CPU (slow; for tests).

The interpreter is chosen by TRITON_INTERPRET=1 in the environment, which Triton reads as the kernels are imported.
"""

from __future__ import annotations

import functools
import importlib.util
import os

import torch

from dibit.kernels.triton.plan import Gpu

MIN_CAPABILITY = (8, 0)
INTERPRETER = Gpu(processors=2, arch=80)
"""What the interpreter pretends to be."""


def unavailable() -> str | None:
    """Why the kernels cannot run on a GPU here, or None."""
    if importlib.util.find_spec("triton") is None:
        return "needs the triton package (pip install 'dibit[gpu]')"
    if not torch.cuda.is_available():
        return "needs an NVIDIA GPU and a CUDA build of torch; torch finds none"
    capability = torch.cuda.get_device_capability()
    if capability < MIN_CAPABILITY:
        found = ".".join(map(str, capability))
        return f"needs compute capability 8.0 (Ampere) or newer; this GPU has {found}"
    return None


def compiler_unavailable() -> str | None:
    """Why the kernels cannot be compiled ahead of time, or None. Neither a GPU nor a driver is needed."""
    if importlib.util.find_spec("triton") is None:
        return "needs the triton package (pip install 'dibit[gpu]')"
    if os.environ.get("TRITON_INTERPRET") == "1":
        return "TRITON_INTERPRET=1 asks for the interpreter; unset it"
    return None


def interpreter_unavailable() -> str | None:
    """Why the kernels cannot run on the CPU, or None."""
    if importlib.util.find_spec("triton") is None:
        return "needs the triton package (pip install 'dibit[gpu]')"
    if os.environ.get("TRITON_INTERPRET") != "1":
        return "runs on cuda, not on cpu (TRITON_INTERPRET=1 tries it in Triton's interpreter, very slowly)"
    return None


@functools.cache
def gpu_of(device: torch.device) -> Gpu:
    """What plans are made for: the GPU that `device` names, or on the CPU the interpreter's."""
    if device.type != "cuda":
        return INTERPRETER
    properties = torch.cuda.get_device_properties(device)
    return Gpu(processors=int(properties.multi_processor_count), arch=10 * properties.major + properties.minor)
