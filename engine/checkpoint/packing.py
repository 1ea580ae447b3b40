"""What every packed on-disk format is: a `Packing`, which tells shapes from headers and turns tensors into a QTensor.

One file a format, each a frozen dataclass that satisfies `Packing`; those that dibit also writes satisfy `Export`.
Both ways are exact to the bit: codes, zero points and scales come back as they were. A packing keeps no state, so a
checkpoint of any size passes through it one linear at a time.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from dibit.engine.checkpoint.checkpoint import TensorInfo, ZeroConvention
from dibit.engine.checkpoint.progress import PackedModule
from dibit.engine.checkpoint.safetensors_file import FLOAT_TYPES
from dibit.engine.errors import CheckpointError
from dibit.kernels.formats import Format, FormatError, QTensor

SAMPLED_ROWS = 256


Facts = Mapping[str, str | int | float | bool | None]


class CannotHold(CheckpointError):
    """A linear that an on-disk format has no room for; another format has."""


@dataclass(frozen=True)
class Headers:
    """A packed linear before its data is read.

    parts      header of each tensor that it has, by the last word of the name ("qweight")
    declared   its format by the config; None when that declares it float
    symmetric  whether it is declared so
    source     names the checkpoint in messages
    read       data of a part, for the small ones that a shape depends on
    """

    module: str
    parts: Mapping[str, TensorInfo]
    declared: Format | None
    symmetric: bool
    source: str
    read: Callable[[str], Tensor]

    def error(self, problem: str) -> CheckpointError:
        return CheckpointError(f"{self.source}: {self.module} {problem}")

    def shapes(self) -> str:
        return ", ".join(f"{part} {list(info.shape)}" for part, info in self.parts.items())

    def require(self, *names: str) -> Format:
        """The declared format. Raises CheckpointError when the module is declared float or lacks one of `names`."""
        missing = [name for name in names if name not in self.parts]
        if missing:
            raise self.error(f"is packed but has no {', '.join(missing)}; the checkpoint is damaged")
        if self.declared is None:
            raise self.error("is packed, but the config declares it float; correct the config")
        return self.declared

    def check_type(self, name: str, types: tuple[torch.dtype, ...], rank: int) -> None:
        info = self.parts.get(name)
        if info is not None and (info.dtype not in types or len(info.shape) != rank):
            allowed = " or ".join(str(t).removeprefix("torch.") for t in types)
            raise self.error(
                f"has {name} of {info.stored} {list(info.shape)}; expected {allowed} with {rank} dimension(s)"
            )

    def check_scales(self, name: str) -> None:
        self.check_type(name, FLOAT_TYPES, 2)

    def groups(self, form: Format, k: int) -> int:
        """Groups in a row of k columns. Raises CheckpointError when they do not come out even."""
        try:
            return form.groups(k)
        except FormatError as error:
            raise self.error(
                f"is declared {form.name}, but its tensors ({self.shapes()}) do not fit: {error}"
            ) from error

    def expect(self, form: Format, shapes: Mapping[str, tuple[int, ...]]) -> None:
        """Raises CheckpointError when a tensor has another shape than the declared format needs."""
        for name, shape in shapes.items():
            if name in self.parts and tuple(self.parts[name].shape) != shape:
                raise self.error(
                    f"is declared {form.name}, for which {name} would have the shape {list(shape)}, but it has "
                    f"{self.shapes()}; correct the config, or download the checkpoint again"
                )


@dataclass(frozen=True)
class Sample:
    """Codes and zero fields as stored, from which GPTQ's zero convention is told.

    codes   uint8 [n, K], the first SAMPLED_ROWS rows of the weight
    fields  uint8 [N, K/G], all rows
    """

    codes: Tensor
    fields: Tensor
    format: Format


class Packing(Protocol):
    """One on-disk format, for reading."""

    @property
    def parts(self) -> tuple[str, ...]:
        """Last words of the names of a packed linear's tensors; the first is always there and tells it from others."""

    def shape(self, headers: Headers) -> tuple[int, int]:
        """[N, K] of a packed linear, after checking everything that headers tell. Raises CheckpointError."""

    def unpack(
        self, tensors: Mapping[str, Tensor], format: Format, *, zeros: ZeroConvention, module: str, source: str
    ) -> QTensor:
        """The linear of the given parts, whose headers have been checked. Raises CheckpointError."""

    def sample(self, tensors: Mapping[str, Tensor], format: Format) -> Sample | None:
        """What decides between GPTQ's zero conventions; None for a format that has only one."""


class Export(Packing, Protocol):
    """One on-disk format, for writing (and reading back)."""

    @property
    def zeros(self) -> ZeroConvention:
        """How it stores zero points."""

    @property
    def label(self) -> str:
        """Its name in messages."""

    @property
    def side_file(self) -> str | None:
        """A file that repeats the quantization config for older loaders."""

    def check(self, format: Format, n: int, k: int, *, module: str) -> None:
        """Raises CannotHold for a linear of this format and shape, as far as headers tell."""

    def pack(self, q: QTensor, *, module: str) -> dict[str, Tensor]:
        """Tensors of one linear by the last word of their names. Raises CannotHold."""

    def config(
        self, modules: Mapping[str, PackedModule], names: Iterable[str], *, method: str | None, facts: Facts
    ) -> dict[str, Any]:
        """The quantization_config.

        modules  every packed linear
        names    every tensor of the checkpoint; linears of layers that are not packed are declared float
        """


def finite_scales(scales: Tensor, *, module: str, source: str) -> Tensor:
    """Scales as a QTensor holds them: float16 as stored, others as float32. Raises CheckpointError."""
    if not bool(scales.isfinite().all()):
        raise CheckpointError(f"{source}: {module} has scales that are not finite; quantize the model again")
    return scales if scales.dtype == torch.float16 else scales.float()


def compact_scales(scales: Tensor) -> Tensor:
    """In float16 where that is exact, else as they are."""
    half = scales.to(torch.float16)
    return half if torch.equal(half.float(), scales.float()) else scales


def check_grid(format: Format, *, module: str, label: str) -> None:
    """Raises CannotHold for zero points that other tools would read as something else."""
    if format.zero_grid != "integer":
        raise CannotHold(
            f"{module} is {format.name}: its zero fields do not mean whole zero points, which {label} takes them for. "
            "Serve it as it is, or quantize the float model again with whole zero points"
        )


def check_codes(q: QTensor, *, module: str, label: str) -> None:
    """Raises CheckpointError for codes that do not fit their fields."""
    if int(q.codes.max()) > q.format.qmax or int(q.zeros.max()) > q.format.qmax:
        raise CheckpointError(
            f"{module} has codes or zero points above {q.format.qmax}, the largest of {q.format.bits} bits, which "
            f"{label} cannot hold; the weight is damaged, quantize the model again"
        )
