"""The tokenizer inside a GGUF file, rebuilt as a tokenizer.json with the files that go beside it.

Two kinds are built: "gpt2", byte-level BPE whose way of cutting text into words is named by `tokenizer.ggml.pre`, and
"llama", sentencepiece BPE, where merges are ranked by the score of what they make. Ids are positions in
`tokenizer.ggml.tokens`, so they are the model's own. A kind or a way of cutting that is not known is refused: a guess
would encode most text rightly and some of it wrongly.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from enum import IntEnum
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol, TypeVar

from dibit.engine.chat_end import CHAT_END_TOKENS, chat_end_ids
from dibit.engine.errors import CheckpointError

if TYPE_CHECKING:
    import tokenizers

T = TypeVar("T")

_GPT2_WORDS = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
_ONE_DIGIT = r"\p{N}"
_UPPER, _LOWER = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]", r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"
_CONTRACTION = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)"
_SPACES = r"\s*[\r\n]+|\s+(?!\S)|\s+"


def _tiktoken_words(digits: str) -> str:
    """The cut of cl100k: words with one leading non-letter, and digits as given."""
    return rf"{_CONTRACTION}|[^\r\n\p{{L}}\p{{N}}]?\p{{L}}+|{digits}| ?[^\s\p{{L}}\p{{N}}]+[\r\n]*|{_SPACES}"


def _cased_words(digits: str, *, contraction: str) -> str:
    """The cut of o200k: as above, a word's capitals standing only at its start."""
    lead = r"[^\r\n\p{L}\p{N}]?"
    words = rf"{lead}{_UPPER}*{_LOWER}+{contraction}|{lead}{_UPPER}+{_LOWER}*{contraction}"
    return rf"{words}|{digits}| ?[^\s\p{{L}}\p{{N}}]+[\r\n/]*|{_SPACES}"


@dataclass(frozen=True)
class Pre:
    """How a byte-level BPE cuts text before merging.

    cuts           patterns applied one after the other, each match a word of its own
    whole_words    a word that is a token is not merged up from its bytes
    add_bos        BOS starts a text, unless the file says otherwise
    nfc            text is brought to Unicode normal form C first
    """

    cuts: tuple[str, ...]
    whole_words: bool = False
    add_bos: bool = False
    nfc: bool = False


_GPT2 = Pre((_GPT2_WORDS,))
_DIGITS_GPT2 = Pre((_ONE_DIGIT, _GPT2_WORDS))
_LLAMA3 = Pre((_tiktoken_words(r"\p{N}{1,3}"),), whole_words=True, add_bos=True)
_QWEN2 = Pre((_tiktoken_words(r"\p{N}"),), nfc=True)
_TEKKEN = Pre((_cased_words(r"\p{N}", contraction=""),), whole_words=True, add_bos=True)

PRE: dict[str, Pre] = {
    "default": Pre((r"[\p{P}\$\+<=>\^~\|]+", _GPT2_WORDS, r"\p{N}+", r"[0-9][0-9][0-9]")),
    "gpt-2": _GPT2,
    "smollm": _DIGITS_GPT2,
    "starcoder": _DIGITS_GPT2,
    "refact": _DIGITS_GPT2,
    "codeshell": _DIGITS_GPT2,
    "minerva-7b": _DIGITS_GPT2,
    "llama-bpe": _LLAMA3,
    "llama3": _LLAMA3,
    "llama-v3": _LLAMA3,
    "falcon3": _LLAMA3,
    "smaug-bpe": Pre(_LLAMA3.cuts),
    "qwen2": _QWEN2,
    "deepseek-r1-qwen": _QWEN2,
    "tekken": _TEKKEN,
    "gpt-4o": Pre((_cased_words(r"\p{N}{1,3}", contraction=f"{_CONTRACTION}?"),)),
    "deepseek-coder": Pre((r"[\r\n]", r"\s?\p{L}+", r"\s?\p{P}+", r"[一-龥ࠀ-一가-퟿]+", _ONE_DIGIT)),
}


class TokenType(IntEnum):
    """`tokenizer.ggml.token_type`; those of sentencepiece's model proto."""

    NORMAL = 1
    UNKNOWN = 2
    CONTROL = 3
    USER_DEFINED = 4
    UNUSED = 5
    BYTE = 6


class Field(Protocol):
    """A metadata entry as gguf.GGUFReader gives it in `fields`."""

    def contents(self) -> Any: ...


def write_tokenizer_files(fields: Mapping[str, Field], directory: Path) -> None:
    """Write tokenizer.json, tokenizer_config.json, special_tokens_map.json and generation_config.json.

    `fields` is the metadata of the GGUF file (`gguf.GGUFReader(...).fields`); `directory` exists. transformers loads
    the result with AutoTokenizer, and gives the ids of the model. Raises CheckpointError.
    """
    vocab = Vocabulary.of(fields)
    templates = _chat_templates(fields)
    named = {f"{role}_token": vocab.tokens[i] for role, i in vocab.roles.items()}
    config: dict[str, Any] = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "clean_up_tokenization_spaces": False,
        **named,
    }
    if set(templates) == {"default"}:
        config["chat_template"] = templates["default"]
    elif templates:
        config["chat_template"] = [{"name": name, "template": text} for name, text in templates.items()]
    eos = {i for key in ("eot", "eom") if (i := _token_id(fields, key, vocab.tokens)) is not None}
    eos |= {i for role, i in vocab.roles.items() if role == "eos"}
    eos |= chat_end_ids({vocab.tokens[i]: i for i in vocab.special}, "\n".join(templates.values()))
    generation: dict[str, Any] = {f"{role}_token_id": i for role, i in vocab.roles.items() if role in ("bos", "pad")}
    if eos:
        generation["eos_token_id"] = min(eos) if len(eos) == 1 else sorted(eos)

    tokenizer = build_tokenizer(fields, vocab)
    tokenizer.save(str(directory / "tokenizer.json"))
    for name, content in (
        ("tokenizer_config.json", config),
        ("special_tokens_map.json", named),
        ("generation_config.json", generation),
    ):
        (directory / name).write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


@dataclass(frozen=True)
class Vocabulary:
    """tokens and their types by id; `roles`: the ids of bos, eos, unk, pad where there are; `special`: ids that
    never show in a text; `user_defined`: ids found in a text before anything else."""

    kind: str
    tokens: tuple[str, ...]
    roles: dict[str, int]
    special: tuple[int, ...]
    user_defined: tuple[int, ...]

    @classmethod
    def of(cls, fields: Mapping[str, Field]) -> Vocabulary:
        kind = _one(fields, "tokenizer.ggml.model", str)
        if kind not in ("gpt2", "llama"):
            raise CheckpointError(
                f"the GGUF file's tokenizer is of the kind {kind!r} (tokenizer.ggml.model); supported: 'gpt2' "
                "(byte-level BPE), 'llama' (sentencepiece BPE)"
            )
        tokens = tuple(_list(fields, "tokenizer.ggml.tokens", str) or ())
        if not tokens:
            raise CheckpointError(
                "the GGUF file has no tokens (tokenizer.ggml.tokens); it was cut short or has no text"
            )
        types = _list(fields, "tokenizer.ggml.token_type", int) or [TokenType.NORMAL] * len(tokens)
        if len(types) != len(tokens):
            raise CheckpointError(f"the GGUF file has {len(tokens)} tokens and {len(types)} token types")
        roles = {}
        for role, key in (("bos", "bos"), ("eos", "eos"), ("unk", "unknown"), ("pad", "padding")):
            token_id = _token_id(fields, key, tokens)
            if token_id is None and kind == "llama":
                token_id = {"bos": 1, "eos": 2, "unk": 0}.get(role)
            if token_id is not None and token_id < len(tokens):
                roles[role] = token_id
        hidden = {TokenType.CONTROL, TokenType.UNKNOWN}
        special = {i for i, (token, t) in enumerate(zip(tokens, types, strict=True)) if t in hidden and token}
        special |= {i for i, t in enumerate(types) if t == TokenType.USER_DEFINED and tokens[i] in CHAT_END_TOKENS}
        special |= set(roles.values())
        user_defined = {i for i, t in enumerate(types) if t == TokenType.USER_DEFINED and tokens[i]} - special
        return cls(kind, tokens, roles, tuple(sorted(special)), tuple(sorted(user_defined)))


def build_tokenizer(fields: Mapping[str, Field], vocab: Vocabulary) -> tokenizers.Tokenizer:
    """The `tokenizers.Tokenizer` of the metadata. Raises CheckpointError."""
    from tokenizers import AddedToken

    try:
        if vocab.kind == "gpt2":
            tokenizer, add_bos = _byte_level(fields, vocab)
        else:
            tokenizer, add_bos = _sentencepiece(fields, vocab), True
        for ids, special in ((vocab.special, True), (vocab.user_defined, False)):
            tokenizer.add_tokens([AddedToken(vocab.tokens[i], special=special, normalized=False) for i in ids])
        add_bos = _flag(fields, "add_bos_token", default=add_bos)
        add_eos = _flag(fields, "add_eos_token", default=False)
        _frame(tokenizer, vocab, [role for role, add in (("bos", add_bos), ("eos", add_eos)) if add])
    except CheckpointError:
        raise
    except Exception as error:
        raise CheckpointError(
            f"the GGUF file's tokenizer does not hold together: {error}; convert the model again"
        ) from error
    return tokenizer


def _frame(tokenizer: tokenizers.Tokenizer, vocab: Vocabulary, roles: Sequence[str]) -> None:
    """Let every text begin with BOS and end with EOS, as far as they are in `roles` and in the vocabulary."""
    from tokenizers import processors

    around = {role: (vocab.tokens[vocab.roles[role]], vocab.roles[role]) for role in roles if role in vocab.roles}
    if around:
        begin, end = ([around[role][0]] if role in around else [] for role in ("bos", "eos"))
        tokenizer.post_processor = processors.TemplateProcessing(
            single=[*begin, "$A", *end], special_tokens=list(around.values())
        )


def _byte_level(fields: Mapping[str, Field], vocab: Vocabulary) -> tuple[tokenizers.Tokenizer, bool]:
    """The tokenizer, and whether BOS starts a text when the file does not say."""
    from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers

    name = _one(fields, "tokenizer.ggml.pre", str)
    if name not in PRE:
        raise CheckpointError(
            f"the GGUF file names the pre-tokenizer {name!r} (tokenizer.ggml.pre); "
            f"supported: {', '.join(sorted(PRE))}. Use the model's Hugging Face files instead"
            + ("" if name else ", or convert the model again with a newer converter, which writes the name")
        )
    pre = PRE[name]
    merges = _list(fields, "tokenizer.ggml.merges", str)
    if merges is None:
        raise CheckpointError("the GGUF file has a byte-level BPE without merges (tokenizer.ggml.merges)")
    tokenizer = Tokenizer(
        models.BPE(_first_ids(vocab.tokens), [_pair(merge) for merge in merges], ignore_merges=pre.whole_words)
    )
    if pre.nfc:
        tokenizer.normalizer = normalizers.NFC()
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            *(pre_tokenizers.Split(Regex(cut), behavior="isolated") for cut in pre.cuts),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer, pre.add_bos


def _sentencepiece(fields: Mapping[str, Field], vocab: Vocabulary) -> tokenizers.Tokenizer:
    from tokenizers import Tokenizer, decoders, models, normalizers

    scores = _list(fields, "tokenizer.ggml.scores", float)
    if scores is None or len(scores) != len(vocab.tokens):
        raise CheckpointError(
            f"the GGUF file has {len(vocab.tokens)} tokens and {len(scores or ())} scores (tokenizer.ggml.scores); "
            "a sentencepiece vocabulary needs one for each"
        )
    left_alone = {*vocab.special, *vocab.user_defined}
    ids = _first_ids(vocab.tokens)
    parts = {token: i for token, i in ids.items() if i not in left_alone}
    unknown = vocab.roles.get("unk")
    tokenizer = Tokenizer(
        models.BPE(
            ids,
            _merges_by_score(parts, scores),
            unk_token=None if unknown is None else vocab.tokens[unknown],
            fuse_unk=True,
            byte_fallback=True,
        )
    )
    prefix = _flag(fields, "add_space_prefix", default=True)
    spaces = [normalizers.Replace(" ", "▁")]
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), *spaces] if prefix else spaces)
    steps: list[Any] = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    tokenizer.decoder = decoders.Sequence([*steps, decoders.Strip(" ", 1, 0)] if prefix else steps)
    return tokenizer


def _merges_by_score(parts: Mapping[str, int], scores: Sequence[float]) -> list[tuple[str, str]]:
    """Every way to make a token of two others, best token first, as sentencepiece would merge them."""
    ranked = [
        (-scores[token_id], token_id, parts[left], parts[right], left, right)
        for token, token_id in parts.items()
        for cut in range(1, len(token))
        if (left := token[:cut]) in parts and (right := token[cut:]) in parts
    ]
    return [(left, right) for *_, left, right in sorted(ranked)]


def _first_ids(tokens: Sequence[str]) -> dict[str, int]:
    """Id of each token; the first, where a padded vocabulary repeats one."""
    ids: dict[str, int] = {}
    for i, token in enumerate(tokens):
        ids.setdefault(token, i)
    return ids


def _pair(merge: str) -> tuple[str, str]:
    cut = merge.find(" ", 1)
    if cut < 0:
        raise CheckpointError(f"the GGUF file has the merge {merge!r}, which is not two tokens and a space between")
    return merge[:cut], merge[cut + 1 :]


def _chat_templates(fields: Mapping[str, Field]) -> dict[str, str]:
    named = _list(fields, "tokenizer.chat_templates", str) or []
    keys = {"default": "tokenizer.chat_template", **{name: f"tokenizer.chat_template.{name}" for name in named}}
    return {name: text for name, key in keys.items() if (text := _one(fields, key, str))}


def _token_id(fields: Mapping[str, Field], key: str, tokens: Sequence[str]) -> int | None:
    value = _one(fields, f"tokenizer.ggml.{key}_token_id", int)
    if value is not None and not 0 <= value < len(tokens):
        raise CheckpointError(
            f"the GGUF file's tokenizer.ggml.{key}_token_id is {value}; its tokens are 0 to {len(tokens) - 1}"
        )
    return value


def _flag(fields: Mapping[str, Field], key: str, *, default: bool) -> bool:
    value = _one(fields, f"tokenizer.ggml.{key}", bool)
    return default if value is None else value


def _one(fields: Mapping[str, Field], key: str, kind: type[T]) -> T | None:
    """A metadata entry of this type; None if the file has none."""
    value = fields[key].contents() if key in fields else None
    if value is not None and type(value) is not kind:
        raise CheckpointError(f"the GGUF file's {key} is a {type(value).__name__}; it must be a {kind.__name__}")
    return value


def _list(fields: Mapping[str, Field], key: str, kind: type[T]) -> list[T] | None:
    """A metadata entry that is a list of this type; None if the file has none."""
    value = _one(fields, key, list)
    if value is not None and (wrong := {type(item) for item in value} - {kind}):
        found = ", ".join(sorted(t.__name__ for t in wrong))
        raise CheckpointError(f"the GGUF file's {key} holds {found}; it must hold only {kind.__name__}")
    return value
