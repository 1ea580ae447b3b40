"""A directory in Hugging Face form as a checkpoint: config.json, .safetensors files, tokenizer files.

Headers of all shards are read and checked at opening, and packed modules compared with their declared format, so that
what cannot be used is refused before a weight is read. Nothing is ever unpickled.
"""

from __future__ import annotations

import logging
import re
import shutil
from collections.abc import Iterable, Mapping
from functools import cached_property
from itertools import chain
from pathlib import Path
from typing import Any

from torch import Tensor

from dibit.engine.checkpoint.checkpoint import PackedLinear, Quantization, TensorInfo, ZeroChoice, ZeroDecision
from dibit.engine.checkpoint.dispatch import Declared, declared_packing
from dibit.engine.checkpoint.efficientqat import EfficientQatPacking, detect_efficientqat
from dibit.engine.checkpoint.gptq import check_order
from dibit.engine.checkpoint.json_file import read_object
from dibit.engine.checkpoint.packing import Headers, Packing
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
# A tensor of one of these names makes its module a packed one.
_MARKED = (".qweight", ".weight_packed")
_PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl")
_SNAPSHOT = re.compile(r"models--(.+?)--(.+)")


class DirectoryCheckpoint:
    """See checkpoint.Checkpoint."""

    def __init__(self, path: Path, *, gptq_zero: ZeroChoice = "auto") -> None:
        self.path = path
        self.config: dict[str, Any] = _read_config(path)
        self._gptq_zero = gptq_zero
        declared = self._read_quantization()
        self.quantization: Quantization | None = declared.quantization if declared else None
        self._packing: Packing | None = declared.packing if declared else None
        self._files: dict[str, SafetensorsFile] = {}
        self._where: dict[str, SafetensorsFile] = {}
        try:
            self._open_files()
            self._packed = self._read_packed()
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
        assert self._packing is not None
        decision = self.zero_decision()
        return self._packing.unpack(
            self._packed_tensors(module),
            packed,
            zeros="v2" if decision is None else decision.convention,
            module=module,
            source=str(self.path),
        )

    def linear_format(self, module: str) -> Format | None:
        if module in self._packed:
            return self._packed[module].format
        self._file(f"{module}.weight")
        return None

    def packed(self) -> Mapping[str, PackedLinear]:
        return self._packed

    def zero_decision(self) -> ZeroDecision | None:
        return self._zero_decision

    @cached_property
    def _zero_decision(self) -> ZeroDecision | None:
        if self.quantization is None or self._packing is None:
            return None
        modules = list(self._packed)[:: max(1, len(self._packed) // SAMPLED_MODULES)]
        samples = (self._packing.sample(self._packed_tensors(m), self._packed[m].format) for m in modules)
        first = next(samples)
        if first is None:
            if self._gptq_zero != "auto":
                raise CheckpointError(
                    f"GPTQ's zero points are to be read as {self._gptq_zero}, but {self.name} is "
                    f"{self.quantization.method}, which stores them in one way only; leave --gptq-zero out"
                )
            return None
        if self._gptq_zero != "auto":
            return ZeroDecision(self._gptq_zero, f"asked for {self._gptq_zero}")
        decision, contradicts = decide_zeros(self.quantization, chain([first], (s for s in samples if s is not None)))
        level = logging.WARNING if contradicts else logging.INFO
        log.log(level, "%s: zero points read as %s: %s", self.name, decision.convention, decision.reason)
        return decision

    def packed_bytes(self) -> int:
        return sum(self.info(name).nbytes for packed in self._packed.values() for name in packed.tensors)

    def float_bytes(self) -> int:
        return sum(self.info(name).nbytes for name in self._where) - self.packed_bytes()

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

    def _packed_tensors(self, module: str) -> dict[str, Tensor]:
        return {name.rpartition(".")[2]: self._where[name].read(name) for name in self._packed[module].tensors}

    def _read_quantization(self) -> Declared | None:
        raw = self.config.get("quantization_config") or self.config.get("compression_config")
        if raw is not None and not isinstance(raw, dict):
            raise CheckpointError(f"{self.path}/config.json: quantization_config is no object; the file is damaged")
        if raw:
            return declared_packing(raw, f"{self.path}/config.json")
        legacy = self.path / "quantize_config.json"
        return declared_packing(read_object(legacy), str(legacy), default_method="gptq") if legacy.is_file() else None

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

    def _read_packed(self) -> dict[str, PackedLinear]:
        """Every packed module, its headers checked against the declared format."""
        marked = {n.rpartition(".")[0]: n.rpartition(".")[2] for n in self._where if n.endswith(_MARKED)}
        if not marked:
            if self.quantization is not None:
                raise CheckpointError(
                    f"{self.path} is declared {self.quantization.method} but has no packed tensors "
                    f"({' or '.join(mark.lstrip(chr(46)) for mark in _MARKED)}); correct its config"
                )
            return {}
        if self.quantization is None:
            self._detect(marked)
        assert self.quantization is not None
        assert self._packing is not None
        found = {}
        for module, mark in marked.items():
            if mark != self._packing.parts[0]:
                raise CheckpointError(
                    f"{self.path} is declared {self.quantization.method}, whose packed tensors are called "
                    f"{self._packing.parts[0]}, but has {module}.{mark}; correct its config"
                )
            found[module] = self._read_headers(module, self._packing, self.quantization)
        return found

    def _read_headers(self, module: str, packing: Packing, quantization: Quantization) -> PackedLinear:
        parts = self._parts(module, packing)
        declared = quantization.format_of(module)
        headers = Headers(
            module=module,
            parts=parts,
            declared=declared,
            symmetric=quantization.symmetric_of(module),
            source=str(self.path),
            read=lambda part: self._where[f"{module}.{part}"].read(f"{module}.{part}"),
        )
        shape = packing.shape(headers)
        assert declared is not None
        if quantization.act_order and "g_idx" in parts:
            check_order(module, headers.read("g_idx"), declared, headers.source)
        return PackedLinear(shape, declared, tuple(f"{module}.{part}" for part in parts))

    def _parts(self, module: str, packing: Packing) -> dict[str, TensorInfo]:
        return {part: self.info(name) for part in packing.parts if (name := f"{module}.{part}") in self._where}

    def _detect(self, marked: Mapping[str, str]) -> None:
        packing = EfficientQatPacking()
        found = detect_efficientqat({module: self._parts(module, packing) for module in marked})
        if found is None:
            module, mark = next(iter(marked.items()))
            raise CheckpointError(
                f"{self.path} has packed tensors ({module}.{mark}) but neither quantization_config in config.json nor "
                "quantize_config.json says how they are packed, and their shapes are not those of EfficientQAT; add "
                "one with quant_method, bits, group_size, sym and checkpoint_format"
            )
        log.info("%s: no quantization_config; read as EfficientQAT's, %s by its shapes", self.name, found.format.name)
        self.quantization, self._packing = found, packing


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
