"""The engine on the Triton backend, in the interpreter: chunks and decoding of a whole model, and of the demo's first
two blocks, against the reference backend.

Bound: activations are rounded to float16 before every product and keys before every score, a relative error of 2^-11
each that a sum over hundreds of columns averages; 4e-3 of the largest value leaves room for it to grow along two
blocks and none for a wrong term, which changes the whole.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from served_steps import Repeated, serve
from tiny_models import MemoryWeights, Paged, hf_model, make_request, quantized, token_ids, weights_of
from torch import Tensor

from dibit.engine import sampler
from dibit.engine.config import EngineConfig, KVType
from dibit.engine.errors import ConfigError
from dibit.engine.loader import load_decoder
from dibit.engine.memory_plan import plan_memory
from dibit.engine.models import resolve_arch
from dibit.engine.models.fused_block import FusedBlock
from dibit.engine.models.spec import norm_names, sites
from dibit.engine.request import Request
from dibit.kernels.formats import PER_CHANNEL, Format

BOUND = 4e-3


def assert_close(found: Tensor, expected: Tensor, bound: float = BOUND) -> None:
    error = float((found - expected).abs().max() / expected.abs().max())
    assert error <= bound, f"relative error {error:.2g}, at most {bound:.2g} allowed"


def paged(
    weights: MemoryWeights, backend: Any, *, kv_type: KVType = "float16", activation_bits: int | None = None
) -> Paged:
    config = EngineConfig(backend=backend, device="cpu")
    return Paged(load_decoder(weights, config=config, activation_bits=activation_bits), kv_type=kv_type)


# A key or value near the border of two codes gets another one: a 254th of its group's largest, or a 30th; in fp8 an
# 8th of itself.
@pytest.mark.parametrize(
    ("kv_type", "bound"), [("float16", BOUND), ("fp8", 8 * BOUND), ("int8", 2 * BOUND), ("int4", 8 * BOUND)]
)
def test_prefill_chunks_and_decoding(kv_type: KVType, bound: float) -> None:
    weights = quantized(weights_of(hf_model(tie_word_embeddings=True, attention_bias=True)), Format(4, 16))
    ids = token_ids(6)
    found = []
    for backend in ("triton", "reference"):
        model = paged(weights, backend, kv_type=kv_type)
        assert all(isinstance(block, FusedBlock) == (backend == "triton") for block in model.decoder.blocks)
        first, second = model.request(ids), model.request(ids[:2])
        found.append(
            torch.cat(
                [
                    model.logits((first, 0, 3), (second, 0, 1)),
                    model.logits((first, 3, 4), (second, 1, 2)),
                    model.logits((first, 4, 6)),
                ]
            )
        )
    assert_close(*found, bound)


def test_rounded_activations() -> None:
    """An activation near the border of two integers gets another one: a 254th of the token's largest."""
    weights, ids = quantized(weights_of(hf_model()), Format(4, 16)), token_ids(4)
    found = []
    for backend in ("triton", "reference"):
        model = paged(weights, backend, activation_bits=8)
        assert all(isinstance(block, FusedBlock) == (backend == "triton") for block in model.decoder.blocks)
        found.append(model.logits((model.request(ids), 0, 4)))
    assert_close(*found, 3 * BOUND)
    model = paged(weights, "reference")
    assert not torch.allclose(found[1], model.logits((model.request(ids), 0, 4)), rtol=1e-3)


def test_decode_steps_ask_the_device_for_nothing_and_draw(monkeypatch: pytest.MonkeyPatch) -> None:
    """What a CUDA graph is captured from: `Repeated` fails where a value is looked at. A drawn row and a greedy one
    have the tokens of steps that are not captured, and none is drawn beside the graph."""
    weights = quantized(weights_of(hf_model(tie_word_embeddings=True)), Format(4, 16))
    decoder = load_decoder(weights, config=EngineConfig(backend="triton", device="cpu", block_size=4))

    def requests() -> list[Request]:
        drawn = make_request(token_ids(2), id="drawn", max_tokens=5, temperature=1.5, top_k=40, top_p=0.95)
        return [drawn, make_request(token_ids(3, seed=1), id="greedy", max_tokens=2)]

    beside: list[int] = []
    draw = sampler._drawn

    def counted(*args: Any) -> Any:
        beside.append(1)
        return draw(*args)

    plain = serve(decoder, requests(), monkeypatch, tape=False)
    monkeypatch.setattr(sampler, "_drawn", counted)
    repeated = Repeated()
    graphed = serve(decoder, requests(), monkeypatch, capture=repeated)
    assert graphed.tokens == plain.tokens
    assert repeated.replays == graphed.runner.taped_steps > 2
    assert len(beside) <= graphed.runner.untaped_steps


def test_planned_weights_are_those_of_the_load() -> None:
    wide = {"hidden_size": 128, "intermediate_size": 192, "num_attention_heads": 4, "num_key_value_heads": 2}
    weights = quantized(weights_of(hf_model(tie_word_embeddings=True, **wide)), Format(4, 16))
    config = EngineConfig(backend="triton", device="cpu")
    held = load_decoder(weights, config=config).nbytes
    assert plan_memory(weights, config=config).weight_bytes == pytest.approx(held, rel=0.001)


def test_a_cache_that_the_kernels_cannot_read_is_refused_by_the_plan() -> None:
    weights = quantized(weights_of(hf_model(head_dim=6)), Format(4, PER_CHANNEL))
    with pytest.raises(ConfigError, match=r"kv_type is 'k8v4'.*a multiple of 4, not 6"):
        plan_memory(weights, config=EngineConfig(backend="triton", device="cpu", kv_type="k8v4"))
    plan_memory(weights, config=EngineConfig(backend="triton", device="cpu", kv_type="int8"))


@pytest.mark.demo
def test_the_first_two_blocks_of_the_demo_model() -> None:
    """Without its 49 152 embedding rows: the interpreter would take minutes for the head alone."""
    weights = first_blocks(2)
    ids = torch.randint(0, VOCAB_KEPT, (3,)).tolist()
    found = []
    for backend in ("triton", "reference"):
        model = paged(weights, backend)
        request = model.request(ids)
        found.append(torch.cat([model.logits((request, 0, 2)), model.logits((request, 2, 3))]))
    assert_close(*found)


VOCAB_KEPT = 256


def first_blocks(layers: int) -> MemoryWeights:
    """The demo model's first blocks at 4 bits, its final norm and the first rows of its tied embedding."""
    from dibit.engine.checkpoint import open_checkpoint, resolve_model

    checkpoint = open_checkpoint(resolve_model("demo"))
    try:
        config = {**checkpoint.config, "num_hidden_layers": layers, "vocab_size": VOCAB_KEPT}
        arch, sizes = resolve_arch(config)
        names = [f"{arch.final_norm}.weight"]
        for layer in range(layers):
            names += norm_names(arch, layer)
            names += [f"{part.module}.weight" for site in sites(arch, sizes, layer) for part in site.parts]
        tensors = {name: checkpoint.tensor(name).float() for name in names}
        embedding = f"{arch.embedding}.weight"
        tensors[embedding] = checkpoint.tensor(embedding)[:VOCAB_KEPT].float()
        return quantized(MemoryWeights(config, tensors), Format(4, PER_CHANNEL))
    finally:
        checkpoint.close()
