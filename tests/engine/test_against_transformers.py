"""The demo model in this engine and in transformers: the same greedy tokens, and the same perplexity."""

from __future__ import annotations

import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from dibit.bench.oracle import transformers_model
from dibit.engine.checkpoint import resolve_model
from dibit.engine.config import SamplingParams
from dibit.engine.llm import LLM

pytestmark = pytest.mark.demo

LENGTH = 64
PROMPTS = (
    "The capital of France is",
    "Once upon a time, in a small village,",
    "Water boils at a temperature of",
    "The three primary colors are",
    "def fibonacci(n):",
    "Dear Sir or Madam,",
    "To make a good cup of tea, you need",
    "The theory of relativity was developed by",
    "In the year 1969,",
    "My favourite animal is the",
    "SELECT name FROM users WHERE",
    "The largest planet in the solar system",
    "Q: What is 7 times 8?\nA:",
    "Photosynthesis is the process by which",
    "import numpy as np\n\n",
    "The quick brown fox",
    "Im Jahr 1989 fiel die Berliner",
    "A list of fruits:\n1. Apple\n2.",
    "She opened the door and saw",
    "The square root of 144 is",
)


@pytest.fixture(scope="module")
def judge() -> Any:
    return transformers_model(resolve_model("demo"))


@pytest.fixture(scope="module")
def llm() -> Iterator[LLM]:
    with LLM("demo", max_model_len=512, threads=1) as demo:
        yield demo


@torch.inference_mode()
def test_greedy_tokens(llm: LLM, judge: Any) -> None:
    """Each token is transformers' choice given the ones before it, which is to say: its greedy text."""
    params = SamplingParams(temperature=0.0, max_tokens=LENGTH, ignore_eos=True)
    prompts = [llm.tokenizer.encode(prompt) for prompt in PROMPTS]
    for prompt, completion in zip(prompts, llm.generate(prompts, params), strict=True):
        said = list(completion.token_ids)
        logits = judge(torch.tensor([prompt + said])).logits[0, len(prompt) - 1 : -1]
        assert said == logits.argmax(dim=-1).tolist()


def scored_by(judge: Any, ids: list[int]) -> float:
    """Mean negative log-likelihood of ids[1:]."""
    logits = judge(torch.tensor([ids])).logits[0, :-1].float()
    return float(torch.nn.functional.cross_entropy(logits, torch.tensor(ids[1:])))


@torch.inference_mode()
def test_perplexity_of_the_float_model(llm: LLM, judge: Any) -> None:
    ids = llm.tokenizer.encode(" ".join(PROMPTS))[:200]
    ours = math.exp(-math.fsum(llm.score(ids)) / (len(ids) - 1))
    assert ours == pytest.approx(math.exp(scored_by(judge, ids)), rel=1e-3)


@torch.inference_mode()
def test_perplexity_at_4_bits_is_that_of_the_dequantized_weights(low_bit_demo: Path) -> None:
    with LLM(low_bit_demo, max_model_len=512, threads=1) as packed:
        ids = packed.tokenizer.encode(" ".join(PROMPTS))[:200]
        ours = math.exp(-math.fsum(packed.score(ids)) / (len(ids) - 1))
    # Int8 activations and the 8-bit head are all that differs; a text this short feels them more than a long one.
    assert ours == pytest.approx(math.exp(scored_by(transformers_model(low_bit_demo), ids)), rel=0.02)
