"""A directory in Hugging Face form as a checkpoint: config.json, .safetensors files, tokenizer files.

Headers of all shards are read and checked at opening, and packed modules compared with their declared format, so that
what cannot be used is refused before a weight is read. Nothing is ever unpickled.
"""

from __future__ import annotations

import logging
import re
import shutil
from collections.abc import Iterable
from functools import cached_property
from pathlib import Path
from typing import Any

from torch import Tensor

from dibit.engine.checkpoint.checkpoint import Quantization, TensorInfo, ZeroChoice, ZeroDecision
from dibit.engine.checkpoint.gptq import PARTS, WORDWISE_TOOL, GptqTensors, check_order, check_shapes, from_gptq
from dibit.engine.checkpoint.json_file import read_object
from dibit.engine.checkpoint.quantization_config import parse_quantization
from dibit.engine.checkpoint.safetensors_file import FLOAT_TYPES, SafetensorsFile
from dibit.engine.checkpoint.zero_convention import SAMPLED_MODULES, decide_zeros
from dibit.engine.errors import CheckpointError
from dibit.kernels.formats import Format, QTensor

log = logging.getLogger(__name__)

TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "tokenizer.model",
    "sentencepiece.bpe.model",
    "vocab.json",
    "vocab.txt",
    "merges.txt",
    "chat_template.jinja",
    "chat_template.json",
    "generation_config.json",
)
_VOCABULARIES = ("tokenizer.json", "tokenizer.model", "sentencepiece.bpe.model", "vocab.json", "vocab.txt")
_PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl")
_SNAPSHOT = re.compile(r"models--(.+?)--(.+)")


class DirectoryCheckpoint:
    """See checkpoint.Checkpoint."""

    def __init__(self, path: Path, *, gptq_zero: ZeroChoice = "auto") -> None:
        self.path = path
        self.config: dict[str, Any] = _read_config(path)
        self._gptq_zero = gptq_zero
        self.quantization: Quantization | None = self._read_quantization()
        self._files: dict[str, SafetensorsFile] = {}
        self._where: dict[str, SafetensorsFile] = {}
        try:
            self._open_files()
            self._packed = [n.removesuffix(".qweight") for n in self._where if n.endswith(".qweight")]
            self._check_packed()
        except BaseException:
            self.close()
            raise

    @property
    def name(self) -> str:
        folder = self.path.resolve()
        match = _SNAPSHOT.fullmatch(folder.parent.parent.name) if folder.parent.name == "snapshots" else None
        return "/".join(match.groups()) if match else folder.name

    def names(self) -> Iterable[str]:
        return list(self._where)

    def has(self, name: str) -> bool:
        return name in self._where

    def info(self, name: str) -> TensorInfo:
        return self._file(name).entries[name].info

    def tensor(self, name: str) -> Tensor:
        info = self.info(name)
        if info.dtype not in FLOAT_TYPES:
            raise CheckpointError(f"{self.path}: {name} is {info.stored}; expected F32, F16 or BF16")
        return self._file(name).read(name)

    def export(self, name: str) -> Tensor:
        return self.tensor(name)

    def linear(self, module: str) -> Tensor | QTensor:
        packed = self.linear_format(module)
        if packed is None:
            return self.tensor(f"{module}.weight")
        decision = self.zero_decision()
        assert decision is not None
        quantizer = self.quantization.quantizer if self.quantization else None
        return from_gptq(
            self._packed_tensors(module),
            packed,
            zeros=decision.convention,
            wordwise=(quantizer or "").startswith(WORDWISE_TOOL),
            module=module,
            source=str(self.path),
        )

    def linear_format(self, module: str) -> Format | None:
        if f"{module}.qweight" in self._where:
            return self.quantization.format_of(module) if self.quantization else None
        self._file(f"{module}.weight")
        return None

    def zero_decision(self) -> ZeroDecision | None:
        return self._zero_decision

    @cached_property
    def _zero_decision(self) -> ZeroDecision | None:
        if self.quantization is None:
            return None
        if self._gptq_zero != "auto":
            return ZeroDecision(self._gptq_zero, f"asked for {self._gptq_zero}")
        step = max(1, len(self._packed) // SAMPLED_MODULES)
        sample = self._packed[::step]
        decision, contradicts = decide_zeros(
            self.quantization, ((self._packed_tensors(m), f) for m in sample if (f := self.linear_format(m)))
        )
        level = logging.WARNING if contradicts else logging.INFO
        log.log(level, "%s: GPTQ zero points read as %s: %s", self.name, decision.convention, decision.reason)
        return decision

    def packed_bytes(self) -> int:
        return sum(self.info(name).nbytes for name in self._where if self._is_packed(name))

    def float_bytes(self) -> int:
        return sum(self.info(name).nbytes for name in self._where if not self._is_packed(name))

    def has_tokenizer(self) -> bool:
        return any((self.path / name).is_file() for name in _VOCABULARIES)

    def has_chat_template(self) -> bool:
        if (self.path / "chat_template.jinja").is_file() or (self.path / "chat_template.json").is_file():
            return True
        config = self.path / "tokenizer_config.json"
        return config.is_file() and bool(read_object(config).get("chat_template"))

    def write_tokenizer(self, out: Path) -> None:
        for name in TOKENIZER_FILES:
            if (self.path / name).is_file():
                shutil.copyfile(self.path / name, out / name)
        extra = self.path / "additional_chat_templates"
        if extra.is_dir():
            (out / extra.name).mkdir(exist_ok=True)
            for template in extra.glob("*.jinja"):
                shutil.copyfile(template, out / extra.name / template.name)

    def close(self) -> None:
        for file in self._files.values():
            file.close()

    def _file(self, name: str) -> SafetensorsFile:
        try:
            return self._where[name]
        except KeyError:
            raise CheckpointError(f"{self.path} has no tensor {name}; it is not a whole model") from None

    def _is_packed(self, name: str) -> bool:
        module, _, part = name.rpartition(".")
        return part in PARTS and f"{module}.qweight" in self._where

    def _packed_tensors(self, module: str) -> GptqTensors:
        read = {part: self._where[name].read(name) for part in PARTS if (name := f"{module}.{part}") in self._where}
        return GptqTensors(**read)

    def _read_quantization(self) -> Quantization | None:
        raw = self.config.get("quantization_config")
        if raw is not None and not isinstance(raw, dict):
            raise CheckpointError(f"{self.path}/config.json: quantization_config is no object; the file is damaged")
        if raw:
            return parse_quantization(raw, f"{self.path}/config.json")
        legacy = self.path / "quantize_config.json"
        return parse_quantization(read_object(legacy), str(legacy), default_method="gptq") if legacy.is_file() else None

    def _open_files(self) -> None:
        weight_map = _weight_map(self.path)
        for shard in sorted(set(weight_map.values())) if weight_map else [_single_file(self.path)]:
            self._files[shard] = SafetensorsFile(self.path / shard)
        for shard, file in self._files.items():
            for name in file.entries:
                if weight_map.get(name, shard) == shard:
                    self._where[name] = file
        absent = [name for name in weight_map if name not in self._where]
        if absent:
            raise CheckpointError(
                f"{self.path}: the index lists {len(absent)} tensors that their shards do not have, such as "
                f"{absent[0]} in {weight_map[absent[0]]}; download the model again"
            )
        if not self._where:
            raise CheckpointError(f"{self.path} holds no tensors at all")

    def _check_packed(self) -> None:
        source = str(self.path)
        if self.quantization is None:
            if self._packed:
                raise CheckpointError(
                    f"{source} has packed tensors ({self._packed[0]}.qweight) but neither quantization_config in "
                    "config.json nor quantize_config.json says how they are packed; add one with quant_method, bits, "
                    "group_size, sym and checkpoint_format"
                )
            return
        if not self._packed:
            raise CheckpointError(f"{source} is declared GPTQ but has no packed tensors (.qweight); correct its config")
        for module in self._packed:
            parts = {part: self.info(n) for part in PARTS if (n := f"{module}.{part}") in self._where}
            declared = self.quantization.format_of(module)
            check_shapes(module, parts, declared, source)
            if self.quantization.act_order and "g_idx" in parts and declared is not None:
                check_order(module, self._where[f"{module}.g_idx"].read(f"{module}.g_idx"), declared, source)


def _read_config(path: Path) -> dict[str, Any]:
    if (path / "config.json").is_file():
        return read_object(path / "config.json")
    if (path / "adapter_config.json").is_file():
        raise CheckpointError(f"{path} holds an adapter, not a model; merge it into its base model first")
    raise CheckpointError(f"{path} has no config.json; expected a model directory in Hugging Face form")


def _weight_map(path: Path) -> dict[str, str]:
    """Shard of every tensor from the index; empty when there is no index."""
    if (path / "model.safetensors").is_file():
        return {}
    found = sorted(path.glob("*.safetensors.index.json"))
    if not found:
        return {}
    index = path / "model.safetensors.index.json"
    if index not in found:
        index = found[0]
    weight_map = read_object(index).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map or not all(isinstance(v, str) for v in weight_map.values()):
        raise CheckpointError(f"{index} has no weight_map from tensor names to files; download it again")
    for shard in sorted(set(weight_map.values())):
        if Path(shard).name != shard or not shard.endswith(".safetensors"):
            raise CheckpointError(f"{index} names the shard {shard!r}; expected a .safetensors file beside it")
        if not (path / shard).is_file():
            raise CheckpointError(f"{path} lacks the shard {shard} that its index names; download the model again")
    return weight_map


def _single_file(path: Path) -> str:
    found = sorted(p.name for p in path.glob("*.safetensors"))
    if "model.safetensors" in found:
        return "model.safetensors"
    if len(found) == 1:
        return found[0]
    if found:
        raise CheckpointError(
            f"{path} has {len(found)} .safetensors files and no model.safetensors.index.json; download the index too"
        )
    pickles = sorted(p.name for p in path.iterdir() if p.suffix in _PICKLES)
    if pickles:
        raise CheckpointError(
            f"{path} has its weights only in {pickles[0]}, a pickle, which can run code when it is opened and is never "
            "read here; convert it where you trust it, with transformers' "
            "from_pretrained(...).save_pretrained(..., safe_serialization=True)"
        )
    raise CheckpointError(f"{path} has no .safetensors files; expected model.safetensors or shards with an index")
