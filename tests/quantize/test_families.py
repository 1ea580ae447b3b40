"""Every method on the families whose blocks are not Llama's: what is written loads, and is what was quantized."""

from __future__ import annotations

import string
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from tokenizers import Tokenizer, models, pre_tokenizers
from torch import Tensor

from dibit.engine.checkpoint import open_checkpoint
from dibit.engine.models import resolve_arch
from dibit.engine.models.decoder import load_embedding, load_float_block, load_head
from dibit.engine.models.spec import head_norm_names
from dibit.engine.models.weights import read_tensor
from dibit.kernels.norm import rms_norm_reference
from dibit.quantize import quantize_checkpoint
from dibit.quantize.methods import make_method

FAMILIES: dict[str, tuple[Any, Any]] = {
    "qwen2": (transformers.Qwen2Config, transformers.Qwen2ForCausalLM),
    "qwen3": (transformers.Qwen3Config, transformers.Qwen3ForCausalLM),
}
METHODS: dict[str, dict[str, Any]] = {
    "rtn": {},
    "gptq": {"asymmetric": True},
    "awq": {},
    "smoothquant": {},
    "omniquant": {"steps": 24},
    "affinequant": {"steps": 24, "affine_steps": 8},
    "block-ap": {"steps": 3},
    "efficientqat": {"steps": 3, "end_steps": 3},
}


@pytest.fixture(scope="module", params=FAMILIES)
def other(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny model of another family, with a tokenizer of letters."""
    path = tmp_path_factory.mktemp("models") / str(request.param)
    config_class, model_class = FAMILIES[request.param]
    torch.manual_seed(2)
    config = config_class(
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=16,
        vocab_size=96,
        max_position_embeddings=64,
        tie_word_embeddings=False,
        initializer_range=0.15,
    )
    model = model_class(config)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith(("norm.weight", ".bias")):
                parameter.add_(torch.randn_like(parameter) * 0.2)
    model.save_pretrained(path)
    # transformers gives these families their own kind of tokenizer, whatever the files say.
    letters = {letter: i for i, letter in enumerate(["unknown", "end", "w", *string.digits, "Ġ"])}
    backend = Tokenizer(models.BPE(letters, []))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer = transformers.PreTrainedTokenizerFast(tokenizer_object=backend, unk_token="unknown", eos_token="end")
    tokenizer.save_pretrained(path)
    return path


def logits(path: Path, tokens: Tensor) -> Tensor:
    """Of the weights as they are stored, dequantized."""
    source = open_checkpoint(path)
    arch, sizes = resolve_arch(source.config)
    cos, sin = sizes.rope.tables(tokens.shape[1])
    with torch.inference_mode():
        x = load_embedding(source, arch, sizes)[tokens]
        for layer in range(sizes.layers):
            x = load_float_block(source, arch, sizes, layer).dense(x, cos, sin)
        norm = read_tensor(source, f"{arch.final_norm}.weight", (sizes.hidden,))
        return rms_norm_reference(x, norm, sizes.norm_eps) @ load_head(source, arch, sizes).T


@pytest.mark.parametrize("method", METHODS)
def test_every_method(method: str, other: Path, text: Path, unseen: Tensor, tmp_path: Path) -> None:
    out = tmp_path / "out"
    words: dict[str, Any] = {} if method == "rtn" else {"calibration": text, "samples": 16, "sequence_length": 40}
    made_by = make_method(method, METHODS[method])
    report = quantize_checkpoint(str(other), out, method=made_by, bits=4, group_size=16, **words)
    assert not any(site.fallback for site in report.sites)
    source, made = open_checkpoint(other), open_checkpoint(out)
    arch, sizes = resolve_arch(made.config)
    for layer in range(sizes.layers):
        for name in head_norm_names(arch, layer):
            assert torch.equal(made.export(name), source.export(name))
    # What 4 bits cost; a wrong fold or a part left out costs several times that.
    want, got = logits(other, unseen), logits(out, unseen)
    assert float((got - want).norm() / want.norm()) < 0.35
