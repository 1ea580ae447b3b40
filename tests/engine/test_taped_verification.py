"""Steps that verify drafts, replayed from tapes: the logits and tokens of the ordinary path, bit for bit."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from tiny_models import VOCAB, hf_model, make_request, quantized, token_ids, weights_of
from torch import Tensor

from dibit.engine import runner as runner_module
from dibit.engine.config import EngineConfig
from dibit.engine.loader import load_decoder
from dibit.engine.models.decoder import Decoder
from dibit.engine.request import Request
from dibit.engine.runner import ModelRunner
from dibit.engine.step import Chunk, Step
from dibit.engine.verification import verify
from dibit.kernels import native
from dibit.kernels.formats import Format

pytestmark = pytest.mark.skipif(native.unavailable() is not None, reason="C++ kernels not built")

STEPS = 9
ASKED: list[dict[str, Any]] = [
    {"temperature": 0.0},
    {"temperature": 1.0, "top_k": 12},
    {"temperature": 1.0, "presence_penalty": 0.5},
    {"temperature": 1.0, "min_tokens": 5},
    {"temperature": 0.0, "min_tokens": 3},
]


@pytest.fixture(scope="module")
def decoder() -> Decoder:
    return load_decoder(quantized(weights_of(hf_model()), Format(4, 16)), config=EngineConfig(block_size=4))


@dataclass
class Heard:
    runner: ModelRunner
    tokens: dict[str, list[int]] = field(default_factory=dict)
    logits: list[Tensor] = field(default_factory=list)


def requests() -> list[Request]:
    made = []
    for i, params in enumerate(ASKED):
        request = make_request(token_ids(5 + 3 * i, seed=i), id=str(i), max_tokens=60, **params)
        request.eos_ids = frozenset(range(0, VOCAB, 3))
        request.seed = 10007 * i
        request.block_ids = list(range(20 * i, 20 * i + 20))[::-1]
        made.append(request)
    return made


def run(
    decoder: Decoder,
    monkeypatch: pytest.MonkeyPatch,
    *,
    known: dict[str, list[int]] | None = None,
    **settings: Any,
) -> Heard:
    """Prompts, then steps with drafts: `known` tokens, of which every third draft of three is spoilt."""
    config = EngineConfig(
        block_size=4, max_num_seqs=5, threads=2, speculative="ngram", kv_bytes=200 * 4 * 128, **settings
    )
    runner = ModelRunner(decoder, config)
    for tensor in runner.cache.k + runner.cache.v:
        tensor.fill_(float("nan"))
    heard = Heard(runner)

    def remember(logits: Tensor, *args: Any, **named: Any) -> Any:
        heard.logits.append(logits.clone())
        return verify(logits, *args, **named)

    monkeypatch.setattr(runner_module, "verify", remember)
    running = requests()
    for number in range(STEPS):
        chunks = []
        for i, request in enumerate(running):
            drafts: list[int] = []
            if number and known is not None:
                drafts = known[request.id][request.num_output : request.num_output + (number + i) % 4]
                if len(drafts) == 3:
                    drafts[1] = (drafts[1] + 1) % VOCAB
            chunks.append(
                Chunk(request, request.num_computed, request.num_tokens - request.num_computed, tuple(drafts))
            )
        result = runner.execute(Step(tuple(chunks)))
        assert not result.failed
        for request in running:
            further = [token.token_id for token in result.further.get(request.id, ())]
            request.num_computed = request.num_tokens + len(further)
            request.token_ids += [result.sampled[request.id].token_id, *further]
    heard.tokens = {request.id: request.output_ids for request in running}
    return heard


def test_drafts_on_the_tape(decoder: Decoder, monkeypatch: pytest.MonkeyPatch) -> None:
    alone = {}
    for request in requests():
        runner = ModelRunner(decoder, EngineConfig(block_size=4, max_num_seqs=1, threads=1, kv_bytes=200 * 4 * 128))
        while request.num_output < 40:
            count = request.num_tokens - request.num_computed
            result = runner.execute(Step((Chunk(request, request.num_computed, count),)))
            request.num_computed += count
            request.token_ids.append(result.sampled[request.id].token_id)
        alone[request.id] = request.output_ids
    plain = run(decoder, monkeypatch, known=alone, tape=False)
    taped = run(decoder, monkeypatch, known=alone)
    assert dict(taped.runner.step_counts.untaped) == {"prefill": 1}
    assert taped.runner.step_counts.taped == STEPS - 1
    assert dict(plain.runner.step_counts.untaped) == {"prefill": 1, "no_tape": STEPS - 1}
    assert len(plain.logits) > 3 * STEPS
    assert all(torch.equal(a, b) for a, b in zip(taped.logits, plain.logits, strict=True))
    assert taped.tokens == plain.tokens
    for name, tokens in taped.tokens.items():
        assert tokens == alone[name][: len(tokens)]
    assert max(map(len, taped.tokens.values())) > STEPS + 4


def test_a_step_larger_than_a_tape_runs_op_by_op(decoder: Decoder) -> None:
    config = EngineConfig(
        block_size=4, max_num_seqs=1, threads=1, speculative="ngram", num_speculative_tokens=2, kv_bytes=60 * 4 * 128
    )
    runner = ModelRunner(decoder, config)
    request = make_request(token_ids(1), id="one")
    request.block_ids = [1, 2]
    for drafts in ((3, 4), (3, 4, 5)):
        runner.execute(Step((Chunk(request, 0, 1, drafts),)))
    assert runner.step_counts.taped == 1
    assert dict(runner.step_counts.untaped) == {"rows": 1}


def test_two_tokens_and_a_draw_are_on_the_tape(decoder: Decoder) -> None:
    """What a draft model reads after all that it proposed was accepted."""
    found = []
    for tape in (True, False):
        config = EngineConfig(
            block_size=4, max_num_seqs=2, threads=1, tape=tape, speculative="ngram", kv_bytes=60 * 4 * 128
        )
        runner = ModelRunner(decoder, config)
        pair = [make_request(token_ids(1 + i, seed=i), id=str(i), temperature=0.9, seed=1) for i in range(2)]
        for i, request in enumerate(pair):
            request.block_ids = [1 + i]
        found.append(runner.execute(Step(tuple(Chunk(request, 0, request.num_tokens) for request in pair))))
        assert runner.step_counts.taped == tape
    assert found[0] == found[1]
