"""A GGUF file of Llama architecture as a checkpoint: Hugging Face names and config, tensors dequantized to float32.

GGUF keeps the rows of q and k in the order of interleaved rotary pairs (2i, 2i+1); Hugging Face pairs (i, i + D/2).
The rows are brought back on reading, so that one attention serves both.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from dibit.engine.checkpoint.checkpoint import PackedLinear, Quantization, TensorInfo, ZeroDecision
from dibit.engine.checkpoint.gguf_config import ROPE_FACTORS, hf_name, synthesise_config
from dibit.engine.checkpoint.gguf_header import GgufTensor, read_header
from dibit.engine.checkpoint.safetensors_file import read_into
from dibit.engine.errors import CheckpointError
from dibit.kernels.formats import Format, QTensor

_FLOAT = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
# Rotary tables that some old converters wrote; they are computed from the config.
_IGNORED_SUFFIX = ".attn_rot_embd.weight"


class GgufCheckpoint:
    """See checkpoint.Checkpoint. `info` gives the block type as `stored`, `tensor` is float32 whatever it is."""

    def __init__(self, path: Path) -> None:
        self.path = path
        header = read_header(path)
        self.fields = header.fields
        self._refuse_split()
        self._tensors = self._rename(header.tensors)
        self._fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        try:
            self.config: dict[str, Any] = synthesise_config(
                header.fields, self._tensors, rope_factors=lambda: self._read(ROPE_FACTORS), source=str(path)
            )
            self._refuse_undequantizable()
        except BaseException:
            self.close()
            raise
        self._tensors.pop(ROPE_FACTORS, None)
        self._rotary = {
            "self_attn.q_proj": self.config["num_attention_heads"],
            "self_attn.k_proj": self.config["num_key_value_heads"],
        }

    @property
    def name(self) -> str:
        # general.name is often an internal title; the file's name is what people know the model by.
        return self.path.stem

    @property
    def quantization(self) -> Quantization | None:
        return None

    def names(self) -> Iterable[str]:
        return list(self._tensors)

    def has(self, name: str) -> bool:
        return name in self._tensors

    def info(self, name: str) -> TensorInfo:
        tensor = self._get(name)
        return TensorInfo(tensor.shape, torch.float32, tensor.nbytes, tensor.type_name)

    def tensor(self, name: str) -> Tensor:
        self._get(name)
        return torch.from_numpy(self._unpermuted(name, self._read(name)))

    def export(self, name: str) -> Tensor:
        """float32 becomes float16 where no value changes, F16 and BF16 stay; values of block types become float16.

        The last rounds by at most 2^-11 of a value, an order below the error of the block type itself; values beyond
        float16's range keep the tensor in float32.
        """
        value = self.tensor(name)
        stored = self._get(name).type_name
        if stored in ("F16", "BF16"):
            return value.to(_FLOAT[stored])
        half = value.to(torch.float16)
        exact = bool((half.float() == value).all())
        return half if exact or (stored not in _FLOAT and bool(half.isfinite().all())) else value

    def linear(self, module: str) -> Tensor | QTensor:
        return self.tensor(f"{module}.weight")

    def linear_format(self, module: str) -> Format | None:
        self._get(f"{module}.weight")
        return None

    def packed(self) -> Mapping[str, PackedLinear]:
        return {}

    def zero_decision(self) -> ZeroDecision | None:
        return None

    def packed_bytes(self) -> int:
        return 0

    def float_bytes(self) -> int:
        return sum(tensor.nbytes for tensor in self._tensors.values())

    def has_tokenizer(self) -> bool:
        return "tokenizer.ggml.tokens" in self.fields

    def has_chat_template(self) -> bool:
        return "tokenizer.chat_template" in self.fields

    def write_tokenizer(self, out: Path) -> None:
        from dibit.engine.checkpoint.gguf_tokenizer import write_tokenizer_files

        if self.has_tokenizer():
            write_tokenizer_files(self.fields, out)

    def close(self) -> None:
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1

    def _get(self, name: str) -> GgufTensor:
        try:
            return self._tensors[name]
        except KeyError:
            raise CheckpointError(f"{self.path} has no tensor {name}; it is not a whole model") from None

    def _read(self, name: str) -> np.ndarray[Any, Any]:
        import gguf

        tensor = self._get(name)
        raw = torch.empty(tensor.nbytes, dtype=torch.uint8)
        read_into(self._fd, tensor.offset, raw, f"tensor {tensor.name} of {self.path}")
        data: np.ndarray[Any, Any] = raw.numpy()
        kind = gguf.GGMLQuantizationType(tensor.type_id)
        if tensor.type_name == "F32":
            return data.view(np.float32).reshape(tensor.shape)
        if tensor.type_name == "F16":
            return data.view(np.float16).astype(np.float32).reshape(tensor.shape)
        rows = data.reshape(*tensor.shape[:-1], -1)
        values: np.ndarray[Any, Any] = gguf.quants.dequantize(rows, kind)
        return np.ascontiguousarray(values, dtype=np.float32).reshape(tensor.shape)

    def _unpermuted(self, name: str, values: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
        for part, heads in self._rotary.items():
            if f".{part}." in name:
                if values.shape[0] % (2 * heads):
                    raise CheckpointError(f"{name} of {self.path} has {values.shape[0]} rows for {heads} heads")
                pairs = values.reshape(heads, -1, 2, *values.shape[1:])
                return np.ascontiguousarray(pairs.swapaxes(1, 2)).reshape(values.shape)
        return values

    def _rename(self, tensors: tuple[GgufTensor, ...]) -> dict[str, GgufTensor]:
        renamed: dict[str, GgufTensor] = {}
        unknown: list[str] = []
        for tensor in tensors:
            if tensor.name == ROPE_FACTORS:
                renamed[ROPE_FACTORS] = tensor
            elif (name := hf_name(tensor.name)) is not None:
                renamed[name] = tensor
            elif not tensor.name.endswith(_IGNORED_SUFFIX):
                unknown.append(tensor.name)
        architecture = self.fields.get("general.architecture")
        # Another architecture is refused by name, which says more than a list of its tensors.
        if unknown and architecture is not None and architecture.value == "llama":
            raise CheckpointError(
                f"{self.path} has {len(unknown)} tensors that a dense Llama model does not have, such as {unknown[0]}; "
                "use the model's safetensors instead"
            )
        return renamed

    def _refuse_split(self) -> None:
        count = self.fields.get("split.count")
        if count is not None and isinstance(count.value, int) and count.value > 1:
            raise CheckpointError(
                f"{self.path} is one of {count.value} parts of a model; one whole file is supported, "
                "merge them with llama.cpp's `llama-gguf-split --merge`"
            )

    def _refuse_undequantizable(self) -> None:
        import gguf

        kinds = {tensor.type_id: tensor for tensor in self._tensors.values()}
        for type_id, tensor in kinds.items():
            blank = np.zeros((1, gguf.GGML_QUANT_SIZES[type_id][1]), dtype=np.uint8)
            if tensor.type_name in _FLOAT:
                continue
            try:
                gguf.quants.dequantize(blank, gguf.GGMLQuantizationType(type_id))
            except NotImplementedError:
                raise CheckpointError(
                    f"tensor {tensor.name} of {self.path} has type {tensor.type_name}, which the installed gguf "
                    "package cannot dequantize; use a file of another type, such as Q8_0 or Q4_K"
                ) from None
