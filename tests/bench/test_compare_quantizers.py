"""The comparison of quantizers: bits counted from what is stored, and a work with a stand-in for the other tool."""

from __future__ import annotations

import dataclasses
import json
import math
import stat
import sys
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file
from tokenizers import Tokenizer, models, pre_tokenizers

from dibit.bench import compare_quantizers
from dibit.bench.compare_quantizers import Setup, Work, prepare, record
from dibit.bench.quantizer_records import gguf_bits, packed_bits, perplexities, table
from dibit.engine.errors import ConfigError

LOG = """
warning: blk.0.attn_k.weight   - ncols    576 not divisible by 256 (required for type    q2_K) -> falling back to q4_0
[   1/ 272] output_norm.weight    - [   576,      1,      1,      1], type =    f32, size =    0.002 MiB
[   2/ 272] token_embd.weight     - [   576,  49152,      1,      1], type =    f16, size =   54.000 MiB
[   3/ 272] blk.0.attn_k.weight   - [   576,    192,      1,      1], type =    f16, converting to q4_0 .. load: a file
[   4/ 272] blk.0.attn_norm.weight - [   576,      1,      1,      1], type =    f32, size =    0.002 MiB
[   8/ 272] blk.0.ffn_down.weight - [  1536,    576,      1,      1], type =    f16, converting to q3_K .. size = 1 MiB
[   9/ 272] blk.0.ffn_gate.weight - [   576,   1536,      1,      1], type =    f16, converting to q2_0 .. size = 1 MiB
[  10/ 272] blk.0.ffn_up.weight   - [   576,   1536,      1,      1], type =    f16, size =    1.69 MiB
"""
# Rounds the model to nearest and says how long it took; takes the arguments of an interpreter.
TOOL = """
import json, sys
from pathlib import Path
from safetensors.torch import load_file
from dibit.bench.interop import write_rounded
job = json.loads(Path(sys.argv[-1]).read_text())
assert load_file(job["tokens"])["tokens"].shape == (4, 16)
formats = ((job["bits"], job["group_size"]),) * 2
write_rounded(Path(job["model"]), Path(job["out"]), formats, to="gptq", symmetric=False)
Path(job["done"]).write_text(json.dumps({"versions": {job["tool"]: "7"}, "seconds": 60.0}))
"""


@pytest.fixture
def setup(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Setup:
    monkeypatch.setattr(compare_quantizers, "GROUP_SIZE", 32)
    # Not above: it imports Triton, which tests/kernels/triton/conftest.py must be the first to do.
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    config = LlamaConfig(
        hidden_size=64,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        vocab_size=64,
        max_position_embeddings=64,
        tie_word_embeddings=True,
    )
    LlamaForCausalLM(config).save_pretrained(tmp_path / "model")
    backend = Tokenizer(models.WordLevel({"unknown": 0, "end": 1} | {f"w{i}": i for i in range(2, 64)}, "unknown"))
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, unk_token="unknown", eos_token="end")
    tokenizer.save_pretrained(tmp_path / "model")
    words = tmp_path / "text.txt"
    words.write_text(" ".join(f"w{2 + i * i % 61}" for i in range(200)))
    tool = tmp_path / "tool"
    tool.write_text(f"#!{sys.executable}\n{TOOL}")
    tool.chmod(tool.stat().st_mode | stat.S_IXUSR)
    return Setup(
        model=str(tmp_path / "model"),
        calibration=words,
        samples=4,
        sequence_length=16,
        seed=0,
        iters=3,
        test=words,
        context=8,
        max_windows=20,
        work_dir=tmp_path / "work",
        side_python=tool,
        llama_cpp=None,
        threads=1,
    )


def test_a_work_is_made_and_measured_once(setup: Setup, monkeypatch: pytest.MonkeyPatch) -> None:
    prepare(setup)
    assert load_file(setup.work_dir / "tokens.safetensors")["tokens"].shape == (4, 16)
    assert (setup.work_dir / "calibration.txt").read_text().count("w") == 64
    found = record(Work.parse("auto-round:3"), setup)
    assert found.made.settings == {"iters": 3}
    assert found.made.versions == {"auto-round": "7"}
    assert found.made.seconds == 60
    assert found.made.peak_rss_bytes > 10e6
    assert found.bits_per_weight == pytest.approx(3 + 19 / 32)
    assert found.types == {"int3-g32": 1.0}
    assert found.windows == 20
    # A model that knows nothing, rounded.
    assert 40 < found.ppl["16"] < 100
    assert found.ppl["16"] != found.ppl["all"]
    assert json.loads((setup.work_dir / "auto-round-3.json").read_text()) == dataclasses.asdict(found)
    monkeypatch.setattr(compare_quantizers, "run", lambda *_, **__: pytest.fail("done again"))
    assert record(Work.parse("auto-round:3"), setup).ppl == found.ppl
    assert "| auto-round 7 | 3 | 3.59 | 100% int3-g32 |" in table([found])


def test_a_tool_that_fails_leaves_no_record(setup: Setup) -> None:
    prepare(setup)
    assert setup.side_python is not None
    setup.side_python.write_text(f"#!{sys.executable}\nraise SystemExit(3)")
    with pytest.raises(ConfigError, match="ended with status 3"):
        record(Work.parse("gptqmodel:2"), setup)
    assert not list(setup.work_dir.glob("*.json"))
    alone = dataclasses.replace(setup, side_python=None)
    with pytest.raises(ConfigError, match="--python names"):
        record(Work.parse("gptqmodel+gptaq:2"), alone)
    with pytest.raises(ConfigError, match="--llama-cpp-bin names"):
        record(Work.parse("llama.cpp:Q2_K"), alone)


def test_floats_among_the_linears_are_noticed(setup: Setup) -> None:
    prepare(setup)
    with pytest.raises(ConfigError, match="not quantized"):
        packed_bits(setup.work_dir / "float")


def test_bits_are_those_of_the_matrices_in_blocks() -> None:
    bits, types = gguf_bits(LOG)
    sizes = {
        "Q4_0": (576 * 192, 4.5),
        "Q3_K": (1536 * 576, 3.4375),
        "Q2_0": (1536 * 576, 2.25),
        "F16": (1536 * 576, 16),
    }
    total = sum(weights for weights, _ in sizes.values())
    assert bits == pytest.approx(sum(weights * own for weights, own in sizes.values()) / total)
    assert types == pytest.approx({name: weights / total for name, (weights, _) in sizes.items()})
    with pytest.raises(ConfigError, match="NEW_1"):
        gguf_bits(LOG.replace("q2_0", "new_1"))
    with pytest.raises(ConfigError, match="nothing of any matrix"):
        gguf_bits("done")


def test_perplexities_of_first_windows() -> None:
    losses = [1.0] * 16 + [2.0] * 16 + [6.0] * 8
    assert perplexities(losses) == pytest.approx({"16": math.e, "32": math.exp(1.5), "all": math.exp(2.4)})
    assert perplexities(losses[:16]) == pytest.approx({"all": math.e})


@pytest.mark.parametrize(
    ("word", "name"),
    [
        ("auto-round:2", "auto-round-2"),
        ("gptqmodel+gptaq:3", "gptqmodel+gptaq-3"),
        ("llama.cpp:Q2_K", "llama.cpp-Q2_K"),
        ("dibit:fast-fractional:2", "dibit-fast-fractional-2"),
    ],
)
def test_every_work_has_a_place_of_its_own(word: str, name: str) -> None:
    assert Work.parse(word).name == name


@pytest.mark.parametrize("word", ["auto-round", "auto-round:", "auto-round:5", "awq:2", "llama.cpp:", "dibit:2", ""])
def test_words_that_mean_nothing_are_refused(word: str) -> None:
    with pytest.raises(ConfigError, match="auto-round:BITS"):
        Work.parse(word)


def test_the_other_environment_needs_nothing_of_dibit() -> None:
    source = Path(compare_quantizers.SIDE).read_text()
    assert "import dibit" not in source
    assert "from dibit" not in source


def test_records_are_sorted_by_width_and_perplexity() -> None:
    made = compare_quantizers.Made({"tool": "1"}, {}, 60.0, 70.0, 10**9)
    rows: list[Any] = [
        compare_quantizers.Record("a", "3", made, 3.3, {}, {"all": 9.0}, 4, 8, "served"),
        compare_quantizers.Record("b", "2", made, 2.3, {}, {"all": 30.0}, 4, 8, "served"),
        compare_quantizers.Record("c", "2", made, 2.25, {}, {"all": 20.0}, 4, 8, "served"),
    ]
    assert [line[2] for line in table(rows).splitlines()[2:]] == ["c", "b", "a"]
