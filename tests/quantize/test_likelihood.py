"""What task suites ask of a model, against plain torch."""

from __future__ import annotations

import math
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from thread_pools import threads_put_back
from torch import Tensor
from transformers import LlamaForCausalLM

from dibit.engine.build import build_core
from dibit.engine.config import EngineConfig, SamplingParams
from dibit.engine.errors import UserError
from dibit.engine.llm import LLM
from dibit.quantize import likelihood
from dibit.quantize.likelihood import Continuation, Writing, first_token, likelihoods, text_likelihoods, write


@pytest.fixture(scope="module")
def llm(tiny: Path) -> Iterator[LLM]:
    config = EngineConfig(backend="reference", block_size=4, max_batch_tokens=16, max_num_seqs=3, threads=1)
    with threads_put_back(), LLM.of(build_core(tiny, config)) as llm:
        yield llm


@pytest.fixture(scope="module")
def oracle(tiny: Path) -> LlamaForCausalLM:
    return LlamaForCausalLM.from_pretrained(tiny).eval()


def logprobs(oracle: LlamaForCausalLM, tokens: tuple[int, ...]) -> Tensor:
    """[T - 1, V]"""
    with torch.no_grad():
        return torch.log_softmax(oracle(torch.tensor([tokens])).logits[0, :-1], -1)


def expected(oracle: LlamaForCausalLM, one: Continuation, *, limit: int) -> tuple[float, bool]:
    tokens = (*one.context, *one.tokens)[-limit:]
    rows = logprobs(oracle, tokens)[-len(one.tokens) :]
    targets = torch.tensor(one.tokens)
    return float(rows.gather(1, targets[:, None]).sum()), bool((rows.argmax(1) == targets).all())


def test_continuations(llm: LLM, oracle: LlamaForCausalLM, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(likelihood, "GROUP", 4)
    rng = torch.Generator().manual_seed(0)

    def draw(count: int) -> tuple[int, ...]:
        return tuple(torch.randint(2, 96, (count,), generator=rng).tolist())

    asked = [Continuation(draw(c), draw(t)) for c, t in ((1, 1), (5, 2), (30, 9), (12, 1), (80, 3), (60, 5))]
    likeliest = logprobs(oracle, (*asked[1].context, 7)).argmax(-1)[-1]
    asked += [Continuation(asked[1].context, (int(likeliest),)), asked[2]]
    # The same tokens, cut elsewhere.
    asked.append(Continuation((*asked[2].context, asked[2].tokens[0]), asked[2].tokens[1:]))
    heard: list[tuple[int, int]] = []
    found = likelihoods(llm, asked, progress=lambda done, total: heard.append((done, total)))
    for one, own in zip(asked, found, strict=True):
        logprob, greedy = expected(oracle, one, limit=llm.max_model_len)
        assert own.logprob == pytest.approx(logprob, rel=1e-4)
        assert own.greedy == greedy
    assert found[6].greedy
    assert not found[1].greedy
    assert heard == [(4, 7), (7, 7)]


def test_what_cannot_be_scored(llm: LLM) -> None:
    for one in (Continuation((), (3,)), Continuation((3,), ()), Continuation((3,), (4,) * llm.max_model_len)):
        with pytest.raises(UserError):
            likelihoods(llm, [one])


def test_texts_longer_than_the_context_predict_every_token_once(llm: LLM, oracle: LlamaForCausalLM) -> None:
    first = first_token(llm.tokenizer)
    assert first == 1  # no BOS in this tokenizer, so its end of text
    length = llm.max_model_len - 1
    text = tuple(2 + i * 7 % 90 for i in range(2 * length + 5))
    short = text[:3]
    pieces = [
        (first, *text[:length]),
        text[length - 1 : 2 * length],
        text[2 * length - 1 :],
    ]
    wanted = 0.0
    for piece in pieces:
        rows = logprobs(oracle, piece)
        wanted += float(rows.gather(1, torch.tensor(piece[1:])[:, None]).sum())
    alone = logprobs(oracle, (first, *short)).gather(1, torch.tensor(short)[:, None]).sum()
    assert text_likelihoods(llm, [text, short, ()]) == [
        pytest.approx(wanted, rel=1e-4),
        pytest.approx(float(alone), rel=1e-4),
        0.0,
    ]


def test_writing_keeps_the_end_of_a_long_prompt(llm: LLM, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(likelihood, "GROUP", 2)
    greedy = SamplingParams(max_tokens=6, temperature=0.0)
    long = tuple(2 + i * 5 % 90 for i in range(100))
    texts = write(llm, [Writing(long, greedy), Writing((5, 6), greedy), Writing(long[-58:], greedy)])
    assert texts[0] == texts[2]
    assert texts[1] == llm.generate([5, 6], greedy)[0].text
    stop = texts[1].split()[1]
    [cut] = write(llm, [Writing((5, 6), SamplingParams(max_tokens=6, temperature=0.0, stop=(stop,)))])
    assert stop not in cut
    assert texts[1].startswith(cut)
    with pytest.raises(UserError, match="--max-model-len"):
        write(llm, [Writing((5,), SamplingParams(max_tokens=llm.max_model_len))])


def test_greedy_means_likeliest(llm: LLM) -> None:
    [own] = likelihoods(llm, [Continuation((5, 6), tuple(llm.generate([5, 6], SamplingParams(
        max_tokens=3, temperature=0.0))[0].token_ids))])  # fmt: skip
    assert own.greedy
    assert math.isfinite(own.logprob)
