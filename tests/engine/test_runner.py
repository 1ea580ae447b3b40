"""The runner against transformers' greedy text, and what it does with rows, faults, memory and threads."""

from __future__ import annotations

import logging
from typing import Any

import pytest
import torch
from tiny_models import BACKENDS, hf_model, make_request, oracle_logits, quantized, token_ids, weights_of
from torch import Tensor

from dibit.engine.config import EngineConfig
from dibit.engine.errors import ConfigError
from dibit.engine.loader import load_decoder
from dibit.engine.request import Request
from dibit.engine.runner import ModelRunner
from dibit.engine.step import Chunk, Step, StepResult
from dibit.kernels import native
from dibit.kernels.formats import Format


def make_runner(model: Any = None, **settings: Any) -> ModelRunner:
    config = EngineConfig(**{"backend": "reference", "block_size": 4, "max_num_seqs": 4, "threads": 1, **settings})
    weights = weights_of(model or hf_model())
    return ModelRunner(load_decoder(weights, config=config), config)


def allot(runner: ModelRunner, *requests: Request) -> None:
    """Blocks for the longest that each may become, handed out in turn."""
    free = iter(range(runner.num_blocks))
    needed = [-(-(request.num_prompt + request.max_tokens) // runner.block_size) for request in requests]
    for i in range(max(needed)):
        for request, count in zip(requests, needed, strict=True):
            if i < count:
                request.block_ids.append(next(free))


def advance(runner: ModelRunner, requests: list[Request], *, chunk: int = 1 << 30) -> StepResult:
    """One step of every request that has not finished: its next tokens, at most `chunk` of them."""
    chunks = [Chunk(r, r.num_computed, min(chunk, r.num_tokens - r.num_computed)) for r in requests]
    result = runner.execute(Step(tuple(chunks)))
    for piece in chunks:
        request = piece.request
        samples = piece.samples
        request.num_computed = piece.stop
        if samples and request.id in result.sampled:
            request.token_ids.append(result.sampled[request.id].token_id)
    return result


@pytest.mark.parametrize("backend", BACKENDS)
def test_greedy_tokens_are_those_of_transformers(backend: Any) -> None:
    model = hf_model()
    runner = make_runner(model, backend=backend)
    requests = [make_request(token_ids(n, seed=n), id=str(n), max_tokens=12) for n in (1, 5, 30)]
    allot(runner, *requests)
    for _ in range(30):
        unfinished = [r for r in requests if r.num_output < 12]
        if unfinished:
            advance(runner, unfinished, chunk=7)
    for request in requests:
        expected = list(request.prompt_ids)
        for _ in range(12):
            expected.append(int(oracle_logits(model, expected)[-1].argmax()))
        assert request.token_ids == expected


def test_prompt_logprobs_are_those_of_transformers_in_any_slices_and_chunks() -> None:
    model = hf_model()
    ids = token_ids(19)
    expected = oracle_logits(model, ids).log_softmax(-1)
    for rows_per_slice, chunk in ((1000, 100), (3, 100), (1000, 5), (2, 7)):
        runner = make_runner(model)
        runner._rows_per_slice = rows_per_slice
        request, other = make_request(ids, id="a", prompt_logprobs=2), make_request(token_ids(9), id="b")
        allot(runner, request, other)
        found = []
        while request.num_output < 2:
            live = [other, request] if other.num_output < 3 else [request]
            result = advance(runner, live, chunk=chunk)
            found += result.prompt_logprobs.get("a", ())
            assert "b" not in result.prompt_logprobs
        assert [entry.token_id for entry in found] == ids[1:]
        for position, entry in enumerate(found):
            row = expected[position]
            assert entry.logprob == pytest.approx(float(row[entry.token_id]), abs=1e-3)
            assert entry.top[0][0] == int(row.argmax())
            assert len(entry.top) == 2


def test_only_rows_that_need_logits_reach_the_head() -> None:
    runner = make_runner()
    rows: list[int] = []
    head = runner.decoder.head

    def counting(hidden: Tensor) -> Tensor:
        rows.append(hidden.shape[0])
        return head(hidden)

    runner.decoder.head = counting
    a, b = make_request(token_ids(20), id="a"), make_request(token_ids(3), id="b")
    allot(runner, a, b)
    result = runner.execute(Step((Chunk(a, 0, 10),)))
    assert result == StepResult({}, {}, {})
    assert rows == []
    result = runner.execute(Step((Chunk(a, 10, 10), Chunk(b, 0, 3))))
    assert rows == [2]
    assert set(result.sampled) == {"a", "b"}


def test_a_row_that_cannot_be_sampled_fails_alone() -> None:
    runner = make_runner()
    head = runner.decoder.head

    def poisoned(hidden: Tensor) -> Tensor:
        logits = head(hidden)
        logits[1] = float("nan")
        return logits

    runner.decoder.head = poisoned
    requests = [make_request(token_ids(4, seed=i), id=str(i)) for i in range(3)]
    allot(runner, *requests)
    result = advance(runner, requests)
    assert set(result.sampled) == {"0", "2"}
    assert set(result.failed) == {"1"}


def test_a_token_outside_the_vocabulary_raises() -> None:
    for backend in ["reference"] + ([] if native.unavailable() else ["cpu"]):
        config = EngineConfig(backend=backend, block_size=4)  # type: ignore[arg-type]
        for weights in (weights_of(hf_model()), quantized(weights_of(hf_model()), Format(4, 16))):
            runner = ModelRunner(load_decoder(weights, config=config), config)
            request = make_request([3, 97])
            allot(runner, request)
            with pytest.raises(IndexError):
                advance(runner, [request])


def test_many_rows_are_sampled_in_slices() -> None:
    whole, sliced = make_runner(), make_runner()
    sliced._rows_per_slice = 2
    texts = []
    for runner in (whole, sliced):
        requests = [make_request(token_ids(6, seed=i), id=str(i), temperature=1.0) for i in range(5)]
        allot(runner, *requests)
        for _ in range(4):
            advance(runner, requests)
        texts.append([r.output_ids for r in requests])
    assert texts[0] == texts[1]


def test_warming_up_writes_nothing() -> None:
    runner = make_runner()
    assert runner.warm_up() > 0
    assert not any(bool(tensor.any()) for tensor in runner.cache.k + runner.cache.v)


def test_the_cache_holds_what_the_settings_ask_for() -> None:
    runner = make_runner(max_model_len=30, max_num_seqs=3, max_batch_tokens=8)
    assert (runner.max_model_len, runner.block_size, runner.num_blocks) == (30, 4, 24)
    assert runner.cache.k[0].dtype == torch.float32
    token_bytes = 2 * 2 * 16 * 4
    assert make_runner(kv_bytes=token_bytes * 4 * 40).num_blocks == 40
    half = make_runner(kv_bytes=token_bytes * 4 * 40, kv_type="bfloat16")
    assert (half.num_blocks, half.cache.v[1].dtype) == (80, torch.bfloat16)


def test_low_bit_models_keep_their_cache_in_float16() -> None:
    config = EngineConfig(backend="reference", block_size=4)
    runner = ModelRunner(load_decoder(quantized(weights_of(hf_model()), Format(4, 16)), config=config), config)
    assert runner.cache.k[0].dtype == torch.float16


def test_a_context_that_does_not_fit_is_shortened_and_said_so(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        runner = make_runner(kv_bytes=256 * 4 * 10)
    assert (runner.max_model_len, runner.num_blocks) == (40, 10)
    assert "one sequence of 128 tokens needs" in caplog.text
    assert "limited to 40 tokens" in caplog.text


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"max_model_len": 129}, "max_model_len is 129; this model supports up to 128"),
        ({"max_model_len": 100, "kv_bytes": 256 * 4 * 10}, "room for 40 tokens"),
        ({"kv_bytes": 100}, "room for 0 tokens"),
        ({"kv_bytes": 1 << 60}, "bytes are free"),
    ],
    ids=str,
)
def test_a_cache_that_cannot_be_is_refused(settings: dict[str, Any], words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        make_runner(**settings)


@pytest.mark.skipif(native.unavailable() is not None, reason="C++ kernels not built")
def test_one_pool_of_threads_works_at_a_time() -> None:
    config = EngineConfig(threads=3, block_size=4)
    low = load_decoder(quantized(weights_of(hf_model()), Format(4, 16)), config=config)
    assert ModelRunner(low, config).threads == 3
    assert (native.threads(), torch.get_num_threads()) == (3, 1)
    make_runner(threads=2, backend="auto")
    assert torch.get_num_threads() == 2
