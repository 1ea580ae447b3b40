"""A prompt computed some layers a step: the logits, log-probabilities and keys of one computed at once, bit for bit."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch
from tiny_models import BACKENDS, hf_model, make_request, quantized, token_ids, weights_of
from torch import Tensor

from dibit.engine import sampler
from dibit.engine.config import EngineConfig
from dibit.engine.loader import load_decoder
from dibit.engine.models.decoder import Decoder
from dibit.engine.request import Request
from dibit.engine.runner import ModelRunner
from dibit.engine.step import Chunk, Sampled, Step, StepResult
from dibit.kernels.formats import Format

LAYERS, BLOCK = 5, 4
CUTS = [(0, 1), (1, 4), (4, None)]


@pytest.fixture(scope="module", params=BACKENDS)
def decoder(request: pytest.FixtureRequest) -> Decoder:
    weights = weights_of(hf_model(num_hidden_layers=LAYERS))
    if request.param == "cpu":
        weights = quantized(weights, Format(4, 16))
    return load_decoder(weights, config=EngineConfig(block_size=BLOCK, backend=request.param))


class Watched:
    """A runner, and every row of logits that it chose from."""

    def __init__(self, decoder: Decoder) -> None:
        self.logits: list[Tensor] = []
        config = EngineConfig(block_size=BLOCK, threads=1, backend="auto" if decoder.quantized else "reference")
        self.runner = ModelRunner(decoder, config, choose=self._choose)
        for layer in range(LAYERS):
            self.runner.cache.k[layer].fill_(0)
            self.runner.cache.v[layer].fill_(0)

    def _choose(self, logits: Tensor, requests: list[Request], **known: Any) -> list[Sampled | Exception]:
        self.logits += [row.clone() for row in logits]
        return sampler.sample(logits, requests, **known)

    def run(self, *chunks: Chunk) -> StepResult:
        return self.runner.execute(Step(chunks))

    def same_cache(self, other: Watched) -> bool:
        own, its = self.runner.cache, other.runner.cache
        return all(torch.equal(a, b) for a, b in zip((*own.k, *own.v), (*its.k, *its.v), strict=True))


def prompt(count: int = 23, *, seed: int = 1, block: int = 0, **params: Any) -> Request:
    request = make_request(token_ids(count, seed=seed), id=f"p{seed}", **params)
    request.block_ids = list(range(block, block + 10))
    return request


def slices(request: Request, start: int, count: int) -> list[Chunk]:
    return [Chunk(request, start, count, first_layer=first, last_layer=last) for first, last in CUTS]


@pytest.mark.parametrize("start", [0, 9])
def test_in_slices_as_at_once(decoder: Decoder, start: int) -> None:
    results, runs = [], []
    for cut in (False, True):
        run, request = Watched(decoder), prompt(prompt_logprobs=2)
        if start:
            run.run(Chunk(request, 0, start))
        parts = slices(request, start, 23 - start) if cut else [Chunk(request, start, 23 - start)]
        *early, last = [run.run(part) for part in parts]
        assert all(result == StepResult({}) for result in early)
        results.append(last)
        runs.append(run)
    assert results[0] == results[1]
    assert torch.equal(runs[0].logits[0], runs[1].logits[0])
    assert runs[0].same_cache(runs[1])


def test_a_chunk_that_ends_within_the_prompt_says_nothing(decoder: Decoder) -> None:
    whole, cut = Watched(decoder), Watched(decoder)
    request = prompt()
    whole.run(Chunk(request, 0, 10))
    whole.run(Chunk(request, 10, 13))
    for part in (*slices(request, 0, 10), *slices(request, 10, 13)):
        result = cut.run(part)
        assert bool(result.sampled) == (part.stop == 23 and part.last_layer is None)
    assert torch.equal(whole.logits[0], cut.logits[0])
    assert whole.same_cache(cut)


def test_beside_requests_that_decode(decoder: Decoder) -> None:
    found = []
    for cut in (False, True):
        run, long = Watched(decoder), prompt()
        others = [prompt(5 + i, seed=2 + i, block=10 + 10 * i) for i in range(2)]
        for other in others:
            other.token_ids.append(run.run(Chunk(other, 0, other.num_tokens)).sampled[other.id].token_id)
        run.logits.clear()
        tokens: list[int] = []
        for part in slices(long, 0, 23):
            chunks = [Chunk(other, other.num_tokens - 1, 1) for other in others]
            result = run.run(*chunks, *([part] if cut else []))
            for other in others:
                other.token_ids.append(result.sampled[other.id].token_id)
        if not cut:
            result = run.run(Chunk(long, 0, 23))
        tokens = [token for request in others for token in request.output_ids]
        found.append((tokens, result.sampled[long.id], run))
    assert found[0][:2] == found[1][:2]
    assert found[0][2].same_cache(found[1][2])
    taped = decoder.quantized
    assert found[1][2].runner.step_counts.taped == (len(CUTS) if taped else 0)


def test_a_slice_may_be_run_again(decoder: Decoder) -> None:
    once, again = Watched(decoder), Watched(decoder)
    once.run(Chunk(prompt(), 0, 23))
    for part in slices(request := prompt(), 0, 23):
        for _ in range(3):
            again.run(part)
    assert request.num_computed == 0
    assert all(torch.equal(once.logits[0], row) for row in again.logits)
    assert len(again.logits) == 3
    assert once.same_cache(again)


def test_another_prompt_takes_the_place_of_one_that_is_not_done(decoder: Decoder) -> None:
    run, plain, first, second = Watched(decoder), Watched(decoder), prompt(), prompt(9, seed=5, block=10)
    left, *rest = slices(first, 0, 23)
    run.run(left)
    for part in slices(second, 0, 9):
        run.run(part)
    plain.run(Chunk(prompt(9, seed=5, block=10), 0, 9))
    assert torch.equal(plain.logits[0], run.logits[0])
    with pytest.raises(RuntimeError, match="layer 1 of tokens 0 to 23"):
        run.run(rest[0])


def test_layers_out_of_order_are_refused(decoder: Decoder) -> None:
    run, request = Watched(decoder), prompt()
    first, second, third = slices(request, 0, 23)
    run.run(first)
    with pytest.raises(RuntimeError, match="layer 4"):
        run.run(third)
    run.run(second)
    for other in (dataclasses.replace(third, count=22), dataclasses.replace(third, request=prompt())):
        with pytest.raises(RuntimeError, match="layer 4"):
            run.run(other)
    assert run.run(third).sampled
