"""GGUF files: the demo against the gguf package, and small ones written here, whole and broken."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from gguf import GGMLQuantizationType as Kind

from dibit.engine.checkpoint import open_checkpoint, resolve_model
from dibit.engine.checkpoint.gguf_file import GgufCheckpoint
from dibit.engine.errors import CheckpointError

HIDDEN, HEADS, KV_HEADS, HEAD_DIM, FFN, VOCAB = 64, 4, 2, 16, 96, 40


def interleaved(w: np.ndarray[Any, Any], heads: int) -> np.ndarray[Any, Any]:
    """Rows of every head from (first half, second half) to pairs: what conversion to GGUF does to q and k."""
    rows = []
    for head in np.split(w, heads):
        half = len(head) // 2
        for i in range(half):
            rows += [head[i], head[half + i]]
    return np.stack(rows)


def weights(rng: np.random.Generator, *, bias: bool = False, head: bool = False) -> dict[str, np.ndarray[Any, Any]]:
    shapes = {
        "self_attn.q_proj": (HEADS * HEAD_DIM, HIDDEN),
        "self_attn.k_proj": (KV_HEADS * HEAD_DIM, HIDDEN),
        "self_attn.v_proj": (KV_HEADS * HEAD_DIM, HIDDEN),
        "self_attn.o_proj": (HIDDEN, HEADS * HEAD_DIM),
        "mlp.gate_proj": (FFN, HIDDEN),
        "mlp.up_proj": (FFN, HIDDEN),
        "mlp.down_proj": (HIDDEN, FFN),
    }
    tensors = {
        f"model.layers.0.{name}.weight": rng.standard_normal(shape, dtype=np.float32) for name, shape in shapes.items()
    }
    if bias:
        tensors |= {
            f"model.layers.0.{name}.bias": rng.standard_normal(shape[0], dtype=np.float32)
            for name, shape in shapes.items()
            if name.startswith("self_attn")
        }
    for name in ("input_layernorm", "post_attention_layernorm"):
        tensors[f"model.layers.0.{name}.weight"] = rng.standard_normal(HIDDEN, dtype=np.float32)
    tensors["model.norm.weight"] = rng.standard_normal(HIDDEN, dtype=np.float32)
    tensors["model.embed_tokens.weight"] = rng.standard_normal((VOCAB, HIDDEN), dtype=np.float32)
    if head:
        tensors["lm_head.weight"] = rng.standard_normal((VOCAB, HIDDEN), dtype=np.float32)
    return tensors


GGUF_NAMES = {
    "model.embed_tokens": "token_embd",
    "model.norm": "output_norm",
    "lm_head": "output",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
}


def gguf_name(name: str) -> str:
    module, _, kind = name.removeprefix("model.layers.0.").rpartition(".")
    return f"{'blk.0.' if name.startswith('model.layers') else ''}{GGUF_NAMES[module]}.{kind}"


Edit = Callable[[gguf.GGUFWriter], None]


def write_gguf(
    path: Path,
    tensors: dict[str, np.ndarray[Any, Any]],
    *,
    kind: Kind = Kind.F32,
    arch: str = "llama",
    skip: Iterable[str] = (),
    edit: Edit = lambda _: None,
) -> Path:
    """A one-layer Llama; matrices in `kind`, vectors in F32. `skip` leaves metadata out, `edit` adds to it."""
    writer = gguf.GGUFWriter(path, arch)
    numbers = {
        "block_count": 1,
        "context_length": 128,
        "embedding_length": HIDDEN,
        "feed_forward_length": FFN,
        "attention.head_count": HEADS,
        "attention.head_count_kv": KV_HEADS,
        "rope.dimension_count": HEAD_DIM,
    }
    for key, value in numbers.items():
        if key not in skip:
            writer.add_uint32(f"{arch}.{key}", value)
    writer.add_float32(f"{arch}.attention.layer_norm_rms_epsilon", 1e-5)
    edit(writer)
    for name, tensor in tensors.items():
        for part, heads in (("q_proj", HEADS), ("k_proj", KV_HEADS)):
            if part in name:
                tensor = interleaved(tensor, heads)
        if tensor.ndim == 1 or kind == Kind.F32:
            writer.add_tensor(gguf_name(name), tensor)
        else:
            writer.add_tensor(gguf_name(name), gguf.quants.quantize(tensor, kind), raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


@pytest.fixture
def rng() -> np.random.Generator:
    return np.random.default_rng(0)


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("head", [False, True])
def test_tensors_come_back_in_hugging_face_order(
    tmp_path: Path, rng: np.random.Generator, *, bias: bool, head: bool
) -> None:
    tensors = weights(rng, bias=bias, head=head)
    checkpoint = open_checkpoint(write_gguf(tmp_path / "m.gguf", tensors))
    assert set(checkpoint.names()) == set(tensors)
    for name, tensor in tensors.items():
        assert torch.equal(checkpoint.tensor(name), torch.from_numpy(tensor)), name
        assert checkpoint.info(name).shape == tensor.shape
    assert checkpoint.config["attention_bias"] is bias
    assert checkpoint.config["tie_word_embeddings"] is not head
    linear = checkpoint.linear("model.layers.0.mlp.up_proj")
    assert isinstance(linear, torch.Tensor)
    assert torch.equal(linear, torch.from_numpy(tensors["model.layers.0.mlp.up_proj.weight"]))
    assert checkpoint.linear_format("model.layers.0.mlp.up_proj") is None
    assert checkpoint.name == "m"


def test_the_config_is_that_of_transformers(tmp_path: Path, rng: np.random.Generator) -> None:
    from transformers import LlamaConfig

    config = open_checkpoint(write_gguf(tmp_path / "m.gguf", weights(rng))).config
    assert config["rms_norm_eps"] == 1e-5
    read = LlamaConfig(**config)
    assert (read.hidden_size, read.intermediate_size, read.vocab_size) == (HIDDEN, FFN, VOCAB)
    assert (read.num_attention_heads, read.num_key_value_heads, read.head_dim) == (HEADS, KV_HEADS, HEAD_DIM)
    assert (read.num_hidden_layers, read.max_position_embeddings) == (1, 128)


@pytest.mark.parametrize("kind", [Kind.F16, Kind.BF16, Kind.Q4_0, Kind.Q4_1, Kind.Q5_0, Kind.Q5_1, Kind.Q8_0])
def test_block_types(tmp_path: Path, rng: np.random.Generator, kind: Kind) -> None:
    tensors = weights(rng)
    checkpoint = open_checkpoint(write_gguf(tmp_path / "m.gguf", tensors, kind=kind))
    name = "model.layers.0.mlp.down_proj.weight"
    expected = gguf.quants.dequantize(gguf.quants.quantize(tensors[name], kind), kind)
    assert torch.equal(checkpoint.tensor(name), torch.from_numpy(expected.astype(np.float32)))
    assert checkpoint.info(name).stored == kind.name
    assert checkpoint.tensor(name).dtype == torch.float32


@pytest.mark.parametrize("kind", [Kind.Q2_K, Kind.Q3_K, Kind.Q4_K, Kind.Q5_K, Kind.Q6_K, Kind.IQ4_XS, Kind.IQ4_NL])
def test_types_that_only_llama_cpp_can_make(tmp_path: Path, rng: np.random.Generator, kind: Kind) -> None:
    """Random bytes are valid blocks of these types (but for scales, which may be NaN)."""
    block, block_bytes = gguf.GGML_QUANT_SIZES[kind]
    raw = rng.integers(0, 256, (HIDDEN, 512 // block * block_bytes), dtype=np.uint8)
    name = "model.layers.0.mlp.down_proj.weight"
    tensors = weights(rng)
    del tensors[name]
    path = write_gguf(
        tmp_path / "m.gguf", tensors, edit=lambda w: w.add_tensor("blk.0.ffn_down.weight", raw, raw_dtype=kind)
    )
    checkpoint = open_checkpoint(path)
    assert checkpoint.info(name).shape == (HIDDEN, 512)
    with np.errstate(all="ignore"):
        expected = gguf.quants.dequantize(raw, kind)
        np.testing.assert_array_equal(checkpoint.tensor(name).numpy(), expected)


def test_the_type_in_which_tensors_are_written_on(tmp_path: Path, rng: np.random.Generator) -> None:
    tensors = weights(rng)
    tensors["model.norm.weight"] = np.array([1.0, 0.5] * 32, dtype=np.float32)
    name = "model.embed_tokens.weight"
    plain = open_checkpoint(write_gguf(tmp_path / "f32.gguf", tensors))
    assert plain.export("model.norm.weight").dtype == torch.float16
    assert plain.export(name).dtype == torch.float32
    assert torch.equal(plain.export(name), plain.tensor(name))
    for kind, dtype in ((Kind.F16, torch.float16), (Kind.BF16, torch.bfloat16)):
        checkpoint = open_checkpoint(write_gguf(tmp_path / "half.gguf", tensors, kind=kind))
        assert checkpoint.export(name).dtype == dtype
        assert torch.equal(checkpoint.export(name).float(), checkpoint.tensor(name))
    blocks = open_checkpoint(write_gguf(tmp_path / "q8.gguf", tensors, kind=Kind.Q8_0))
    assert torch.equal(blocks.export(name), blocks.tensor(name).half())
    tensors[name][3, 5] = 1e6
    wide = open_checkpoint(write_gguf(tmp_path / "wide.gguf", tensors, kind=Kind.Q8_0))
    assert wide.export(name).dtype == torch.float32


def llama3_table(factor: float) -> np.ndarray[Any, Any]:
    """The divisors of rope_freqs.weight, by the rule of Llama 3.1 (low 1, high 4, context 8192)."""
    values = []
    for i in range(0, HEAD_DIM, 2):
        wavelength = 2 * np.pi * 500000.0 ** (i / HEAD_DIM)
        if wavelength < 8192 / 4:
            values.append(1.0)
        elif wavelength > 8192:
            values.append(factor)
        else:
            smooth = (8192 / wavelength - 1) / 3
            values.append(1 / ((1 - smooth) / factor + smooth))
    return np.array(values, dtype=np.float32)


def test_llama_3_scaling_is_recognised(tmp_path: Path, rng: np.random.Generator) -> None:
    def scaled(table: np.ndarray[Any, Any]) -> Edit:
        def edit(writer: gguf.GGUFWriter) -> None:
            writer.add_float32("llama.rope.freq_base", 500000.0)
            writer.add_tensor("rope_freqs.weight", table)

        return edit

    table = llama3_table(32.0)
    checkpoint = open_checkpoint(write_gguf(tmp_path / "m.gguf", weights(rng), edit=scaled(table)))
    assert not checkpoint.has("rope_freqs.weight")
    assert checkpoint.config["rope_scaling"] == {
        "rope_type": "llama3",
        "factor": 32.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
    }
    with pytest.raises(CheckpointError, match="not Llama 3's"):
        open_checkpoint(write_gguf(tmp_path / "x.gguf", weights(rng), edit=scaled(table[::-1].copy())))


def test_linear_and_yarn_scaling(tmp_path: Path, rng: np.random.Generator) -> None:
    def scaled(kind: str, **more: float) -> Edit:
        def edit(writer: gguf.GGUFWriter) -> None:
            writer.add_string("llama.rope.scaling.type", kind)
            writer.add_float32("llama.rope.scaling.factor", 4.0)
            writer.add_uint32("llama.rope.scaling.original_context_length", 32)
            for key, value in more.items():
                writer.add_float32(f"llama.rope.scaling.{key}", value)

        return edit

    def scaling(edit: Edit) -> Any:
        return open_checkpoint(write_gguf(tmp_path / "m.gguf", weights(rng), edit=edit)).config["rope_scaling"]

    assert scaling(scaled("linear")) == {"rope_type": "linear", "factor": 4.0}
    assert scaling(scaled("yarn", yarn_beta_fast=16.0)) == {
        "rope_type": "yarn",
        "factor": 4.0,
        "original_max_position_embeddings": 32,
        "beta_fast": 16.0,
    }
    assert scaling(lambda w: w.add_float32("llama.rope.scale_linear", 2.0)) == {"rope_type": "linear", "factor": 2.0}
    with pytest.raises(CheckpointError, match="'longrope'; supported"):
        scaling(scaled("longrope"))


def number(key: str, value: float) -> Edit:
    """An edit that adds one number to the metadata."""
    if isinstance(value, float):
        return lambda writer: writer.add_float32(key, value)
    return lambda writer: writer.add_uint32(key, value)


def tensor(name: str, dtype: type) -> Edit:
    return lambda writer: writer.add_tensor(name, np.ones((2, 2), dtype))


def heads_per_layer(writer: gguf.GGUFWriter) -> None:
    writer.add_array("llama.attention.head_count", [4, 2])


ROTARY = "rope.dimension_count"
REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "architecture": ({"arch": "qwen2"}, "architecture 'qwen2'; of GGUF files only 'llama'"),
    "split": ({"edit": number("split.count", 3)}, "one of 3 parts.*merge"),
    "unknown-key": ({"edit": number("llama.logit_scale", 2.0)}, r"sets llama\.logit_scale"),
    "experts": ({"edit": number("llama.expert_count", 8)}, "mixture of 8 experts"),
    "partial-rotary": ({"skip": [ROTARY], "edit": number(f"llama.{ROTARY}", 8)}, "must be equal"),
    "no-heads": ({"skip": ["attention.head_count"]}, r"head_count is missing"),
    "no-layers": ({"skip": ["block_count"]}, r"block_count is missing"),
    "heads-per-layer": ({"skip": ["attention.head_count"], "edit": heads_per_layer}, "expected one whole number"),
    "unknown-tensor": (
        {"edit": tensor("blk.0.ffn_gate_inp.weight", np.float32)},
        "does not have, such as blk.0.ffn_gat",
    ),
    "integers": ({"edit": tensor("blk.1.ffn_up.weight", np.int32)}, "cannot dequantize"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_models_that_are_not_supported(tmp_path: Path, rng: np.random.Generator, case: str) -> None:
    options, message = REFUSED[case]
    with pytest.raises(CheckpointError, match=message):
        open_checkpoint(write_gguf(tmp_path / "m.gguf", weights(rng), **options))


def test_biases_on_some_projections_only(tmp_path: Path, rng: np.random.Generator) -> None:
    tensors = weights(rng, bias=True)
    del tensors["model.layers.0.self_attn.o_proj.bias"]
    with pytest.raises(CheckpointError, match=r"has biases on .* alone"):
        open_checkpoint(write_gguf(tmp_path / "m.gguf", tensors))


def test_no_embedding(tmp_path: Path, rng: np.random.Generator) -> None:
    tensors = weights(rng)
    del tensors["model.embed_tokens.weight"]
    with pytest.raises(CheckpointError, match="no token embedding"):
        open_checkpoint(write_gguf(tmp_path / "m.gguf", tensors))


def test_every_truncation_is_noticed(tmp_path: Path, rng: np.random.Generator) -> None:
    path = write_gguf(tmp_path / "m.gguf", weights(rng), kind=Kind.Q4_0)
    whole = path.read_bytes()
    assert open_checkpoint(path).has("model.norm.weight")
    for size in [*range(0, 3000, 7), *range(3000, len(whole) - 40, 501), len(whole) - 40]:
        path.write_bytes(whole[:size])
        with pytest.raises(CheckpointError):
            open_checkpoint(path)


@pytest.mark.demo
def test_the_demo_equals_the_gguf_package() -> None:
    path = resolve_model("demo")
    checkpoint = open_checkpoint(path)
    reader = gguf.GGUFReader(path)
    assert len(list(checkpoint.names())) == len(reader.tensors)
    config = checkpoint.config
    for tensor in reader.tensors[:14]:
        stem = tensor.name.split(".")[-2]
        module = {v: k for k, v in GGUF_NAMES.items()}[stem]
        name = f"model.layers.0.{module}.weight" if tensor.name.startswith("blk.0") else f"{module}.weight"
        if not checkpoint.has(name) or tensor.name.startswith("blk.1."):
            continue
        expected = gguf.quants.dequantize(tensor.data, tensor.tensor_type)
        found = checkpoint.tensor(name).numpy()
        for stem_, heads in (("q_proj", config["num_attention_heads"]), ("k_proj", config["num_key_value_heads"])):
            if stem_ in name:
                found = interleaved(found, heads)
        np.testing.assert_array_equal(found, expected)


@pytest.mark.demo
def test_the_demo_brings_its_tokenizer(tmp_path: Path) -> None:
    checkpoint = open_checkpoint(resolve_model("demo"))
    assert isinstance(checkpoint, GgufCheckpoint)
    assert checkpoint.has_tokenizer()
    assert checkpoint.has_chat_template()
    checkpoint.write_tokenizer(tmp_path)
    assert json.loads((tmp_path / "tokenizer.json").read_text())["model"]["type"] == "BPE"
