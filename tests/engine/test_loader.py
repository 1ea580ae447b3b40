"""Loading: one tensor at a time, every name and shape accounted for, tied ends held once."""

from __future__ import annotations

import itertools
import subprocess
import sys
import weakref
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_models import MemoryWeights, Paged, hf_model, quantized, token_ids, weights_of
from torch import Tensor

from dibit.engine.checkpoint import CheckpointWriter, open_checkpoint
from dibit.engine.config import EngineConfig
from dibit.engine.errors import CheckpointError, ConfigError
from dibit.engine.loader import FloatEmbedding, PackedEmbedding, load_decoder, round_to_nearest
from dibit.engine.models.decoder import FloatLinear, PackedLinear
from dibit.kernels import native
from dibit.kernels.formats import Format, QTensor, dequantize
from dibit.kernels.qlinear import quantize_activations

REFERENCE = EngineConfig(backend="reference")
Q = "model.layers.1.self_attn.q_proj"


def tiny(**overrides: Any) -> MemoryWeights:
    return weights_of(hf_model(**overrides))


@pytest.mark.parametrize(
    "name", ["model.norm.weight", "model.embed_tokens.weight", "lm_head.weight", f"{Q}.weight", f"{Q}.bias"]
)
def test_a_missing_tensor_is_named(name: str) -> None:
    weights = tiny(attention_bias=True)
    del weights.tensors[name]
    with pytest.raises(CheckpointError, match=f"lacks {name} of the 29 tensors"):
        load_decoder(weights, config=REFERENCE)


@pytest.mark.parametrize("name", ["model.norm.weight", "lm_head.weight", f"{Q}.weight"])
def test_a_wrong_shape_is_named_with_both_shapes(name: str) -> None:
    weights = tiny()
    expected = list(weights.tensors[name].shape)
    weights.tensors[name] = weights.tensors[name].repeat_interleave(2, dim=0)
    found = list(weights.tensors[name].shape)
    with pytest.raises(CheckpointError) as caught:
        load_decoder(weights, config=REFERENCE)
    assert f"{name} has shape {found}; config.json asks for {expected}" in str(caught.value)


def test_a_quantized_linear_of_the_wrong_shape_is_named() -> None:
    low = quantized(tiny(), Format(4, 16))
    low.packed[Q] = low.packed[Q].rows(0, 32)
    with pytest.raises(CheckpointError, match=rf"{Q}.weight has shape \[32, 48\]; config.json asks for \[48, 48\]"):
        load_decoder(low, config=REFERENCE)


@pytest.mark.parametrize(
    "name", [f"{Q}.bias", "model.layers.1.self_attn.q_norm.weight", "model.layers.2.mlp.up_proj.weight", "lm_head.bias"]
)
def test_a_tensor_that_belongs_nowhere_is_refused(name: str) -> None:
    weights = tiny()
    weights.tensors[name] = torch.ones(48)
    with pytest.raises(CheckpointError, match=f"holds {name}, which a llama model"):
        load_decoder(weights, config=REFERENCE)


def test_packed_tensors_beside_a_float_weight_are_refused() -> None:
    weights = tiny()
    weights.tensors[f"{Q}.qweight"] = torch.ones(6, 48, dtype=torch.int32)
    with pytest.raises(CheckpointError, match=r"q_proj\.qweight"):
        load_decoder(weights, config=REFERENCE)


def test_what_other_tools_leave_behind_is_accepted() -> None:
    weights = tiny(tie_word_embeddings=True)
    weights.tensors["model.layers.0.self_attn.rotary_emb.inv_freq"] = torch.ones(4)
    weights.tensors[f"{Q}.bias"] = torch.zeros(48)
    weights.tensors["lm_head.weight"] = weights.tensors["model.embed_tokens.weight"].clone()
    load_decoder(weights, config=REFERENCE)


def test_a_tied_model_with_another_head_is_refused() -> None:
    weights = tiny(tie_word_embeddings=True)
    weights.tensors["lm_head.weight"] = weights.tensors["model.embed_tokens.weight"] + 1
    with pytest.raises(CheckpointError, match=r"holds lm_head.weight"):
        load_decoder(weights, config=REFERENCE)


def test_float_models_keep_their_floats() -> None:
    tied = load_decoder(tiny(tie_word_embeddings=True), config=REFERENCE)
    assert isinstance(tied.embedding, FloatEmbedding)
    assert isinstance(tied.head, FloatLinear)
    assert tied.embedding.weight is tied.head.weight
    assert tied.format is None
    assert tied.step_bytes == tied.nbytes

    half = tiny()
    half.tensors = {name: tensor.bfloat16() for name, tensor in half.tensors.items()}
    untied = load_decoder(half, config=REFERENCE)
    assert isinstance(untied.embedding, FloatEmbedding)
    assert untied.embedding.weight.dtype == torch.bfloat16
    assert untied.embedding(torch.tensor([5])).dtype == torch.float32
    assert isinstance(untied.head, FloatLinear)
    assert untied.head.weight.dtype == torch.float32
    assert untied.nbytes - untied.step_bytes == 97 * 48 * 2


@pytest.mark.parametrize("bits", [8, 4])
@pytest.mark.parametrize("backend", ["reference", "cpu"])
def test_tied_ends_of_a_quantized_model_are_one_low_bit_weight(backend: Any, bits: Any) -> None:
    if backend == "cpu" and native.unavailable() is not None:
        pytest.skip("C++ kernels not built")
    weights = tiny(tie_word_embeddings=True)
    decoder = load_decoder(quantized(weights, Format(2, 16)), config=EngineConfig(backend=backend, head_bits=bits))
    assert isinstance(decoder.embedding, PackedEmbedding)
    assert isinstance(decoder.head, PackedLinear)
    assert decoder.head.weight.format.bits == bits
    assert decoder.embedding.weight is decoder.head.weight
    assert decoder.format == Format(2, 16)
    table = weights.tensors["model.embed_tokens.weight"]
    rows = decoder.embedding(torch.arange(97))
    # Half a step of an asymmetric range, and the rounding of the scale to float16 over all steps.
    steps = 2**bits - 1
    step = (table.amax(1) - table.amin(1)) / steps
    assert bool(((rows - table).abs() <= step[:, None] * (0.5 + steps * 2**-11)).all())


def test_untied_ends_of_a_quantized_model() -> None:
    low = quantized(tiny(), Format(4, 16))
    at_8 = load_decoder(low, config=REFERENCE)
    assert isinstance(at_8.embedding, PackedEmbedding)
    assert isinstance(at_8.head, PackedLinear)
    assert at_8.embedding.weight is not at_8.head.weight
    assert at_8.nbytes - at_8.step_bytes == at_8.head.nbytes
    at_16 = load_decoder(low, config=EngineConfig(backend="reference", head_bits=16))
    assert isinstance(at_16.embedding, FloatEmbedding)
    assert isinstance(at_16.head, FloatLinear)


def test_a_head_that_the_checkpoint_quantized_stays_as_it_is() -> None:
    low = quantized(tiny(), Format(4, 16))
    w = low.tensors.pop("lm_head.weight")
    low.packed["lm_head"] = Format(3, 16).encode(w, *Format(3, 16).ranges(w))
    decoder = load_decoder(low, config=EngineConfig(backend="reference", head_bits=16))
    assert isinstance(decoder.head, PackedLinear)
    assert decoder.head.weight.format == Format(3, 16)


@pytest.mark.parametrize("backend", ["reference", "cpu"])
def test_activation_bits_are_for_the_blocks_and_not_for_the_head(backend: Any) -> None:
    if backend == "cpu" and native.unavailable() is not None:
        pytest.skip("C++ kernels not built")
    low = quantized(tiny(), Format(4, 16))
    config = EngineConfig(backend=backend)
    plain, rounded = load_decoder(low, config=config), load_decoder(low, config=config, activation_bits=4)
    reference = load_decoder(low, config=REFERENCE)
    x = torch.randn(3, 48)
    given = quantize_activations(x, bits=4)
    assert torch.equal(rounded.head(x), plain.head(x))
    for layer, key in itertools.product(range(2), ("qkv", "gate_up")):
        found = rounded.blocks[layer].linears[key](x)
        torch.testing.assert_close(found, reference.blocks[layer].linears[key](given), rtol=1e-4, atol=1e-5)
        assert not torch.allclose(found, plain.blocks[layer].linears[key](x), atol=1e-3)


def test_fractional_zero_points_serve_like_their_floats() -> None:
    low = quantized(tiny(), Format(2, 16, "fractional"))
    floats = tiny()
    for module, q in low.packed.items():
        floats.tensors[f"{module}.weight"] = dequantize(q)
    config = EngineConfig(backend="reference", head_bits=16)
    x = torch.randn(3, 48)
    for key in ("qkv", "gate_up"):
        for one, other in zip(
            load_decoder(low, config=config).blocks, load_decoder(floats, config=config).blocks, strict=True
        ):
            torch.testing.assert_close(one.linears[key](x), other.linears[key](x), rtol=1e-5, atol=1e-5)


def test_rounding_in_slices_is_rounding_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("dibit.engine.loader.CHUNK_ELEMENTS", 7 * 64)
    w, chosen = torch.randn(40, 64).bfloat16(), Format(8, 64)
    found = round_to_nearest(w, chosen)
    expected = chosen.encode(w, *chosen.ranges(w))
    assert torch.equal(found.codes, expected.codes)
    assert torch.equal(dequantize(found), dequantize(expected))


def test_parts_are_let_go_before_the_next_site_is_read() -> None:
    alive: list[weakref.ref[Tensor]] = []
    most = 0

    class Watched(MemoryWeights):
        def linear(self, module: str) -> Tensor | QTensor:
            nonlocal most
            found = super().linear(module)
            assert isinstance(found, QTensor)
            copy = QTensor(found.codes.clone(), found.zeros, found.scales, found.format)
            alive.append(weakref.ref(copy.codes))
            most = max(most, sum(ref() is not None for ref in alive))
            return copy

    low = quantized(tiny(tie_word_embeddings=True), Format(4, 16))
    backend: Any = "reference" if native.unavailable() else "cpu"
    load_decoder(Watched(low.config, low.tensors, low.packed), config=EngineConfig(backend=backend))
    held = sum(ref() is not None for ref in alive)
    # The reference computes on the QTensor itself, so unfused sites (o, down) stay.
    assert held == (4 if backend == "reference" else 0)
    assert most <= held + 2


def test_progress_counts_the_blocks() -> None:
    seen: list[tuple[int, int]] = []
    load_decoder(tiny(), config=REFERENCE, progress=lambda done, total: seen.append((done, total)))
    assert seen == [(1, 2), (2, 2)]


def test_a_device_that_is_not_there_is_refused() -> None:
    if torch.cuda.is_available():
        pytest.skip("there is a GPU")
    with pytest.raises(ConfigError, match="no NVIDIA GPU"):
        load_decoder(tiny(), config=EngineConfig(device="cuda"))


def test_a_backend_that_cannot_run_is_refused_with_its_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(native, "unavailable", lambda: "the C++ kernels are not built")
    with pytest.raises(ConfigError, match=r"the C\+\+ kernels are not built.*choose another backend"):
        load_decoder(tiny(), config=EngineConfig(backend="cpu"))


PEAK = """
import resource, torch
from dibit.engine.config import EngineConfig
from dibit.engine.loader import load_decoder
from dibit.kernels.formats import Format, QTensor
from tiny_models import Header, MemoryWeights

H, I, V, LAYERS = 1024, 3584, 24000, 6
FORMAT = Format(4, 64)

class Streamed(MemoryWeights):
    '''Makes each tensor when it is asked for, as reading a file would.'''
    def has(self, name): return name in self.tensors
    def tensor(self, name): return torch.rand(tuple(self.tensors[name].shape), dtype=torch.float32).bfloat16() \\
        if self.tensors[name].dim() == 1 else torch.ones(V, H, dtype=torch.bfloat16)
    def linear(self, module):
        n, k = SHAPES[module.rpartition(".")[2]]
        return QTensor(torch.full((n, k), 3, dtype=torch.uint8), torch.zeros(n, k // 64, dtype=torch.uint8),
                       torch.ones(n, k // 64, dtype=torch.float16), FORMAT)
    def linear_format(self, module): return FORMAT if module.rpartition(".")[2] in SHAPES else None
    def names(self): return list(self.tensors)

SHAPES = {"q_proj": (H, H), "k_proj": (H // 4, H), "v_proj": (H // 4, H), "o_proj": (H, H),
          "gate_proj": (I, H), "up_proj": (I, H), "down_proj": (H, I)}
config = dict(architectures=["LlamaForCausalLM"], hidden_size=H, intermediate_size=I, num_hidden_layers=LAYERS,
              num_attention_heads=16, num_key_value_heads=4, vocab_size=V, tie_word_embeddings=True)
names = {"model.norm.weight": (H,), "model.embed_tokens.weight": (V, H)}
for i in range(LAYERS):
    for norm in ("input_layernorm", "post_attention_layernorm"):
        names[f"model.layers.{i}.{norm}.weight"] = (H,)
meta = {name: torch.empty(shape, dtype=torch.bfloat16, device="meta") for name, shape in names.items()}
torch.ones(64, 64) @ torch.ones(64, 64)
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
decoder = load_decoder(Streamed(config, meta), config=EngineConfig(backend="cpu"))
peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 - before
print(decoder.nbytes, peak, V * H * 2)
"""


@pytest.mark.skipif(native.unavailable() is not None, reason="C++ kernels not built")
@pytest.mark.skipif(sys.platform != "linux", reason="ru_maxrss is in kilobytes on Linux")
def test_peak_memory_of_a_load() -> None:
    """At most 1.3 x the packed model and the largest tensor, the embedding."""
    done = subprocess.run(
        [sys.executable, "-c", PEAK],
        capture_output=True,
        text=True,
        check=False,
        env={"PYTHONPATH": str(Path(__file__).parent.parent)},
    )
    assert done.returncode == 0, done.stderr
    packed, peak, largest = map(int, done.stdout.split())
    assert packed > 60e6
    assert peak <= 1.3 * packed + largest, f"peak {peak / 1e6:.0f} MB for {packed / 1e6:.0f} MB packed"


def test_files_on_disk_make_the_same_model(tmp_path: Path) -> None:
    """Written by transformers, quantized into a GPTQ directory with mixed widths, opened and served again."""
    model = hf_model(hidden_size=64, intermediate_size=96, num_attention_heads=4, attention_bias=True)
    model.save_pretrained(tmp_path / "float")
    source = open_checkpoint(tmp_path / "float")
    widths = {"q_proj": Format(4, 32), "k_proj": Format(4, 32), "v_proj": Format(8, 32), "down_proj": Format(3, 32)}
    low = quantized(weights_of(model), widths)
    writer = CheckpointWriter(tmp_path / "low", source)
    for module, w in low.packed.items():
        writer.add_quantized(module, w)
    for name, tensor in low.tensors.items():
        writer.add_float(name, tensor)
    writer.finish(method="rtn")
    source.close()
    ids = token_ids(21)
    expected = Paged(load_decoder(low, config=REFERENCE))
    opened = open_checkpoint(tmp_path / "low")
    found = Paged(load_decoder(opened, config=REFERENCE))
    opened.close()
    assert torch.equal(found.logits((found.request(ids), 0, 21)), expected.logits((expected.request(ids), 0, 21)))


def test_a_load_leaves_the_threads_of_torch_as_they_were() -> None:
    before = torch.get_num_threads()
    torch.set_num_threads(3)
    during: list[int] = []
    try:
        load_decoder(tiny(), config=REFERENCE, progress=lambda *_: during.append(torch.get_num_threads()))
        assert torch.get_num_threads() == 3
        assert set(during) == {1}
    finally:
        torch.set_num_threads(before)
