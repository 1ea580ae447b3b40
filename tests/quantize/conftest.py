"""A tiny random Llama on disk, with a tokenizer and a text."""

from __future__ import annotations

import random
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

VOCAB = 96


@pytest.fixture(autouse=True, scope="session")
def one_thread() -> Iterator[None]:
    """Matrices this small are slower on more, much slower when other tests run beside."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def draw(count: int, seed: int) -> list[int]:
    """Tokens of a skewed distribution."""
    rng = random.Random(seed)
    return [min(2 + int(rng.expovariate(0.05)), VOCAB - 1) for _ in range(count)]


@pytest.fixture(scope="session")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three blocks, grouped-query attention, untied head, attention biases; shapes that 3 bits can pack."""
    path = tmp_path_factory.mktemp("models") / "tiny"
    torch.manual_seed(1)
    config = LlamaConfig(
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,
        vocab_size=VOCAB,
        max_position_embeddings=64,
        tie_word_embeddings=False,
        attention_bias=True,
        initializer_range=0.15,
    )
    model = LlamaForCausalLM(config)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith(("norm.weight", ".bias")):
                parameter.add_(torch.randn_like(parameter) * 0.2)
            if name.endswith("q_proj.weight"):
                # Hidden states with loud columns, as real ones have.
                parameter[:, ::9] *= 3
    model.save_pretrained(path)
    words = {"unknown": 0, "end": 1} | {f"w{i}": i for i in range(2, VOCAB)}
    backend = Tokenizer(models.WordLevel(words, unk_token="unknown"))
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    PreTrainedTokenizerFast(tokenizer_object=backend, unk_token="unknown", eos_token="end").save_pretrained(path)
    return path


@pytest.fixture(scope="session")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """1200 words of the tokenizer."""
    path = tmp_path_factory.mktemp("text") / "text.txt"
    path.write_text(" ".join(f"w{token}" for token in draw(1200, seed=2)))
    return path


@pytest.fixture(scope="session")
def unseen() -> Tensor:
    """Other tokens like those of the text, [8, 48]."""
    return torch.tensor(draw(8 * 48, seed=3)).view(8, 48)
