"""Decode steps replayed from graphs, with a stand-in for CUDA's on the CPU: the tokens of the ordinary path."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from served_steps import Repeated, requests_of, same, serve
from tiny_models import hf_model, make_request, quantized, token_ids, weights_of

from dibit.engine import decode_graph
from dibit.engine.config import EngineConfig
from dibit.engine.decode_graph import LEAST_KEYS, DecodeGraphs, row_bucket, table_bucket
from dibit.engine.loader import load_decoder
from dibit.engine.models.decoder import Decoder
from dibit.engine.request import Request
from dibit.engine.runner import ModelRunner
from dibit.kernels import native
from dibit.kernels.formats import Format

pytestmark = pytest.mark.skipif(native.unavailable() is not None, reason="C++ kernels not built")


@pytest.fixture(scope="module")
def low_bit() -> Decoder:
    return load_decoder(quantized(weights_of(hf_model()), Format(4, 16)), config=EngineConfig(block_size=4))


def test_tokens_of_the_ordinary_path(low_bit: Decoder, monkeypatch: pytest.MonkeyPatch) -> None:
    repeated = Repeated()
    plain = serve(low_bit, requests_of(), monkeypatch, tape=False)
    graphed = serve(low_bit, requests_of(), monkeypatch, capture=repeated)
    same(graphed, plain)
    assert graphed.runner.taped_steps > graphed.runner.untaped_steps
    # One for 1 to 5 rows each; the last step's length of 16 or so fits the narrowest tables.
    assert repeated.captures == len(set(graphed.batches) & {1, 2, 3, 4, 5})
    assert repeated.replays == graphed.runner.taped_steps


def test_rows_that_pad(low_bit: Decoder, monkeypatch: pytest.MonkeyPatch) -> None:
    """Eleven sequences decode in a graph of twelve rows, nine in one of ten, where steps before left their numbers."""

    def requests() -> list[Request]:
        return [make_request(token_ids(3, seed=i), id=str(i), max_tokens=60 - 4 * i) for i in range(11)]

    plain = serve(low_bit, requests(), monkeypatch, tape=False, max_num_seqs=11)
    repeated = Repeated()
    graphed = serve(low_bit, requests(), monkeypatch, capture=repeated, max_num_seqs=11)
    same(graphed, plain)
    assert set(graphed.batches) == set(range(1, 12))
    assert repeated.captures == 10


@pytest.mark.parametrize("params", [{"temperature": 0.8, "top_p": 0.9}, {"frequency_penalty": 0.5}, {"logprobs": 2}])
def test_rows_whose_token_is_not_the_highest(
    params: dict[str, Any], low_bit: Decoder, monkeypatch: pytest.MonkeyPatch
) -> None:
    plain = serve(low_bit, requests_of(**params), monkeypatch, tape=False)
    same(serve(low_bit, requests_of(**params), monkeypatch, capture=Repeated()), plain)


def test_longer_sequences_get_wider_tables(low_bit: Decoder, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(decode_graph, "LEAST_KEYS", 8)
    plain = serve(low_bit, requests_of(), monkeypatch, tape=False)
    repeated = Repeated()
    graphed = serve(low_bit, requests_of(), monkeypatch, capture=repeated)
    same(graphed, plain)
    assert repeated.captures > 5


def test_few_graphs_are_kept(low_bit: Decoder, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(decode_graph, "MAX_GRAPHS", 2)
    plain = serve(low_bit, requests_of(), monkeypatch, tape=False)
    graphed = serve(low_bit, requests_of(), monkeypatch, capture=Repeated())
    same(graphed, plain)
    graphs = graphed.runner._tapes
    assert isinstance(graphs, DecodeGraphs)
    assert len(graphs) == 2


def test_a_refused_capture_computes_step_by_step(
    low_bit: Decoder, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def refuse(run: Callable[[], None]) -> Callable[[], None]:
        raise RuntimeError("operation not permitted when stream is capturing")

    plain = serve(low_bit, requests_of(), monkeypatch, tape=False)
    with caplog.at_level("INFO"):
        served = serve(low_bit, requests_of(), monkeypatch, capture=refuse)
    same(served, plain)
    assert served.runner.taped_steps == 0
    assert "not permitted when stream is capturing" in caplog.text


def test_warming_up_captures_every_number_of_rows(low_bit: Decoder, monkeypatch: pytest.MonkeyPatch) -> None:
    repeated = Repeated()
    runner = ModelRunner(
        low_bit, EngineConfig(block_size=4, max_num_seqs=12, threads=1), free_bytes=1 << 22, capture=repeated
    )
    before = [cache.clone() for cache in (*runner.cache.k, *runner.cache.v)]
    runner.warm_up()
    assert repeated.captures == len({row_bucket(count) for count in range(1, 13)})
    assert all(map(torch.equal, before, (*runner.cache.k, *runner.cache.v)))


@given(st.integers(1, 5000))
def test_row_buckets(count: int) -> None:
    rows = row_bucket(count)
    assert count <= rows <= max(count, count * 5 / 4)
    assert row_bucket(rows) == rows


@given(st.integers(1, 1 << 20), st.sampled_from([1, 16, 48]))
def test_table_buckets(keys: int, block_size: int) -> None:
    width = -(-(1 << 20) // block_size)
    entries = table_bucket(keys, block_size=block_size, width=width)
    assert keys <= entries * block_size <= max(LEAST_KEYS, 2 * keys) + block_size
    assert table_bucket(keys, block_size=block_size, width=3) <= 3
