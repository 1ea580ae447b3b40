"""What the rest of dibit sees of a model on disk, whatever the files are.

A checkpoint is opened from its headers alone; tensors are read one at a time, each into memory of its own, so that
a model larger than the machine's memory can be streamed. All names are those of the Hugging Face model ("model.layers.0
.self_attn.q_proj.weight"), all configs in the form of config.json.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Literal, Protocol

import torch
from torch import Tensor

from dibit.kernels.formats import Format, QTensor, ZeroGrid

ZeroConvention = Literal["v1", "v2"]
ZeroChoice = Literal["auto", "v1", "v2"]
Method = Literal["gptq", "awq", "compressed-tensors", "efficientqat", "bitblas", "dibit"]
CheckpointFormat = Literal["gptq", "gptq_v2", "gemm", "pack-quantized", "efficientqat", "bitblas", "dibit"]


@dataclass(frozen=True)
class TensorInfo:
    """A tensor as its header describes it.

    dtype   type that `Checkpoint.tensor` returns
    nbytes  size on disk
    stored  name of the type on disk ("BF16", "Q4_1", "I32", ...)
    """

    shape: tuple[int, ...]
    dtype: torch.dtype
    nbytes: int
    stored: str

    @property
    def numel(self) -> int:
        count = 1
        for size in self.shape:
            count *= size
        return count


@dataclass(frozen=True)
class ModuleRule:
    """Modules whose path begins with a match of `pattern` have `format` (None: float).

    symmetric  None where the rule does not say: as the whole checkpoint
    """

    pattern: str
    format: Format | None
    symmetric: bool | None = None

    @cached_property
    def regex(self) -> re.Pattern[str]:
        return re.compile(self.pattern)


@dataclass(frozen=True)
class Quantization:
    """How the linears of a checkpoint are quantized, as its config declares it (or, where it has none, its shapes).

    quantizer          tool and version that wrote it, where the file says so ("gptqmodel:5.0.0")
    checkpoint_format  the label in the file; whether zero points are stored as z or z - 1 may differ from what it says
    dynamic            overrides (`dynamic` of GPTQ, groups and `ignore` of compressed-tensors, modules that AWQ left
                       alone); the first one that matches a module holds
    zero_grid          how the zero fields are read (kernels/formats.py); only dibit's own format has another than whole
    activation_bits    width to which the inputs of the quantized linears are rounded, a token at a time
                       (kernels.qlinear.quantize_activations); None: weights only
    """

    method: Method
    bits: int
    group_size: int
    symmetric: bool
    checkpoint_format: CheckpointFormat
    act_order: bool = False
    quantizer: str | None = None
    dynamic: tuple[ModuleRule, ...] = ()
    zero_grid: ZeroGrid = "integer"
    activation_bits: int | None = None

    @property
    def format(self) -> Format:
        return Format(self.bits, self.group_size, self.zero_grid)

    def format_of(self, module: str) -> Format | None:
        """Format declared for a linear module ("model.layers.3.mlp.up_proj"); None when declared float."""
        for rule in self.dynamic:
            if rule.regex.match(module):
                return rule.format
        return self.format

    def symmetric_of(self, module: str) -> bool:
        """Whether a linear module is declared symmetric."""
        for rule in self.dynamic:
            if rule.regex.match(module):
                return self.symmetric if rule.symmetric is None else rule.symmetric
        return self.symmetric


@dataclass(frozen=True)
class PackedLinear:
    """A packed linear as headers tell it.

    shape    [N, K] of the weight
    tensors  names of what it is stored in
    """

    shape: tuple[int, int]
    format: Format
    tensors: tuple[str, ...]


@dataclass(frozen=True)
class ZeroDecision:
    """How the zero fields of a checkpoint are read, and why. v1: z = field + 1; v2: z = field."""

    convention: ZeroConvention
    reason: str


class Checkpoint(Protocol):
    """A model on disk. Every method raises CheckpointError when the files are not what they should be."""

    @property
    def path(self) -> Path: ...

    @property
    def name(self) -> str:
        """A name for people: Hub id, directory or model name."""

    @property
    def config(self) -> dict[str, Any]:
        """Content of config.json (synthesised for a GGUF file)."""

    @property
    def quantization(self) -> Quantization | None: ...

    def names(self) -> Iterable[str]:
        """Every tensor name, in file order."""

    def has(self, name: str) -> bool: ...

    def info(self, name: str) -> TensorInfo: ...

    def tensor(self, name: str) -> Tensor:
        """A float tensor, in its stored type (float32 for a GGUF file), in memory of its own."""

    def export(self, name: str) -> Tensor:
        """The same tensor in the float type in which a checkpoint made from this one should store it."""

    def linear(self, module: str) -> Tensor | QTensor:
        """Weight [N, K] of a linear module: a QTensor where the module is packed, a float tensor where it is not."""

    def linear_format(self, module: str) -> Format | None:
        """Format of a linear module from headers alone; None for a float one."""

    def packed(self) -> Mapping[str, PackedLinear]:
        """Every packed linear by its module path, from headers alone."""

    def zero_decision(self) -> ZeroDecision | None:
        """How zero points are read, decided once from label and values; None where there is one way only."""

    def packed_bytes(self) -> int:
        """Bytes on disk of packed linears: codes, scales, zero points and group indices."""

    def float_bytes(self) -> int:
        """Bytes on disk of everything else."""

    def has_tokenizer(self) -> bool: ...

    def has_chat_template(self) -> bool: ...

    def write_tokenizer(self, out: Path) -> None:
        """Put the tokenizer's files, the chat template and generation_config.json into directory `out`."""

    def close(self) -> None: ...
