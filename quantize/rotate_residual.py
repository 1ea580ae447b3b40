"""Rotating the residual stream: the model computes the same, and no channel of its hidden states is special any more.

Behind an RMS norm whose weights are one, hidden states may be turned by any orthogonal R [d, d] (SliceGPT, Ashkboos et
al. 2024; QuaRot, Ashkboos et al. 2024; R1 of SpinQuant, Liu et al. 2025), as a rotation does not change their norm:

    norm, then q, k, v or gate, up    W <- W diag(norm) R     norm <- 1
    o, down, into the stream          W <- Rᵀ W               b <- Rᵀ b
    embedding                         E <- E R
    final norm, then head             H <- H diag(norm) R     norm <- 1

All of it merges into the weights. A head that was tied to the embedding no longer is, as the final norm goes into one
of them: the checkpoint is larger by one embedding, and a decode step reads the same bytes. It is a view of a float
checkpoint, so that every method, plan and format works on it as on any other.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from dibit.engine.checkpoint import Checkpoint
from dibit.engine.checkpoint.checkpoint import PackedLinear, Quantization, TensorInfo, ZeroDecision
from dibit.engine.models import resolve_arch
from dibit.engine.models.spec import norm_names, sites
from dibit.kernels.formats import Format, QTensor
from dibit.quantize.rotate import random_rotation


class RotatedCheckpoint:
    """See checkpoint.Checkpoint. A float model, its residual stream turned by a random rotation drawn with `seed`."""

    def __init__(self, source: Checkpoint, *, seed: int) -> None:
        self._source = source
        arch, sizes = resolve_arch(source.config)
        self.config: dict[str, Any] = source.config | {"tie_word_embeddings": False}
        self._rotation = random_rotation(sizes.hidden, seed=seed).float()
        self._embedding, self._head = f"{arch.embedding}.weight", f"{arch.head}.weight"
        self._tied = sizes.tied_head
        # The norm before each weight that reads the stream.
        self._readers = {self._head: f"{arch.final_norm}.weight"}
        self._writers: set[str] = set()
        for layer in range(sizes.layers):
            attn_norm, mlp_norm = norm_names(arch, layer)
            for site in sites(arch, sizes, layer):
                key = site.name.rpartition(".")[2]
                for part in site.parts:
                    if key in ("o", "down"):
                        self._writers |= {f"{part.module}.weight", f"{part.module}.bias"}
                    else:
                        self._readers[f"{part.module}.weight"] = attn_norm if key == "qkv" else mlp_norm
        self._norms = frozenset(self._readers.values())

    @property
    def path(self) -> Path:
        return self._source.path

    @property
    def name(self) -> str:
        return self._source.name

    @property
    def quantization(self) -> Quantization | None:
        return self._source.quantization

    def names(self) -> Iterable[str]:
        names = list(self._source.names())
        return names if self._head in names else [*names, self._head]

    def has(self, name: str) -> bool:
        return name == self._head or self._source.has(name)

    def info(self, name: str) -> TensorInfo:
        found = self._source.info(self._stored(name))
        return dataclasses.replace(found, dtype=torch.float32, nbytes=4 * math.prod(found.shape))

    def tensor(self, name: str) -> Tensor:
        """float32, whatever the source has."""
        value = self._source.tensor(self._stored(name)).float()
        if name in self._norms:
            return torch.ones_like(value)
        if name == self._embedding:
            return value @ self._rotation
        if name in self._readers:
            return (value * self._source.tensor(self._readers[name]).float()) @ self._rotation
        return self._rotation.T @ value if name in self._writers else value

    def export(self, name: str) -> Tensor:
        return self.tensor(name).to(self._source.export(self._stored(name)).dtype)

    def linear(self, module: str) -> Tensor | QTensor:
        return self.tensor(f"{module}.weight")

    def linear_format(self, module: str) -> Format | None:
        return self._source.linear_format(module)

    def packed(self) -> Mapping[str, PackedLinear]:
        return self._source.packed()

    def zero_decision(self) -> ZeroDecision | None:
        return self._source.zero_decision()

    def packed_bytes(self) -> int:
        return self._source.packed_bytes()

    def float_bytes(self) -> int:
        more = self._source.info(self._embedding).nbytes if self._tied else 0
        return self._source.float_bytes() + more

    def has_tokenizer(self) -> bool:
        return self._source.has_tokenizer()

    def has_chat_template(self) -> bool:
        return self._source.has_chat_template()

    def write_tokenizer(self, out: Path) -> None:
        self._source.write_tokenizer(out)

    def close(self) -> None:
        self._source.close()

    def _stored(self, name: str) -> str:
        """Where the source keeps what becomes this tensor."""
        return self._embedding if name == self._head and self._tied else name
