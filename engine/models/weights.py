"""Reading a model's tensors one at a time, each against the shape that its spec demands.

`Weights` is all that the models need of a checkpoint, whatever file it lies in. Nothing here keeps a tensor alive:
the caller copies or packs what it is given and lets it go, which is what bounds the memory of a load.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any, Protocol

import torch
from torch import Tensor

from dibit.engine.errors import CheckpointError
from dibit.engine.models.spec import Arch, LinearSite, Part, Sizes, float_shapes
from dibit.kernels.formats import Format, QTensor, dequantize

PACKED_SUFFIXES = (
    *("qweight", "qzeros", "zeros", "scales", "g_idx"),
    *("weight_packed", "weight_zero_point", "weight_scale", "weight_shape", "weight_g_idx"),
)


class TensorHeader(Protocol):
    @property
    def shape(self) -> tuple[int, ...]: ...
    @property
    def dtype(self) -> torch.dtype: ...
    @property
    def nbytes(self) -> int: ...


class Weights(Protocol):
    """A checkpoint as the models see it. `linear` and `linear_format` go by module path, the rest by tensor name."""

    @property
    def config(self) -> Mapping[str, Any]: ...
    def has(self, name: str) -> bool: ...
    def names(self) -> Iterable[str]: ...
    def info(self, name: str) -> TensorHeader: ...
    def tensor(self, name: str) -> Tensor: ...
    def linear(self, module: str) -> Tensor | QTensor: ...
    def linear_format(self, module: str) -> Format | None: ...


def check_names(weights: Weights, arch: Arch, sizes: Sizes) -> None:
    """Compare the checkpoint's list of tensors with the model's. Reads headers (and biases that should not be there).

    Raises CheckpointError naming the tensors that are missing, have another shape, or belong to no part of the model.
    """
    shapes = float_shapes(arch, sizes)
    missing = [name for name in shapes if not _present(weights, name)]
    if missing:
        raise CheckpointError(
            f"the checkpoint lacks {_listed(missing)} of the {len(shapes)} tensors that its config.json asks for; "
            "supported: complete checkpoints. Download it again, or correct config.json"
        )
    for name, shape in shapes.items():
        if weights.has(name) and tuple(weights.info(name).shape) != shape:
            raise wrong_shape(name, tuple(weights.info(name).shape), shape)
    extra = [name for name in weights.names() if name not in shapes and not _harmless(weights, name, shapes)]
    if sizes.tied_head:
        # Some writers store the tied head a second time.
        extra = [name for name in extra if not _repeats_embedding(weights, name, arch, sizes)]
    if extra:
        raise CheckpointError(
            f"the checkpoint holds {_listed(extra)}, which a {arch.name} model with this config.json does not have; "
            "running without would compute another model. Correct config.json, or choose another checkpoint"
        )


def read_tensor(weights: Weights, name: str, shape: tuple[int, ...], dtype: torch.dtype = torch.float32) -> Tensor:
    """The named tensor as `dtype`. Raises CheckpointError when it is missing or of another shape."""
    if not weights.has(name):
        raise CheckpointError(
            f"{name} is missing; expected shape {list(shape)}. Download the checkpoint again, or correct config.json"
        )
    found = weights.tensor(name)
    if tuple(found.shape) != shape:
        raise wrong_shape(name, tuple(found.shape), shape)
    return found.to(dtype)


def read_linear(weights: Weights, part: Part, k: int) -> Tensor | QTensor:
    """Weight [part.n, k] of a linear: float in its stored type, or quantized. Raises CheckpointError."""
    if not _present(weights, f"{part.module}.weight"):
        raise CheckpointError(f"{part.module}.weight is missing; expected shape {[part.n, k]}")
    found = weights.linear(part.module)
    if tuple(found.shape) != (part.n, k):
        raise wrong_shape(f"{part.module}.weight", tuple(found.shape), (part.n, k))
    return found


def read_float_site(weights: Weights, site: LinearSite, dtype: torch.dtype = torch.float32) -> Tensor:
    """The fused weight [site.n, site.k] as floats, filled part by part."""
    fused = torch.empty(site.n, site.k, dtype=dtype)
    start = 0
    for part in site.parts:
        found = read_linear(weights, part, site.k)
        fused[start : start + part.n] = dequantize(found) if isinstance(found, QTensor) else found
        start += part.n
    return fused


def read_bias(weights: Weights, site: LinearSite, dtype: torch.dtype = torch.float32) -> Tensor | None:
    """The fused bias [site.n], or None for a site without."""
    if not site.bias:
        return None
    return torch.cat([read_tensor(weights, f"{part.module}.bias", (part.n,), dtype) for part in site.parts])


def wrong_shape(name: str, found: tuple[int, ...], expected: tuple[int, ...]) -> CheckpointError:
    return CheckpointError(
        f"{name} has shape {list(found)}; config.json asks for {list(expected)}. One of the two is wrong: "
        "download the checkpoint again, or correct config.json"
    )


def _present(weights: Weights, name: str) -> bool:
    if weights.has(name):
        return True
    module, _, last = name.rpartition(".")
    return last == "weight" and weights.linear_format(module) is not None


def _harmless(weights: Weights, name: str, shapes: Mapping[str, tuple[int, ...]]) -> bool:
    module, _, last = name.rpartition(".")
    if last == "inv_freq":
        return True
    if f"{module}.weight" not in shapes:
        return False
    if last in PACKED_SUFFIXES:
        return weights.linear_format(module) is not None
    # Packers of the GPTQ line write a bias of zeros where the model has none.
    return last == "bias" and not bool(weights.tensor(name).any())


def _repeats_embedding(weights: Weights, name: str, arch: Arch, sizes: Sizes) -> bool:
    if name != f"{arch.head}.weight" or tuple(weights.info(name).shape) != (sizes.vocab, sizes.hidden):
        return False
    return torch.equal(weights.tensor(name), weights.tensor(f"{arch.embedding}.weight"))


def _listed(names: list[str], shown: int = 4) -> str:
    more = f" and {len(names) - shown} more" if len(names) > shown else ""
    return ", ".join(names[:shown]) + more
