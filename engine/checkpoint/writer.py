"""Writing a checkpoint: tensor by tensor, aside, resumable, and under its own name only when it is whole.

Tensors collect in memory up to PART_BYTES, then go to a part file in the sibling directory OUT.partial; `flush` makes
everything added so far safe against a kill. `finish` gathers the parts into shards, adds the config, and
renames the directory to OUT. Until then OUT does not exist. A second run with the same settings finds the finished
parts again; one with other settings is refused.
"""

from __future__ import annotations

import dataclasses
import fcntl
import itertools
import json
import os
import re
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import Tensor

from dibit.engine.checkpoint.checkpoint import Checkpoint
from dibit.engine.checkpoint.gptq import GptqPacking
from dibit.engine.checkpoint.packing import Export
from dibit.engine.checkpoint.progress import (
    PROGRESS_NAME,
    PackedModule,
    Part,
    load_progress,
    save_progress,
)
from dibit.engine.checkpoint.safetensors_file import SafetensorsFile
from dibit.engine.checkpoint.shard_file import sync_directory, write_error, write_shard, write_text
from dibit.engine.errors import CheckpointError
from dibit.kernels.formats import Format, QTensor

MAX_SHARD_BYTES = 2_000_000_000
PART_BYTES = 256_000_000
PARTIAL_SUFFIX = ".partial"
_LOCK_NAME = "writer.lock"
# How the source was packed, which says nothing of what is written.
_SOURCE_ONLY = ("quantization_config", "compression_config")
GPTQ_V2 = GptqPacking("v2")


class CheckpointWriter:
    """A checkpoint in the making, with the config and the tokenizer of `source`.

    out        directory to be; an existing one must be empty, or a checkpoint and `overwrite` given
    export     on-disk format of the packed linears
    settings   what the result depends on; JSON values
    directory  where the unfinished checkpoint lies; other files of the run may be put there
    Raises CheckpointError when `out` is taken, another run is writing it, an interrupted run had other settings, or
    the disk is full.
    """

    def __init__(
        self,
        out: Path,
        source: Checkpoint,
        *,
        export: Export = GPTQ_V2,
        settings: Mapping[str, Any] | None = None,
        overwrite: bool = False,
        max_shard_bytes: int = MAX_SHARD_BYTES,
    ) -> None:
        self.out = out.absolute()
        self.directory = partial_directory(self.out)
        self._source = source
        self._export = export
        self._settings = {"model": source.name, "config": source.config, **(settings or {})}
        self._max_shard_bytes = max_shard_bytes
        check_out(self.out, overwrite=overwrite)
        try:
            self.directory.mkdir(parents=True, exist_ok=True)
            self._lock = _lock(self.directory)
        except OSError as error:
            raise write_error(error, self.directory / _LOCK_NAME, 0) from error
        try:
            self._parts = load_progress(self.directory, self._settings)
            self._sweep()
            # A tokenizer that cannot be written is better known now than after hours of work.
            source.write_tokenizer(self.directory)
        except BaseException as error:
            self.close()
            if isinstance(error, OSError):
                raise write_error(error, self.directory / "tokenizer.json", 0) from error
            raise
        self._pending: dict[str, Tensor] = {}
        self._pending_modules: dict[str, PackedModule] = {}
        self._open: dict[str, SafetensorsFile] = {}

    def has(self, name: str) -> bool:
        """Whether a float tensor was added, in this run or the one before."""
        return name in self._pending or any(name in part.names for part in self._parts)

    def has_module(self, module: str) -> bool:
        """Whether a packed linear was added, in this run or the one before."""
        return module in self._modules()

    def add_float(self, name: str, tensor: Tensor) -> None:
        """Add a tensor in the type it has; one of the same name is replaced."""
        self._pending[name] = tensor.detach().cpu().contiguous()
        self._flush_when_large()

    def add_quantized(self, module: str, q: QTensor) -> None:
        """Add a linear, packed; one of the same name is replaced. Raises CheckpointError when it cannot be held."""
        packed = self._export.pack(q, module=module)
        self._pending.update({f"{module}.{part}": tensor for part, tensor in packed.items()})
        middle = 1 << (q.format.bits - 1)
        form = q.format
        symmetric = form.zero_grid == "integer" and bool((q.zeros == middle).all())
        self._pending_modules[module] = PackedModule(form.bits, form.group_size, symmetric, form.zero_grid)
        self._flush_when_large()

    def module(self, module: str) -> QTensor:
        """A linear that was added, read back."""
        written = self._modules()[module]
        where = self._where().keys() | self._pending.keys()
        names = {part: name for part in self._export.parts if (name := f"{module}.{part}") in where}
        return self._export.unpack(
            {part: self._read(name) for part, name in names.items()},
            Format(written.bits, written.group_size, written.zero_grid),
            zeros=self._export.zeros,
            module=module,
            source=str(self.directory),
        )

    def tensor(self, name: str) -> Tensor:
        """A float tensor that was added, read back."""
        return self._read(name)

    def flush(self) -> None:
        """Everything added so far is on disk, and is found again by a later run, when this returns."""
        if not self._pending:
            return
        file = self._fresh_name()
        layout = {name: (tensor.dtype, tuple(tensor.shape)) for name, tensor in self._pending.items()}
        crc = write_shard(self.directory / file, layout, self._pending.__getitem__)
        part = Part(file, crc, tuple(layout), dict(self._pending_modules))
        save_progress(self.directory, self._settings, [*self._parts, part])
        self._parts.append(part)
        self._pending.clear()
        self._pending_modules.clear()

    def finish(
        self,
        *,
        method: str | None = None,
        facts: Mapping[str, str | int | float | bool | None] | None = None,
        activation_bits: int | None = None,
        scratch: Sequence[str] = (),
    ) -> Path:
        """Complete the checkpoint and give it its name.

        method, facts  recorded in quantization_config.meta
        activation_bits  recorded in quantization_config, where it is not None
        scratch        files in `directory` that are not part of the checkpoint
        returns        the directory of the checkpoint
        """
        self.flush()
        weight_map = self._gather()
        config = {key: value for key, value in self._source.config.items() if key not in _SOURCE_ONLY}
        modules = self._modules()
        if modules:
            quantization = self._export.config(modules, self._where(), method=method, facts=facts or {})
            if activation_bits is not None:
                quantization["activation_bits"] = activation_bits
            config["quantization_config"] = quantization
            if self._export.side_file is not None:
                self._write_json(self._export.side_file, quantization)
        if len(set(weight_map.values())) > 1:
            total = sum(f.entries[name].info.nbytes for name, f in self._locate().items())
            index = {"metadata": {"total_size": total}, "weight_map": weight_map}
            self._write_json("model.safetensors.index.json", index)
        try:
            self._write_json("config.json", config)
            self._publish()
            # Only now: had the renaming failed, a later run would need them.
            for name in (*scratch, PROGRESS_NAME, _LOCK_NAME):
                (self.out / name).unlink(missing_ok=True)
        except OSError as error:
            raise write_error(error, self.directory / "config.json", 0) from error
        self.close()
        return self.out

    def close(self) -> None:
        """Let go of the files; what was flushed stays for a later run."""
        for file in getattr(self, "_open", {}).values():
            file.close()
        if self._lock >= 0:
            os.close(self._lock)
            self._lock = -1

    def discard(self) -> None:
        """Give up: what was written is deleted."""
        self.close()
        shutil.rmtree(self.directory, ignore_errors=True)

    def _gather(self) -> dict[str, str]:
        """Parts into shards of at most max_shard_bytes, each part deleted as soon as nothing in it is needed.

        Shards are filled in the order of names, so that an interrupted gathering is continued with the same shards.
        returns  file of every tensor
        """
        where = self._locate()
        shards: list[list[str]] = [[]]
        size = 0
        for name in sorted(where, key=_natural):
            nbytes = where[name].entries[name].info.nbytes
            if shards[-1] and size + nbytes > self._max_shard_bytes:
                shards.append([])
                size = 0
            shards[-1].append(name)
            size += nbytes
        files = {_shard_name(i, len(shards)): names for i, names in enumerate(shards)}
        self._rename_unlike(files)
        for file, names in files.items():
            if all(part.file != file for part in self._parts):
                self._gather_one(file, names)
        return {name: file for file, names in files.items() for name in names}

    def _rename_unlike(self, files: Mapping[str, Sequence[str]]) -> None:
        """Shards of an earlier gathering that something was added to since become parts again."""
        for i, part in enumerate(self._parts):
            if part.file in files and set(part.names) != set(files[part.file]):
                fresh = self._fresh_name()
                (self.directory / part.file).rename(self.directory / fresh)
                if opened := self._open.pop(part.file, None):
                    opened.close()
                self._parts[i] = dataclasses.replace(part, file=fresh)
                save_progress(self.directory, self._settings, self._parts)

    def _gather_one(self, file: str, names: list[str]) -> None:
        where = self._locate()
        entries = {name: where[name].entries[name].info for name in names}
        layout = {name: (info.dtype, info.shape) for name, info in entries.items()}
        crc = write_shard(self.directory / file, layout, lambda name: where[name].read(name))
        written = self._modules()
        mark = f".{self._export.parts[0]}"
        modules = {m: written[m] for name in names if (m := name.removesuffix(mark)) in written}
        parts = [*self._parts, Part(file, crc, tuple(names), modules)]
        newest = {name: part.file for part in parts for name in part.names}
        self._parts = [part for part in parts if any(newest[name] == part.file for name in part.names)]
        save_progress(self.directory, self._settings, self._parts)
        for part in parts:
            if part not in self._parts:
                if opened := self._open.pop(part.file, None):
                    opened.close()
                (self.directory / part.file).unlink(missing_ok=True)

    def _publish(self) -> None:
        for path in self.directory.rglob("*"):
            if path.is_file():
                _sync_file(path)
        sync_directory(self.directory)
        replaced = self.out.with_name(self.out.name + ".replaced")
        if self.out.exists():
            shutil.rmtree(replaced, ignore_errors=True)
            self.out.rename(replaced)
        self.directory.rename(self.out)
        sync_directory(self.out.parent)
        shutil.rmtree(replaced, ignore_errors=True)

    def _where(self) -> dict[str, str]:
        """Part file of every tensor."""
        return {name: part.file for part in self._parts for name in part.names}

    def _locate(self) -> dict[str, SafetensorsFile]:
        for part in self._parts:
            if part.file not in self._open:
                self._open[part.file] = SafetensorsFile(self.directory / part.file)
        return {name: self._open[file] for name, file in self._where().items()}

    def _read(self, name: str) -> Tensor:
        return self._pending[name] if name in self._pending else self._locate()[name].read(name)

    def _modules(self) -> dict[str, PackedModule]:
        return {m: info for part in self._parts for m, info in part.modules.items()} | self._pending_modules

    def _flush_when_large(self) -> None:
        if sum(tensor.nbytes for tensor in self._pending.values()) >= PART_BYTES:
            self.flush()

    def _fresh_name(self) -> str:
        used = {part.file for part in self._parts}
        numbers = itertools.count(len(self._parts))
        return next(name for n in numbers if (name := f"part-{n:05}.safetensors") not in used)

    def _sweep(self) -> None:
        """Delete what a killed run left unlisted."""
        listed = {part.file for part in self._parts}
        for path in self.directory.iterdir():
            if path.name.endswith(".safetensors.new") or (path.suffix == ".safetensors" and path.name not in listed):
                path.unlink()

    def _write_json(self, name: str, content: Mapping[str, Any]) -> None:
        write_text(self.directory / name, json.dumps(content, indent=2, ensure_ascii=False) + "\n")


def partial_directory(out: Path) -> Path:
    """Where the checkpoint `out` lies until it is complete."""
    return out.absolute().with_name(out.name + PARTIAL_SUFFIX)


def check_out(out: Path, *, overwrite: bool) -> None:
    """Raises CheckpointError when a checkpoint `out` may not be written."""
    if not out.exists() or (out.is_dir() and not any(out.iterdir())):
        return
    if not out.is_dir():
        raise CheckpointError(f"{out} exists and is no directory; choose another output directory")
    if not overwrite:
        raise CheckpointError(f"{out} exists and is not empty; choose another output directory or pass --overwrite")
    if not (out / "config.json").is_file():
        raise CheckpointError(f"{out} holds no checkpoint (no config.json), so it is not overwritten; choose another")


def _lock(directory: Path) -> int:
    fd = os.open(directory / _LOCK_NAME, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(fd)
        raise CheckpointError(f"another run is writing {directory}; wait for it or choose another output") from None
    return fd


def _shard_name(i: int, count: int) -> str:
    return "model.safetensors" if count == 1 else f"model-{i + 1:05}-of-{count:05}.safetensors"


def _sync_file(path: Path) -> None:
    fd = os.open(path, os.O_RDONLY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


def _natural(name: str) -> list[tuple[int, str]]:
    return [(int(piece), "") if piece.isdigit() else (-1, piece) for piece in re.split(r"(\d+)", name)]
