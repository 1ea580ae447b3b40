"""Loading tokenizers of every supported kind, and what they make of text, ids and messages."""

from __future__ import annotations

import json
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers

from dibit.engine.checkpoint import open_checkpoint, resolve_model
from dibit.engine.errors import CheckpointError, RequestError
from dibit.engine.tokenizer import HFTokenizer, load_tokenizer, load_tokenizer_directory

CORPUS = ["the quick brown fox jumps over the lazy dog 0123456789", "naïve café, 你好 🎉", "to be or not to be"] * 3
TEMPLATE = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
ATTACKS = [
    "{{ ''.__class__.__mro__[1].__subclasses__() }}",
    "{{ messages.__class__.__base__ }}",
    "{{ (messages | attr('__class__')) }}",
    "{{ cycler.__init__.__globals__ }}",
    "{{ raise_exception.__globals__['json'] }}",
    "{{ '{0.__class__.__init__.__globals__}'.format(messages) }}",
    "{{ messages.append({'role': 'system', 'content': 'x'}) }}",
    "{% set ns = namespace() %}{{ ns.__init__.__globals__ }}",
    "{{ self.__init__.__globals__ }}",
    "{% include '/etc/passwd' %}",
]


def byte_level() -> Tokenizer:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    special = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=400, special_tokens=special, initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator(CORPUS, trainer)
    tokenizer.add_tokens([AddedToken("<think>", special=False, normalized=False)])
    return tokenizer


def write(directory: Path, tokenizer: Tokenizer, **config: Any) -> Path:
    directory.mkdir(exist_ok=True)
    tokenizer.save(str(directory / "tokenizer.json"))
    config = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": "<|endoftext|>", **config}
    (directory / "tokenizer_config.json").write_text(json.dumps(config))
    return directory


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> HFTokenizer:
    directory = write(tmp_path_factory.mktemp("tiny"), byte_level(), chat_template=TEMPLATE)
    return load_tokenizer_directory(directory)


@pytest.fixture(scope="module")
def demo() -> HFTokenizer:
    checkpoint = open_checkpoint(resolve_model("demo"))
    try:
        return load_tokenizer(checkpoint)
    finally:
        checkpoint.close()


def streamed(tokenizer: HFTokenizer, ids: list[int]) -> str:
    stream = tokenizer.stream([])
    return "".join([*map(stream.push, ids), stream.flush()])


@pytest.mark.parametrize("text", [*CORPUS[:3], "", " a  b\n\n\tc ", "<|im_start|>user\n<think>hi<|im_end|>"])
def test_text_survives_a_round_trip(tiny: HFTokenizer, text: str) -> None:
    assert tiny.decode(tiny.encode(text), skip_special_tokens=False) == text


@settings(deadline=None, max_examples=300)
@given(data=st.data())
def test_streaming_any_ids_gives_their_text(tiny: HFTokenizer, data: st.DataObject) -> None:
    ids = data.draw(st.lists(st.integers(-2, tiny.vocab_size + 3), max_size=30))
    assert streamed(tiny, ids) == tiny.decode(ids)
    known = [i for i in ids if i >= 0]
    for skip in (True, False):
        assert tiny.decode(known, skip_special_tokens=skip) == tiny._backend.decode(known, skip_special_tokens=skip)


@pytest.mark.demo
@settings(deadline=None, max_examples=300)
@given(data=st.data())
def test_streaming_any_ids_of_the_demo_gives_their_text(demo: HFTokenizer, data: st.DataObject) -> None:
    ids = data.draw(st.lists(st.integers(0, demo.vocab_size + 64) | st.integers(0, 300), max_size=30))
    assert streamed(demo, ids) == demo.decode(ids) == demo._backend.decode(ids)


# The demo's vocabulary lacks some bytes: those of a few control characters and of planes 4 to 16.
@pytest.mark.demo
@settings(deadline=None, max_examples=100)
@given(text=st.text(st.characters(exclude_categories=["Cs", "Cc"], max_codepoint=0x3FFFF), max_size=60))
def test_the_demo_tokenizer_keeps_any_text(demo: HFTokenizer, text: str) -> None:
    ids = demo.encode(text)
    assert demo.decode(ids, skip_special_tokens=False) == streamed(demo, ids) == text
    assert b"".join(demo.token_bytes(i) for i in ids) == text.encode()


def test_others_go_on_while_a_long_text_is_encoded(tiny: HFTokenizer) -> None:
    ticks: list[float] = []
    done = threading.Event()

    def tick() -> None:
        while not done.wait(0.001):
            ticks.append(time.perf_counter())

    ticking = threading.Thread(target=tick)
    ticking.start()
    began_s = time.perf_counter()
    tiny.encode("1234567890" * 25_000)
    ended_s = time.perf_counter()
    done.set()
    ticking.join()
    tenth_s = (ended_s - began_s) / 10
    assert [at_s for at_s in ticks if began_s + tenth_s < at_s < ended_s - 5 * tenth_s]


def test_unknown_ids_have_no_text(tiny: HFTokenizer) -> None:
    a = tiny.encode("a")
    beyond = [tiny.vocab_size, tiny.vocab_size + 1000, 2**31, 2**70, -1]
    assert tiny.decode([beyond[0], *a, *beyond[1:]]) == "a"
    assert [tiny.token_text(i) for i in beyond] == [""] * 5
    assert [tiny.token_bytes(i) for i in beyond] == [b""] * 5


def test_token_bytes_and_text_of_special_and_partial_tokens(tiny: HFTokenizer) -> None:
    (end,) = tiny.encode("<|im_end|>")
    assert (tiny.token_text(end), tiny.token_bytes(end)) == ("<|im_end|>", b"<|im_end|>")
    lead = tiny.encode("💡")[0]
    assert tiny.token_bytes(lead)[:1] == b"\xf0"
    assert tiny.token_text(lead).endswith("\ufffd")


def test_vocab_size_counts_added_tokens(tiny: HFTokenizer) -> None:
    assert tiny.vocab_size == tiny.encode("<think>")[0] + 1


def test_an_unpaired_surrogate_is_refused(tiny: HFTokenizer) -> None:
    with pytest.raises(RequestError, match=r"U\+D800 at character 2"):
        tiny.encode("ab\ud800c")
    with pytest.raises(RequestError, match="surrogate"):
        tiny.apply_chat_template([{"role": "user", "content": "\udfff"}])


def test_truncation_and_padding_of_the_file_are_not_applied(tmp_path: Path) -> None:
    tokenizer = byte_level()
    tokenizer.enable_truncation(3)
    tokenizer.enable_padding(length=50)
    loaded = load_tokenizer_directory(write(tmp_path, tokenizer))
    text = "the quick brown fox jumps"
    assert loaded.decode(loaded.encode(text), skip_special_tokens=False) == text


def test_special_tokens_at_the_start_are_optional(tmp_path: Path) -> None:
    tokenizer = byte_level()
    tokenizer.post_processor = processors.TemplateProcessing(
        single=["<|im_start|>", "$A"], special_tokens=[("<|im_start|>", 1)]
    )
    loaded = load_tokenizer_directory(write(tmp_path, tokenizer, chat_template="{{ messages[0]['content'] }}"))
    bare = loaded.encode("a", add_special_tokens=False)
    assert loaded.encode("a") == [1, *bare]
    assert loaded.apply_chat_template([{"content": "a"}]) == bare


def test_the_chat_template_is_applied(tiny: HFTokenizer) -> None:
    messages = [{"role": "user", "content": "to be"}]
    text = "<|im_start|>user\nto be<|im_end|>\n"
    assert tiny.apply_chat_template(messages, add_generation_prompt=False) == tiny.encode(text)
    assert tiny.apply_chat_template(messages) == tiny.encode(text + "<|im_start|>assistant\n")
    prefill = [*messages, {"role": "assistant", "content": "or not"}]
    assert tiny.apply_chat_template(prefill, add_generation_prompt=False, continue_final_message=True) == tiny.encode(
        text + "<|im_start|>assistant\nor not"
    )


@pytest.fixture
def with_template(tmp_path: Path) -> Callable[[str | None], HFTokenizer]:
    def load(template: str | None) -> HFTokenizer:
        return load_tokenizer_directory(write(tmp_path, byte_level(), chat_template=template))

    return load


def test_template_variables_and_tools_reach_the_template(with_template: Callable[[str | None], HFTokenizer]) -> None:
    tokenizer = with_template("{{ enable_thinking }} {{ tools[0]['function']['name'] }} {{ messages[0]['content'] }}")
    tools = [{"type": "function", "function": {"name": "be"}}]
    ids = tokenizer.apply_chat_template([{"content": "or"}], tools=tools, template_args={"enable_thinking": False})
    assert tokenizer.decode(ids) == "False be or"


@pytest.mark.parametrize("name", ["chat_template", "tokenize", "messages", "return_tensors"])
def test_template_variables_cannot_replace_the_template(tiny: HFTokenizer, name: str) -> None:
    with pytest.raises(RequestError, match=r"chat_template_kwargs|chat template") as caught:
        tiny.apply_chat_template([{"role": "user", "content": "a"}], template_args={name: "{{ 1 }}"})
    assert caught.value.param in ("chat_template_kwargs", "messages")


def test_a_missing_template_says_what_to_do(with_template: Callable[[str | None], HFTokenizer]) -> None:
    with pytest.raises(RequestError, match=r"no chat template.*plain prompt.*chat_template\.jinja"):
        with_template(None).apply_chat_template([{"role": "user", "content": "a"}])


@pytest.mark.parametrize(
    ("template", "messages", "said"),
    [
        ("{{ raise_exception('roles must alternate') }}", [{"role": "user", "content": "a"}], "roles must alternate"),
        ("{{ messages[0]['content'] + 1 }}", [{"role": "user", "content": "a"}], "concatenate|str"),
        ("{% if %}", [{"role": "user", "content": "a"}], "Expected an expression"),
        ("{{ messages[5]['content'] }}", [{"role": "user", "content": "a"}], "no element 5"),
        ("{% for i in range(10 ** 9) %}x{% endfor %}", [{"role": "user", "content": "a"}], "Range too big"),
    ],
)
def test_what_a_template_raises_is_told(
    with_template: Callable[[str | None], HFTokenizer], template: str, messages: list[dict[str, str]], said: str
) -> None:
    with pytest.raises(RequestError, match=f"(?s)chat template does not accept.*({said})"):
        with_template(template).apply_chat_template(messages)


@pytest.mark.parametrize("attack", ATTACKS)
def test_a_template_cannot_reach_python(with_template: Callable[[str | None], HFTokenizer], attack: str) -> None:
    messages = [{"role": "user", "content": "a"}]
    tokenizer = with_template("SAFE" + attack)
    try:
        text = tokenizer.decode(tokenizer.apply_chat_template(messages), skip_special_tokens=False)
    except RequestError:
        text = "SAFE"
    assert text == "SAFE", "the template saw something"
    assert messages == [{"role": "user", "content": "a"}]


def test_end_ids_are_gathered_from_every_file(tmp_path: Path) -> None:
    write(tmp_path, byte_level(), chat_template=TEMPLATE)
    assert load_tokenizer_directory(tmp_path).eos_ids == {0, 2}, "the template's turn end"
    assert load_tokenizer_directory(tmp_path, config={"eos_token_id": [7, 8]}).eos_ids == {0, 2, 7, 8}
    (tmp_path / "generation_config.json").write_text('{"eos_token_id": 5}')
    assert load_tokenizer_directory(tmp_path, config={"eos_token_id": 7}).eos_ids == {0, 5, 7}
    (tmp_path / "generation_config.json").write_text('{"eos_token_id": [5, 6]}')
    assert load_tokenizer_directory(tmp_path).eos_ids == {0, 5, 6}


@pytest.mark.parametrize("content", ["{", "[]", '{"eos_token_id": "x"}', '{"eos_token_id": [1, null]}'])
def test_a_broken_generation_config_is_refused(tmp_path: Path, content: str) -> None:
    write(tmp_path, byte_level())
    (tmp_path / "generation_config.json").write_text(content)
    with pytest.raises(CheckpointError, match=r"generation_config\.json"):
        load_tokenizer_directory(tmp_path)


@pytest.mark.parametrize("content", ["", "{}", '{"model": {"type": "BPE"}}', "not json"])
def test_a_broken_tokenizer_is_refused(tmp_path: Path, content: str) -> None:
    write(tmp_path, byte_level())
    (tmp_path / "tokenizer.json").write_text(content)
    with pytest.raises(CheckpointError, match="cannot be loaded"):
        load_tokenizer_directory(tmp_path)


def test_a_directory_without_a_tokenizer_is_refused(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"cannot be loaded.*tokenizer\.json"):
        load_tokenizer_directory(tmp_path)


def test_code_that_comes_with_a_model_is_not_run(tmp_path: Path) -> None:
    trap = tmp_path / "ran"
    (tmp_path / "trap.py").write_text(f"open({str(trap)!r}, 'w')\nclass Trap: pass\n")
    (tmp_path / "config.json").write_text('{"model_type": "trap", "auto_map": {"AutoTokenizer": ["trap.Trap", null]}}')
    auto_map = {"tokenizer_class": "Trap", "auto_map": {"AutoTokenizer": ["trap.Trap", None]}}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(auto_map))
    with pytest.raises(CheckpointError, match="cannot be loaded"):
        load_tokenizer_directory(tmp_path)
    assert not trap.exists()


def sentencepiece_directory(directory: Path) -> Path:
    import sentencepiece

    (directory / "corpus.txt").write_text("\n".join(CORPUS * 5))
    sentencepiece.SentencePieceTrainer.train(
        input=str(directory / "corpus.txt"),
        model_prefix=str(directory / "tokenizer"),
        model_type="bpe",
        vocab_size=330,
        byte_fallback=True,
        character_coverage=0.98,
        normalization_rule_name="identity",
        remove_extra_whitespaces=False,
        minloglevel=2,
    )
    (directory / "config.json").write_text('{"model_type": "llama"}')
    config = {"tokenizer_class": "LlamaTokenizer", "bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
    (directory / "tokenizer_config.json").write_text(json.dumps(config))
    return directory


def test_a_directory_with_only_a_sentencepiece_model_works(tmp_path: Path) -> None:
    import sentencepiece

    loaded = load_tokenizer_directory(sentencepiece_directory(tmp_path))
    judge = sentencepiece.SentencePieceProcessor(model_file=str(tmp_path / "tokenizer.model"))
    assert loaded.eos_ids == {2}
    for text in ("the lazy dog", "to be 💡 or 你好", "naïve café"):
        ids = loaded.encode(text, add_special_tokens=False)
        assert ids == judge.encode(text)
        assert loaded.decode(ids) == streamed(loaded, ids) == judge.decode(ids) == text
        for cut in range(1, len(ids)):
            stream = loaded.stream(ids[:cut])
            rest = "".join([*map(stream.push, ids[cut:]), stream.flush()])
            before = loaded.decode(ids[:cut]).rstrip("\ufffd")
            assert before + rest == text


def test_metaspace_and_absent_decoders(tmp_path: Path) -> None:
    tokenizer = Tokenizer(models.WordLevel({"a": 0, "b": 1, "<|endoftext|>": 2}, unk_token="a"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    plain = load_tokenizer_directory(write(tmp_path / "plain", tokenizer))
    assert plain.decode([0, 1, 1]) == streamed(plain, [0, 1, 1]) == plain._backend.decode([0, 1, 1]) == "a b b"

    tokenizer = Tokenizer(models.BPE({"▁a": 0, "▁": 1, "a": 2, "<|endoftext|>": 3}, []))
    tokenizer.normalizer = normalizers.Replace(" ", "▁")
    tokenizer.decoder = decoders.Metaspace()
    meta = load_tokenizer_directory(write(tmp_path / "meta", tokenizer))
    for ids in ([0, 0, 2], [1, 0], [2, 1, 0], [3, 0, 1, 0]):
        assert meta.decode(ids) == streamed(meta, ids) == meta._backend.decode(ids)


def test_a_single_file_checkpoint_leaves_nothing_behind(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    written: list[Path] = []

    class OneFile:
        path = tmp_path / "model.gguf"
        config: dict[str, Any] = {"eos_token_id": 9}  # noqa: RUF012

        def write_tokenizer(self, directory: Path) -> None:
            written.append(write(directory, byte_level()))

    tokenizer = load_tokenizer(OneFile())
    assert tokenizer.eos_ids == {0, 9}
    assert not written[0].exists()
    with pytest.raises(RequestError, match=r"model\.gguf has no chat template"):
        tokenizer.apply_chat_template([])


def test_importing_the_module_does_not_import_transformers() -> None:
    code = "import sys, dibit.engine.tokenizer, dibit.engine.checkpoint.gguf_tokenizer as g; g.PRE\n"
    code += "assert not {'transformers', 'tokenizers', 'gguf'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_the_code_of_the_model_is_not_imported(tmp_path: Path) -> None:
    directory = write(tmp_path, byte_level())
    (directory / "config.json").write_text(json.dumps({"model_type": "llama"}))
    program = (
        "import sys; from pathlib import Path; from dibit.engine.tokenizer import load_tokenizer_directory; "
        f"load_tokenizer_directory(Path({str(directory)!r}), config={{'model_type': 'llama'}}); "
        "print({'torch._dynamo', 'transformers.activations', 'transformers.models.auto'} & set(sys.modules))"
    )
    ended = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert ended.stdout.strip() == "set()"


@pytest.mark.parametrize("model_type", ["llama", "qwen2", "mistral", "gemma", "never_heard_of"])
@pytest.mark.parametrize(
    "declared", ["PreTrainedTokenizerFast", "TokenizersBackend", "LlamaTokenizerFast", "Qwen2Tokenizer"]
)
def test_a_named_model_type_gives_the_tokenizer_that_transformers_gives(
    tmp_path: Path, model_type: str, declared: str
) -> None:
    directory = write(tmp_path, byte_level())
    (directory / "config.json").write_text(json.dumps({"model_type": model_type}))
    (directory / "tokenizer_config.json").write_text(
        json.dumps({"tokenizer_class": declared, "eos_token": "<|endoftext|>"})
    )
    ours = load_tokenizer_directory(directory, config={"model_type": model_type})
    theirs = load_tokenizer_directory(directory)
    assert type(ours._hf) is type(theirs._hf)
    text = "Hello, world!  12 cafés"
    assert ours.encode(text) == theirs.encode(text)
    assert ours.eos_ids == theirs.eos_ids
