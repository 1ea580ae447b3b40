"""Text to tokens and back, and chat messages to tokens.

`Tokenizer` is the seam the engine and the server see. The real one is a `tokenizers.Tokenizer` that transformers has
loaded or converted; encoding and decoding go straight to it, transformers is kept for chat templates alone. Templates
come with the model and are not trusted: they run in transformers' immutable Jinja sandbox, on plain data.

Decoding is defined per token as bytes (`text_bytes`), the text being their UTF-8 with U+FFFD for malformed sequences.
That equals the decoders of byte-level BPE, and those of sentencepiece vocabularies with byte fallback on every
well-formed text; a malformed run of fallback bytes costs one U+FFFD per malformed sequence, not one per byte, which is
what makes a stream of deltas equal to decoding at once.
"""

from __future__ import annotations

import inspect
import json
import logging
import re
import tempfile
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol, TypedDict, Unpack

from dibit.engine.byte_rule import ByteRule
from dibit.engine.chat_end import chat_end_ids
from dibit.engine.detokenizer import IncrementalDetokenizer
from dibit.engine.errors import CheckpointError, RequestError

if TYPE_CHECKING:
    import tokenizers

logger = logging.getLogger(__name__)

_SURROGATE = re.compile("[\ud800-\udfff]")


class ChatOptions(TypedDict, total=False):
    """Keywords of `Tokenizer.chat_text`.

    add_generation_prompt   end with the beginning of the assistant's answer (so by default)
    continue_final_message  leave the last message open, to be continued
    tools                   what the model may call, as the template expects them
    template_args           variables of the template, for example `enable_thinking`
    """

    add_generation_prompt: bool
    continue_final_message: bool
    tools: Sequence[Mapping[str, Any]] | None
    template_args: Mapping[str, Any] | None


class Tokenizer(Protocol):
    """What the engine and the server need of a tokenizer. Safe to use from several threads."""

    @property
    def eos_ids(self) -> frozenset[int]:
        """Ids that end a text or a chat turn."""
        ...

    @property
    def vocab_size(self) -> int:
        """One more than the highest id it knows; the model's own vocabulary may be padded beyond it."""
        ...

    def encode(self, text: str, *, add_special_tokens: bool = True) -> list[int]:
        """Ids of a text, after the tokens every text starts with (e.g. BOS) if asked for."""
        ...

    def decode(self, ids: Sequence[int], *, skip_special_tokens: bool = True) -> str:
        """Text of ids; unknown ids add nothing."""
        ...

    def apply_chat_template(
        self,
        messages: Sequence[Mapping[str, Any]],
        **options: Unpack[ChatOptions],
    ) -> list[int]:
        """Ids of a conversation; RequestError when there is no template, or it refuses the messages."""
        ...

    def chat_text(
        self,
        messages: Sequence[Mapping[str, Any]],
        *,
        add_generation_prompt: bool = True,
        continue_final_message: bool = False,
        tools: Sequence[Mapping[str, Any]] | None = None,
        template_args: Mapping[str, Any] | None = None,
    ) -> str:
        """The text of the same, to be encoded without special tokens of its own."""
        ...

    def token_text(self, token_id: int) -> str:
        """One token's text by itself, special tokens too."""
        ...

    def token_bytes(self, token_id: int) -> bytes:
        """One token's bytes inside a text, special tokens too; b"" for an unknown id."""
        ...

    def text_bytes(self, token_id: int, *, first: bool) -> bytes | None:
        """See `detokenizer.Pieces`."""
        ...

    def stream(
        self, prompt_ids: Sequence[int], *, stop: Sequence[str] = (), include_stop: bool = False
    ) -> IncrementalDetokenizer:
        """A detokenizer for what follows the prompt."""
        ...


class TokenizerSource(Protocol):
    """The part of a checkpoint that concerns its tokenizer."""

    @property
    def path(self) -> Path: ...

    @property
    def config(self) -> dict[str, Any]: ...

    def write_tokenizer(self, directory: Path) -> None: ...


def load_tokenizer(checkpoint: TokenizerSource) -> HFTokenizer:
    """The tokenizer of a checkpoint: from its directory, or from files written aside for one that is a single file."""
    if checkpoint.path.is_dir():
        return load_tokenizer_directory(checkpoint.path, config=checkpoint.config)
    with tempfile.TemporaryDirectory(prefix="dibit-tokenizer-") as directory:
        checkpoint.write_tokenizer(Path(directory))
        return load_tokenizer_directory(Path(directory), config=checkpoint.config, name=str(checkpoint.path))


def load_tokenizer_directory(
    directory: Path, *, config: Mapping[str, Any] | None = None, name: str | None = None
) -> HFTokenizer:
    """The tokenizer in `directory`. `config` is the model's config.json; `name` stands in messages for the directory.

    Reads local files only and never runs code that comes with the model. Raises CheckpointError.
    """
    name = name or str(directory)
    try:
        hf = _load(directory, config or {})
    except Exception as error:
        raise CheckpointError(
            f"the tokenizer of {name} cannot be loaded: {_line(error)}. Supported: tokenizer.json, or a sentencepiece "
            "tokenizer.model, beside tokenizer_config.json; check that these files are there and complete"
        ) from error
    backend = getattr(hf, "backend_tokenizer", None) if getattr(hf, "is_fast", False) else None
    if backend is None:
        raise CheckpointError(
            f"the tokenizer of {name} is a {type(hf).__name__}, which has no tokenizer.json form; "
            "save it with transformers as a fast tokenizer (tokenizer.json) beside the model"
        )
    if not backend.get_vocab_size(with_added_tokens=False):
        raise CheckpointError(f"{name} has no vocabulary; put the model's tokenizer.json or tokenizer.model there")
    eos = set(_ids(hf.eos_token_id, "the tokenizer's eos_token_id"))
    eos.update(_ids((config or {}).get("eos_token_id"), "config.json: eos_token_id"))
    generation = _ids(
        _json(directory / "generation_config.json").get("eos_token_id"), "generation_config.json: eos_token_id"
    )
    eos.update(generation)
    if not generation:
        eos.update(chat_end_ids(_special(backend), _template_text(hf.chat_template)))
    return HFTokenizer(hf, backend, frozenset(eos), name=name)


@dataclass(frozen=True)
class _ModelType:
    """What AutoTokenizer reads of a model's config once the tokenizer's own names a class. Given the config itself, it
    imports the code of the model, torch's compiler with it: two seconds."""

    model_type: str
    tokenizer_class: str | None
    model_name: str | None = None
    _name_or_path: str = ""


# Classes that are nothing but tokenizer.json. For this type of model AutoTokenizer takes them at their word, and to say
# so looks at the files of every model that transformers knows: 0.3 of the 3 seconds of a start.
_GENERIC = ("PreTrainedTokenizerFast", "TokenizersBackend")
_TRUSTED_TYPE = "llama"


def _load(directory: Path, config: Mapping[str, Any]) -> Any:
    model_type, own = config.get("model_type"), _json(directory / "tokenizer_config.json")
    plain = own.get("tokenizer_class") in _GENERIC and "auto_map" not in own
    if plain and model_type == _TRUSTED_TYPE and (directory / "tokenizer.json").is_file():
        from transformers import PreTrainedTokenizerFast

        return PreTrainedTokenizerFast.from_pretrained(directory, local_files_only=True)
    from transformers import AutoTokenizer

    load = partial(AutoTokenizer.from_pretrained, directory, local_files_only=True, trust_remote_code=False)
    if isinstance(model_type, str) and isinstance(own.get("tokenizer_class"), str) and "auto_map" not in own:
        try:
            return load(config=_ModelType(model_type, config.get("tokenizer_class")))
        except Exception as error:
            logger.info("the tokenizer is loaded with the model's config: %s", _line(error))
    return load()


class HFTokenizer:
    """A `Tokenizer` over a fast tokenizer of transformers."""

    def __init__(self, hf: Any, backend: tokenizers.Tokenizer, eos_ids: frozenset[int], *, name: str) -> None:
        self._hf = hf
        self._backend = backend
        self._name = name
        self._eos_ids = eos_ids
        # A tokenizer.json may carry the truncation and padding of its training; neither belongs to a prompt.
        backend.no_truncation()
        backend.no_padding()
        self._special_ids = frozenset(_special(backend).values())
        added = backend.get_added_tokens_decoder()
        self._vocab_size = max([backend.get_vocab_size(with_added_tokens=True), *(i + 1 for i in added)])
        self._rule = ByteRule.of_decoder(json.loads(backend.to_str())["decoder"])
        self._reserved = frozenset(inspect.signature(hf.apply_chat_template).parameters)

    @property
    def eos_ids(self) -> frozenset[int]:
        return self._eos_ids

    @property
    def bos_id(self) -> int | None:
        """The token that begins a text, which `encode` does not always write; None without one."""
        ids = _ids(self._hf.bos_token_id, "the tokenizer's bos_token_id")
        return next(iter(ids), None)

    @property
    def vocab_size(self) -> int:
        return self._vocab_size

    def encode(self, text: str, *, add_special_tokens: bool = True) -> list[int]:
        surrogate = _SURROGATE.search(text)
        if surrogate is not None:
            raise RequestError(
                f"the text holds an unpaired surrogate (U+{ord(surrogate.group()):04X} at character "
                f"{surrogate.start()}), which is not valid Unicode; remove it",
                param="prompt",
            )
        # Not `encode`, which keeps every other thread of the process from running Python meanwhile.
        (found,) = self._backend.encode_batch_fast([text], add_special_tokens=add_special_tokens)
        ids: list[int] = found.ids
        return ids

    def decode(self, ids: Sequence[int], *, skip_special_tokens: bool = True) -> str:
        pieces: list[bytes] = []
        for token_id in ids:
            piece = self._piece(token_id, first=not pieces)
            if piece is not None and not (skip_special_tokens and token_id in self._special_ids):
                pieces.append(piece)
        return b"".join(pieces).decode("utf-8", "replace")

    def apply_chat_template(self, messages: Sequence[Mapping[str, Any]], **options: Unpack[ChatOptions]) -> list[int]:
        return self.encode(self.chat_text(messages, **options), add_special_tokens=False)

    def chat_text(
        self,
        messages: Sequence[Mapping[str, Any]],
        *,
        add_generation_prompt: bool = True,
        continue_final_message: bool = False,
        tools: Sequence[Mapping[str, Any]] | None = None,
        template_args: Mapping[str, Any] | None = None,
    ) -> str:
        """`template_args` reach the template as variables (for example `enable_thinking`)."""
        if not self._hf.chat_template:
            raise RequestError(
                f"{self._name} has no chat template, so messages cannot be turned into a prompt; send a plain prompt "
                "(a completion), or put the model's chat_template.jinja beside its tokenizer",
                param="messages",
            )
        reserved = sorted(self._reserved.intersection(template_args or ()))
        if reserved:
            raise RequestError(
                f"{', '.join(reserved)} cannot be set as a chat template variable", param="chat_template_kwargs"
            )
        try:
            text: str = self._hf.apply_chat_template(
                [dict(message) for message in messages],
                tools=None if tools is None else [dict(tool) for tool in tools],
                add_generation_prompt=add_generation_prompt,
                continue_final_message=continue_final_message,
                tokenize=False,
                **(template_args or {}),
            )
        except Exception as error:
            raise RequestError(
                f"the model's chat template does not accept these messages: {_line(error)}", param="messages"
            ) from error
        return text

    def token_text(self, token_id: int) -> str:
        return self.token_bytes(token_id).decode("utf-8", "replace")

    def token_bytes(self, token_id: int) -> bytes:
        return self._piece(token_id, first=False) or b""

    def text_bytes(self, token_id: int, *, first: bool) -> bytes | None:
        return None if token_id in self._special_ids else self._piece(token_id, first=first)

    def stream(
        self, prompt_ids: Sequence[int], *, stop: Sequence[str] = (), include_stop: bool = False
    ) -> IncrementalDetokenizer:
        return IncrementalDetokenizer(self, prompt_ids, stop, include_stop=include_stop)

    def _piece(self, token_id: int, *, first: bool) -> bytes | None:
        token = self._backend.id_to_token(token_id) if 0 <= token_id < self._vocab_size else None
        return None if token is None else self._rule.piece(token, first=first)


def _special(backend: tokenizers.Tokenizer) -> dict[str, int]:
    return {token.content: i for i, token in backend.get_added_tokens_decoder().items() if token.special}


def _template_text(template: str | Mapping[str, str] | None) -> str:
    if template is None or isinstance(template, str):
        return template or ""
    return "\n".join(template.values())


def _json(path: Path) -> dict[str, Any]:
    """The object in a file that may be missing."""
    if not path.exists():
        return {}
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{path} cannot be read as JSON: {_line(error)}; mend or remove it") from error
    if not isinstance(content, dict):
        raise CheckpointError(f"{path} holds a {type(content).__name__}, not an object; mend or remove it")
    return content


def _ids(value: object, where: str) -> tuple[int, ...]:
    if value is None:
        return ()
    ids: Iterable[object] = value if isinstance(value, list | tuple) else (value,)
    found = tuple(i for i in ids if isinstance(i, int) and not isinstance(i, bool))
    if found != tuple(ids):
        raise CheckpointError(f"{where} is {value!r}; it must be a token id or a list of token ids")
    return found


def _line(error: Exception) -> str:
    """The message of somebody else's error, on one line."""
    return " ".join(str(error).split()) or type(error).__name__
