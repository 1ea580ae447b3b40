"""Perplexity and divergence through the engine, against plain torch on the same weights."""

from __future__ import annotations

import dataclasses
import json
import shutil
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest
import torch
from thread_pools import threads_put_back
from torch import Tensor
from transformers import LlamaForCausalLM

from dibit.engine.build import build_core
from dibit.engine.checkpoint import open_checkpoint
from dibit.engine.config import EngineConfig
from dibit.engine.errors import ConfigError, UserError
from dibit.engine.llm import LLM
from dibit.kernels.formats import QTensor, dequantize
from dibit.quantize import quantize_checkpoint
from dibit.quantize.divergence import ROWS, compare, divergence
from dibit.quantize.evaluate import perplexity, text_windows
from dibit.quantize.reference import StreamedReference
from dibit.quantize.streams import StreamConfig

CONTEXT = 24
# Nothing is rounded beside the weights of the blocks, so that transformers computes the same.
CONFIG = EngineConfig(
    backend="reference",
    block_size=4,
    max_batch_tokens=10,
    max_num_seqs=2,
    kv_type="float32",
    head_bits=16,
    threads=1,
)


@pytest.fixture(autouse=True)
def _threads() -> Iterator[None]:
    with threads_put_back():
        yield


def llm(path: Path, **settings: Any) -> LLM:
    return LLM.of(build_core(path, dataclasses.replace(CONFIG, **settings)))


@pytest.fixture(scope="module")
def low(tiny: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("low") / "out"
    quantize_checkpoint(str(tiny), out, method="rtn", bits=3, group_size=32)
    return out


@pytest.fixture
def short(text: Path, tmp_path: Path) -> Path:
    path = tmp_path / "short.txt"
    path.write_text(" ".join(text.read_text().split()[:200]))
    return path


def oracle_logits(tiny: Path, low: Path | None, windows: list[list[int]]) -> Tensor:
    """[windows, context - 1, V], by transformers on float or dequantized weights."""
    model = LlamaForCausalLM.from_pretrained(tiny).eval()
    if low is not None:
        checkpoint = open_checkpoint(low)
        for name, module in model.named_modules():
            if isinstance(module, torch.nn.Linear) and name != "lm_head":
                own = checkpoint.linear(name)
                assert isinstance(own, QTensor)
                module.weight.data = dequantize(own)
        checkpoint.close()
    with torch.no_grad():
        return model(torch.tensor(windows)).logits[:, :-1]


@pytest.mark.parametrize("other_batch", [10, 7])
def test_divergence_is_that_of_plain_torch(tiny: Path, low: Path, short: Path, other_batch: int) -> None:
    heard: list[tuple[int, int]] = []
    with llm(low, max_batch_tokens=other_batch) as model, llm(tiny) as reference:
        found = divergence(
            model, reference, short, context=CONTEXT, progress=lambda done, total, mean: heard.append((done, total))
        )
        windows = text_windows(reference.tokenizer, short, context=CONTEXT)
        assert model.core.runner.listener is None  # type: ignore[attr-defined]
    p = torch.log_softmax(oracle_logits(tiny, None, windows).double(), -1)
    q = torch.log_softmax(oracle_logits(tiny, low, windows).double(), -1)
    kl = torch.nn.functional.kl_div(q, p, log_target=True, reduction="none").sum(-1)
    targets = torch.tensor(windows)[:, 1:, None]
    assert (found.windows, found.tokens, found.context) == (8, 8 * (CONTEXT - 1), CONTEXT)
    assert heard == [(i, 8) for i in range(1, 9)]
    assert found.kl_mean == pytest.approx(float(kl.mean()), rel=2e-4)
    assert found.kl_error == pytest.approx(float(kl.std()) / kl.numel() ** 0.5, rel=2e-4)
    assert found.kl_max == pytest.approx(float(kl.max()), rel=2e-4)
    assert found.window_kl == pytest.approx(kl.mean(1).tolist(), rel=2e-4)
    assert float(kl.quantile(0.4)) < found.kl_median < float(kl.quantile(0.6))
    assert found.kl_median < found.kl_p90 < found.kl_p99 <= found.kl_p999 <= found.kl_max
    assert found.top1_agreement == pytest.approx(float((p.argmax(-1) == q.argmax(-1)).double().mean()), abs=0.02)
    assert 0.2 < found.top1_agreement < 1
    assert found.ppl == pytest.approx(float(torch.exp(-q.gather(2, targets).mean())), rel=1e-3)
    assert found.reference_ppl == pytest.approx(float(torch.exp(-p.gather(2, targets).mean())), rel=1e-3)
    difference = (q.gather(2, targets).exp() - p.gather(2, targets).exp()).square().mean().sqrt()
    assert found.probability_rms == pytest.approx(float(difference), rel=5e-3)


def test_a_model_does_not_diverge_from_itself(tiny: Path, short: Path) -> None:
    with llm(tiny) as model, llm(tiny) as reference:
        found = divergence(model, reference, short, context=CONTEXT, max_windows=2)
    assert found.windows == 2
    assert (found.kl_mean, found.kl_max, found.top1_agreement, found.probability_rms) == (0, 0, 1, 0)
    assert found.ppl == found.reference_ppl


def test_perplexity_of_both_is_the_one_that_eval_ppl_has(tiny: Path, low: Path, short: Path) -> None:
    with llm(low) as model, llm(tiny) as reference:
        found = divergence(model, reference, short, context=CONTEXT)
        alone = perplexity(model, short, context=CONTEXT)
        assert found.reference_ppl == pytest.approx(perplexity(reference, short, context=CONTEXT).ppl, rel=1e-5)
    assert found.ppl == pytest.approx(alone.ppl, rel=1e-5)
    assert 0 < alone.scoring_seconds < alone.seconds
    assert alone.tokens_per_s == pytest.approx(8 * CONTEXT / alone.seconds)


@pytest.mark.parametrize("memory_bytes", [1 << 30, 0])
def test_a_reference_that_is_never_whole_gives_the_same(
    tiny: Path, low: Path, short: Path, tmp_path: Path, memory_bytes: int
) -> None:
    heard: list[tuple[int, int]] = []
    with closing(open_checkpoint(tiny)) as checkpoint:
        streamed = StreamedReference(
            checkpoint,
            short,
            context=CONTEXT,
            max_windows=5,
            directory=tmp_path,
            streams=StreamConfig(memory_bytes=memory_bytes),
            progress=lambda done, blocks: heard.append((done, blocks)),
        )
    assert heard == [(0, 3), (1, 3), (2, 3), (3, 3)]
    with llm(low) as model, llm(tiny) as reference:
        found = divergence(model, streamed, short, context=CONTEXT, max_windows=5)
        wanted = divergence(model, reference, short, context=CONTEXT, max_windows=5)
        with pytest.raises(ValueError, match="other windows"):
            divergence(model, streamed, short, context=CONTEXT - 1)
    assert found.window_kl == pytest.approx(wanted.window_kl, rel=1e-4)
    assert found.kl_max == pytest.approx(wanted.kl_max, rel=1e-4)
    assert found.reference_ppl == pytest.approx(wanted.reference_ppl, rel=1e-6)
    assert (found.ppl, found.tokens) == (wanted.ppl, wanted.tokens)
    assert list(tmp_path.iterdir()) == [short]


def test_references_that_cannot_be_streamed(tiny: Path, low: Path, short: Path, tmp_path: Path) -> None:
    with closing(open_checkpoint(low)) as quantized, pytest.raises(ConfigError, match="load this one whole"):
        StreamedReference(quantized, short, context=CONTEXT, directory=tmp_path)
    with closing(open_checkpoint(tiny)) as checkpoint, pytest.raises(ConfigError, match="64 positions"):
        StreamedReference(checkpoint, short, context=65, directory=tmp_path)


def test_vocabularies_must_be_one(tiny: Path, short: Path, tmp_path: Path) -> None:
    other = tmp_path / "other"
    shutil.copytree(tiny, other)
    words = json.loads((other / "tokenizer.json").read_text())
    vocabulary = words["model"]["vocab"]
    vocabulary["w2"], vocabulary["w3"] = vocabulary["w3"], vocabulary["w2"]
    (other / "tokenizer.json").write_text(json.dumps(words))
    with llm(other) as model, llm(tiny) as reference, pytest.raises(ConfigError, match="one tokenizer"):
        divergence(model, reference, short, context=CONTEXT)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"context": 1}, "predicts nothing"),
        ({"context": 4096}, "fewer than one window"),
        ({"context": CONTEXT, "max_windows": 0}, "measure nothing"),
    ],
)
def test_texts_that_measure_nothing(tiny: Path, short: Path, settings: dict[str, int], message: str) -> None:
    with llm(tiny) as model, pytest.raises(UserError, match=message):
        perplexity(model, short, **settings)


def test_rows_are_compared_whatever_their_number() -> None:
    torch.manual_seed(0)
    n = 2 * ROWS + 3
    p, q = torch.randn(n, 50) * 3, torch.randn(n, 50) * 3
    q[5] = p[5] + 7  # the same distribution
    targets = torch.randint(0, 50, (n,))
    found = compare(p, q, targets)
    wanted = torch.distributions.kl_divergence(
        torch.distributions.Categorical(logits=p.double()), torch.distributions.Categorical(logits=q.double())
    )
    torch.testing.assert_close(found.kl.double(), wanted, rtol=1e-5, atol=1e-6)
    assert found.kl[5] < 1e-6
    assert found.agree.tolist() == (p.argmax(1) == q.argmax(1)).tolist()
    torch.testing.assert_close(found.model, q.log_softmax(1)[torch.arange(n), targets])
