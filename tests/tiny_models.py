"""Tiny random models for engine tests: made by transformers (the oracle), read through an in-memory checkpoint."""

from __future__ import annotations

import json
import random
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from dibit.engine.batch import build_batch
from dibit.engine.config import KVType, SamplingParams
from dibit.engine.kv_cache import TYPES, allocate
from dibit.engine.models import resolve_arch
from dibit.engine.models.decoder import Decoder
from dibit.engine.models.spec import sites
from dibit.engine.request import Request
from dibit.engine.step import Chunk, Step
from dibit.kernels import native
from dibit.kernels.formats import Format, QTensor, dequantize

VOCAB = 97
SMALL: dict[str, Any] = {
    "hidden_size": 48,
    "intermediate_size": 80,
    "num_hidden_layers": 2,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "vocab_size": VOCAB,
    "max_position_embeddings": 128,
    "bos_token_id": 0,
    "eos_token_id": 1,
}
BACKENDS = [
    "reference",
    pytest.param("cpu", marks=pytest.mark.skipif(native.unavailable() is not None, reason="C++ kernels not built")),
]


@dataclass(frozen=True)
class Header:
    shape: tuple[int, ...]
    dtype: torch.dtype
    nbytes: int


@dataclass
class MemoryWeights:
    """What models need of a checkpoint, out of dictionaries. `reads` lists the tensors whose data was asked for."""

    config: dict[str, Any]
    tensors: dict[str, Tensor]
    packed: dict[str, QTensor] = field(default_factory=dict)
    reads: list[str] = field(default_factory=list)

    def has(self, name: str) -> bool:
        return name in self.tensors

    def names(self) -> Iterable[str]:
        yield from self.tensors
        for module in self.packed:
            yield from (f"{module}.{last}" for last in ("qweight", "qzeros", "scales", "g_idx"))

    def info(self, name: str) -> Header:
        tensor = self.tensors[name]
        return Header(tuple(tensor.shape), tensor.dtype, tensor.nbytes)

    def tensor(self, name: str) -> Tensor:
        self.reads.append(name)
        return self.tensors[name].clone()

    def linear(self, module: str) -> Tensor | QTensor:
        self.reads.append(module)
        return self.packed[module] if module in self.packed else self.tensors[f"{module}.weight"].clone()

    def linear_format(self, module: str) -> Format | None:
        return self.packed[module].format if module in self.packed else None


def hf_model(kind: str = "llama", **overrides: Any) -> Any:
    """A transformers model in float32 whose activations have size 1, so that errors are not drowned in zeros."""
    import transformers

    config_class, model_class = {
        "llama": (transformers.LlamaConfig, transformers.LlamaForCausalLM),
        "mistral": (transformers.MistralConfig, transformers.MistralForCausalLM),
        "qwen2": (transformers.Qwen2Config, transformers.Qwen2ForCausalLM),
        "qwen3": (transformers.Qwen3Config, transformers.Qwen3ForCausalLM),
    }[kind]
    torch.manual_seed(1)
    model = model_class(config_class(**{**SMALL, **overrides})).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.dim() == 2:
                parameter.normal_(std=1.0 if "embed" in name else parameter.shape[1] ** -0.5)
            else:
                parameter.normal_(mean=0.0 if name.endswith("bias") else 1.0, std=0.2)
    return model


def weights_of(model: Any) -> MemoryWeights:
    config = {**json.loads(model.config.to_json_string()), "architectures": [type(model).__name__]}
    tensors = {name: tensor.detach().clone() for name, tensor in model.state_dict().items()}
    if model.config.tie_word_embeddings:
        del tensors["lm_head.weight"]
    return MemoryWeights(config, tensors)


def saved_weights(directory: Path) -> MemoryWeights:
    """A model as save_pretrained wrote it."""
    return MemoryWeights(
        json.loads((directory / "config.json").read_text()), load_file(directory / "model.safetensors")
    )


def quantized(weights: MemoryWeights, formats: Mapping[str, Format] | Format) -> MemoryWeights:
    """The blocks' linears rounded to nearest; `formats` by the last word of the module, those not named stay float."""
    arch, sizes = resolve_arch(weights.config)
    low = MemoryWeights(weights.config, dict(weights.tensors))
    for layer in range(sizes.layers):
        for site in sites(arch, sizes, layer):
            for part in site.parts:
                chosen = formats if isinstance(formats, Format) else formats.get(part.module.rpartition(".")[2])
                if chosen is not None:
                    w = low.tensors.pop(f"{part.module}.weight")
                    low.packed[part.module] = stored(chosen.encode(w, *chosen.ranges(w)))
    return low


def stored(w: QTensor) -> QTensor:
    """As a checkpoint gives it back: scales in float16."""
    return QTensor(w.codes, w.zeros, w.scales.half(), w.format)


def dequantized(weights: MemoryWeights, model: Any) -> Any:
    """`model` with the weights that a quantized checkpoint stands for."""
    for module, w in weights.packed.items():
        model.get_submodule(module).weight.data = dequantize(w)
    return model


class Paged:
    """Runs a decoder step by step over a cache that is full of NaN until written, in blocks out of order."""

    def __init__(self, decoder: Decoder, *, block_size: int = 4, kv_type: KVType = "float32") -> None:
        self.decoder = decoder
        self.cache = allocate(decoder.sizes, num_blocks=96, block_size=block_size, stored=TYPES[kv_type])
        for tensor in self.cache.k + self.cache.v:
            # 0x7f7f is NaN in float16, as the scales of codes.
            tensor.fill_(float("nan") if tensor.is_floating_point() else 0x7F)
        self.free = list(range(96))
        random.Random(3).shuffle(self.free)
        self.cos, self.sin = decoder.sizes.rope.tables(decoder.sizes.max_positions)

    def request(self, ids: Sequence[int]) -> Request:
        request = make_request(ids, id=f"r{len(self.free)}")
        request.block_ids = [self.free.pop() for _ in range(-(-len(ids) // self.cache.block_size))]
        return request

    @torch.inference_mode()
    def logits(self, *chunks: tuple[Request, int, int]) -> Tensor:
        """Logits of all tokens of a step of chunks (request, start, stop)."""
        step = Step(tuple(Chunk(request, start, stop - start) for request, start, stop in chunks))
        batch = build_batch(step, block_size=self.cache.block_size)
        return self.decoder.logits(self.decoder.hidden(batch, self.cache, self.cos, self.sin))


def make_request(ids: Sequence[int], *, id: str = "r", max_tokens: int = 8, **params: Any) -> Request:
    return Request(
        id=id,
        prompt_ids=tuple(ids),
        params=SamplingParams(**{"temperature": 0.0, **params}),
        max_tokens=max_tokens,
        seed=7,
    )


def token_ids(count: int, seed: int = 0) -> list[int]:
    return [random.Random(f"{seed}/{i}").randrange(VOCAB) for i in range(count)]


def oracle_logits(model: Any, ids: Sequence[int]) -> Tensor:
    with torch.no_grad():
        logits: Tensor = model(torch.tensor([list(ids)])).logits[0]
    return logits
