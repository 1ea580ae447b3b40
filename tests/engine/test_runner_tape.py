"""Decode steps replayed from tapes: the tokens and the logits of the ordinary path, bit for bit, whatever happens."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from served_steps import requests_of, same, serve
from tiny_models import hf_model, make_request, quantized, token_ids, weights_of

from dibit.engine import decode_tape, sampler
from dibit.engine.config import EngineConfig
from dibit.engine.loader import load_decoder
from dibit.engine.memory_plan import activation_bytes
from dibit.engine.models.decoder import Decoder
from dibit.engine.request import Request
from dibit.engine.runner import ModelRunner
from dibit.engine.step import Chunk, Step
from dibit.kernels import native
from dibit.kernels.formats import Format

pytestmark = pytest.mark.skipif(native.unavailable() is not None, reason="C++ kernels not built")

TOKEN_BYTES = 2 * 2 * 2 * 8 * 2  # layers, keys and values, kv heads, head size, float16


@pytest.fixture(autouse=True)
def _isa() -> Iterator[None]:
    isa = native.isa()
    yield
    native.set_isa(isa)


@pytest.fixture(scope="module")
def low_bit() -> Decoder:
    return load_decoder(quantized(weights_of(hf_model()), Format(4, 16)), config=EngineConfig(block_size=4))


@pytest.mark.parametrize("isa", ["portable", "avx2"])
@pytest.mark.parametrize("threads", [1, 2, 3])
def test_batches_of_changing_size(threads: int, isa: str, low_bit: Decoder, monkeypatch: pytest.MonkeyPatch) -> None:
    try:
        native.set_isa(isa)
    except native.NativeError:
        pytest.skip(f"no {isa} on this machine")
    plain = serve(low_bit, requests_of(), monkeypatch, tape=False, threads=threads)
    taped = serve(low_bit, requests_of(), monkeypatch, threads=threads)
    same(taped, plain)
    assert len(set(taped.batches)) >= 4
    assert taped.runner.taped_steps > taped.runner.untaped_steps
    assert taped.runner.tape_s > 0


@pytest.mark.parametrize("formats", [Format(2, 16), Format(3, 16), Format(8, -1)], ids=lambda f: f.name)
def test_every_width(formats: Format, monkeypatch: pytest.MonkeyPatch) -> None:
    model = hf_model(attention_bias=True, mlp_bias=True, tie_word_embeddings=True)
    decoder = load_decoder(quantized(weights_of(model), formats), config=EngineConfig(block_size=4))
    same(
        taped := serve(decoder, requests_of(3), monkeypatch),
        serve(decoder, requests_of(3), monkeypatch, tape=False),
    )
    assert taped.runner.taped_steps > 5


@pytest.mark.parametrize("kv_type", ["fp8", "int8", "k8v4", "int4"])
def test_a_cache_of_low_bits(kv_type: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    low = quantized(weights_of(hf_model(head_dim=40)), Format(4, 16))
    decoder = load_decoder(low, config=EngineConfig(block_size=4, kv_type=kv_type))
    taped = serve(decoder, requests_of(4), monkeypatch, kv_type=kv_type)
    same(taped, serve(decoder, requests_of(4), monkeypatch, kv_type=kv_type, tape=False))
    assert taped.runner.taped_steps > 5
    assert taped.runner.cache.k[0].dtype.itemsize == 1
    alone = serve(decoder, requests_of(1), monkeypatch, kv_type=kv_type)
    assert alone.tokens["0"] == taped.tokens["0"]


@pytest.mark.parametrize("family", ["qwen2", "qwen3"])
def test_other_families(family: str, monkeypatch: pytest.MonkeyPatch) -> None:
    decoder = load_decoder(
        quantized(weights_of(hf_model(family, head_dim=16)), Format(4, 16)), config=EngineConfig(block_size=4)
    )
    taped = serve(decoder, requests_of(3), monkeypatch)
    same(taped, serve(decoder, requests_of(3), monkeypatch, tape=False))
    assert taped.runner.taped_steps > 5


@pytest.mark.parametrize("activation_bits", [4, 6, 8])
def test_low_bit_activations_and_fractional_zero_points(activation_bits: int, monkeypatch: pytest.MonkeyPatch) -> None:
    weights = quantized(weights_of(hf_model(tie_word_embeddings=True)), Format(2, 16, "fractional"))
    decoder = load_decoder(weights, config=EngineConfig(block_size=4), activation_bits=activation_bits)
    taped = serve(decoder, requests_of(4), monkeypatch)
    same(taped, serve(decoder, requests_of(4), monkeypatch, tape=False))
    assert taped.runner.taped_steps > 5
    # A request's tokens do not depend on those it shares its steps with.
    alone = serve(decoder, requests_of(1), monkeypatch)
    assert alone.tokens["0"] == taped.tokens["0"]
    assert all(torch.equal(a, b) for a, b in zip(alone.logits["0"], taped.logits["0"], strict=True))
    unrounded = load_decoder(weights, config=EngineConfig(block_size=4))
    plain = serve(unrounded, requests_of(1), monkeypatch)
    assert not torch.equal(plain.logits["0"][0], alone.logits["0"][0])


def test_a_fused_site_of_several_widths(monkeypatch: pytest.MonkeyPatch) -> None:
    widths = {"q_proj": 2, "k_proj": 4, "v_proj": 4, "o_proj": 3, "gate_proj": 4, "up_proj": 2, "down_proj": 3}
    weights = quantized(weights_of(hf_model()), {name: Format(bits, 16) for name, bits in widths.items()})
    decoder = load_decoder(weights, config=EngineConfig(block_size=4))
    plain = serve(decoder, requests_of(4), monkeypatch, tape=False)
    taped = serve(decoder, requests_of(4), monkeypatch)
    assert taped.runner.taped_steps > 5
    same(taped, plain)


def test_preempted_and_computed_again(low_bit: Decoder, monkeypatch: pytest.MonkeyPatch) -> None:
    few = {"max_model_len": 40, "kv_bytes": 13 * 4 * TOKEN_BYTES}
    plain = serve(low_bit, requests_of(), monkeypatch, tape=False, **few)
    taped = serve(low_bit, requests_of(), monkeypatch, **few)
    assert taped.runner.num_blocks == 13
    assert taped.scheduler.num_preemptions > 0
    same(taped, plain)


@pytest.mark.parametrize("kv_type", ["float32", "bfloat16"])
def test_sampled_and_scored_rows(kv_type: str, low_bit: Decoder, monkeypatch: pytest.MonkeyPatch) -> None:
    params = {"temperature": 0.9, "top_k": 20, "top_p": 0.9, "logprobs": 2, "repetition_penalty": 1.2}
    plain = serve(low_bit, requests_of(4, **params), monkeypatch, tape=False, kv_type=kv_type)
    taped = serve(low_bit, requests_of(4, **params), monkeypatch, kv_type=kv_type)
    same(taped, plain)


MIXED: list[dict[str, Any]] = [
    {"temperature": 0.0},
    {"temperature": 1.0},
    {"temperature": 0.8, "top_k": 5},
    {"temperature": 1.3, "top_p": 0.7},
    {"temperature": 1.0, "min_p": 0.1, "top_k": 9, "top_p": 0.95},
    {"temperature": 1.0, "presence_penalty": 0.5},
    {"temperature": 1.0, "min_tokens": 4},
    {"temperature": 1.0, "logprobs": 1},
]


@pytest.mark.parametrize("threads", [1, 2])
def test_draws_on_the_tape(threads: int, low_bit: Decoder, monkeypatch: pytest.MonkeyPatch) -> None:
    def mixed() -> list[Request]:
        made = []
        for i, params in enumerate(MIXED):
            request = make_request(token_ids(3 + i, seed=i), id=str(i), max_tokens=6 + i, **params)
            request.seed = 1000003 * i
            made.append(request)
        return made

    plain = serve(low_bit, mixed(), monkeypatch, tape=False, threads=threads)
    taped = serve(low_bit, mixed(), monkeypatch, threads=threads)
    same(taped, plain)
    assert taped.runner.beside_tape.keys() == {"penalties", "logprobs"}
    # The rows before the first token of min_tokens are edited, those after it are not.
    assert taped.runner.beside_tape["penalties"] <= taped.runner.taped_steps * 2
    assert taped.runner.untaped.keys() <= {"prefill"}
    assert plain.runner.untaped.keys() == {"prefill", "no_tape"}


def test_nothing_is_drawn_after_the_tape_that_can_be_on_it(low_bit: Decoder, monkeypatch: pytest.MonkeyPatch) -> None:
    def never(*args: object) -> None:
        raise AssertionError("drawn beside the tape")

    runner = ModelRunner(low_bit, EngineConfig(block_size=4, max_num_seqs=2, threads=1))
    request = make_request(token_ids(1), id="one", temperature=1.0, top_k=7)
    request.block_ids = [0, 1]
    monkeypatch.setattr(sampler, "_drawn", never)
    monkeypatch.setattr(sampler, "_choose", never)
    for _ in range(5):
        result = runner.execute(Step((Chunk(request, request.num_computed, 1),)))
        request.num_computed += 1
        request.token_ids.append(result.sampled["one"].token_id)
    assert (runner.taped_steps, runner.untaped_steps) == (5, 0)


def test_what_is_no_decode_step_runs_op_by_op(low_bit: Decoder) -> None:
    runner = ModelRunner(low_bit, EngineConfig(block_size=4, max_num_seqs=2, threads=1))
    ids = token_ids(3)
    scored = make_request(ids, id="scored", prompt_logprobs=0)
    scored.block_ids = [0, 1]
    result = runner.execute(Step((Chunk(scored, 0, 1),)))
    assert [entry.token_id for entry in result.prompt_logprobs["scored"]] == ids[1:2]
    result = runner.execute(Step((Chunk(scored, 1, 1),)))
    assert [entry.token_id for entry in result.prompt_logprobs["scored"]] == ids[2:]
    assert (runner.taped_steps, runner.untaped_steps) == (0, 2)
    runner.execute(Step((Chunk(scored, 2, 1),)))
    assert (runner.taped_steps, runner.untaped_steps) == (1, 2)
    others = [make_request(token_ids(1, seed=i), id=str(i)) for i in range(3)]
    for i, request in enumerate(others):
        request.block_ids = [2 + i]
    chunks = tuple(Chunk(request, 0, 1) for request in others)
    assert set(runner.execute(Step(chunks)).sampled) == {"0", "1", "2"}
    assert (runner.taped_steps, runner.untaped_steps) == (1, 3)
    assert set(runner.execute(Step(chunks[:2])).sampled) == {"0", "1"}
    assert (runner.taped_steps, runner.untaped_steps) == (2, 3)


@pytest.mark.parametrize("kind", ["float weights", "float head"])
def test_a_model_with_torch_ops_has_no_tape(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    weights = weights_of(hf_model())
    if kind == "float head":
        weights = quantized(weights, Format(4, 16))
    decoder = load_decoder(weights, config=EngineConfig(block_size=4, head_bits=16))
    plain = serve(decoder, requests_of(3), monkeypatch, tape=False)
    other = serve(decoder, requests_of(3), monkeypatch)
    assert other.runner.taped_steps == 0
    same(other, plain)


def test_a_refused_op_is_named_and_the_next_step_is_fine(low_bit: Decoder) -> None:
    runner = ModelRunner(low_bit, EngineConfig(block_size=4, max_num_seqs=2, threads=1))
    request = make_request(token_ids(1))
    request.block_ids = [3, 1]
    expected = runner.execute(Step((Chunk(request, 0, 1),)))
    request.block_ids = [runner.num_blocks, 1]
    with pytest.raises(native.NativeError, match=r"dibit_rope_kv_write .*op 4 of a tape"):
        runner.execute(Step((Chunk(request, 0, 1),)))
    request.block_ids = [3, 1]
    assert runner.execute(Step((Chunk(request, 0, 1),))) == expected
    assert runner.taped_steps == 2


def test_few_tapes_are_kept(low_bit: Decoder, monkeypatch: pytest.MonkeyPatch) -> None:
    plain = serve(low_bit, requests_of(), monkeypatch, tape=False)
    monkeypatch.setattr(decode_tape, "MAX_TAPES", 2)
    taped = serve(low_bit, requests_of(), monkeypatch)
    same(taped, plain)
    tapes = taped.runner._tapes
    assert tapes is not None
    assert sum(count in tapes for count in range(1, 6)) == 2


def test_the_memory_plan_has_room_for_the_workspace(low_bit: Decoder, monkeypatch: pytest.MonkeyPatch) -> None:
    served = serve(low_bit, requests_of(), monkeypatch)
    tapes, config = served.runner._tapes, served.runner.config
    assert tapes is not None
    assert 0 < tapes.workspace.nbytes < activation_bytes(low_bit.sizes, config, max_model_len=128)
