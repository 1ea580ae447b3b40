"""Log-probabilities in the two shapes the API has: a list of objects for chats, parallel lists for completions.

A token that is not whole UTF-8 by itself is written as "bytes:\\xe2\\x80", as the OpenAI API does, so that different
tokens never share a name. Minus infinity, which JSON lacks, is -9999.
"""

from __future__ import annotations

from collections.abc import Sequence

from dibit.engine.request import TokenLogprob
from dibit.engine.tokenizer import Tokenizer
from dibit.server.replies import ChatLogprob, ChatLogprobs, CompletionLogprobs, TopLogprob

LOWEST = -9999.0


def token_name(tokenizer: Tokenizer, token_id: int) -> str:
    raw = tokenizer.token_bytes(token_id)
    try:
        return raw.decode()
    except UnicodeDecodeError:
        return "bytes:" + "".join(f"\\x{byte:02x}" for byte in raw)


def chat_logprobs(tokenizer: Tokenizer, entries: Sequence[TokenLogprob]) -> ChatLogprobs:
    return {"content": [_chat_entry(tokenizer, entry) for entry in entries], "refusal": None}


def _chat_entry(tokenizer: Tokenizer, entry: TokenLogprob) -> ChatLogprob:
    chosen = _named(tokenizer, entry.token_id, entry.logprob)
    return {**chosen, "top_logprobs": [_named(tokenizer, token_id, logprob) for token_id, logprob in entry.top]}


def _named(tokenizer: Tokenizer, token_id: int, logprob: float) -> TopLogprob:
    return {
        "token": token_name(tokenizer, token_id),
        "logprob": max(logprob, LOWEST),
        "bytes": list(tokenizer.token_bytes(token_id)),
    }


class CompletionLogprobsWriter:
    """Running log-probabilities of one choice.

    A token's text_offset is the place of its first character in the choice's text (a token that does not show, or
    begins inside a character, has the place of what comes next). Under `echo` the prompt is part of the text.
    """

    def __init__(self, tokenizer: Tokenizer, prompt_ids: Sequence[int], *, echo: bool) -> None:
        self._tokenizer = tokenizer
        self._prompt_ids = prompt_ids
        self._offset = 0
        self._shown = not echo and any(tokenizer.text_bytes(i, first=False) is not None for i in prompt_ids)

    def prompt(self, entries: Sequence[TokenLogprob]) -> CompletionLogprobs:
        """Of the echoed prompt, whose first token has no log-probability."""
        return self._write(self._prompt_ids, [None, *entries])

    def output(self, entries: Sequence[TokenLogprob]) -> CompletionLogprobs:
        return self._write([entry.token_id for entry in entries], entries)

    def _write(self, ids: Sequence[int], entries: Sequence[TokenLogprob | None]) -> CompletionLogprobs:
        offsets: list[int] = []
        for token_id in ids:
            offsets.append(self._offset)
            raw = self._tokenizer.text_bytes(token_id, first=not self._shown)
            if raw is not None:
                self._shown = True
                # Bytes that do not continue a character.
                self._offset += sum(byte & 0xC0 != 0x80 for byte in raw)
        return {
            "tokens": [token_name(self._tokenizer, token_id) for token_id in ids],
            "token_logprobs": [None if entry is None else max(entry.logprob, LOWEST) for entry in entries],
            "top_logprobs": [self._top(entry) for entry in entries],
            "text_offset": offsets,
        }

    def _top(self, entry: TokenLogprob | None) -> dict[str, float] | None:
        if entry is None:
            return None
        top: dict[str, float] = {}
        # The most likely first: of two tokens with one name the likelier keeps it.
        for token_id, logprob in (*entry.top, (entry.token_id, entry.logprob)):
            top.setdefault(token_name(self._tokenizer, token_id), max(logprob, LOWEST))
        return top


def joined(parts: Sequence[CompletionLogprobs]) -> CompletionLogprobs:
    return {
        "tokens": [token for part in parts for token in part["tokens"]],
        "token_logprobs": [value for part in parts for value in part["token_logprobs"]],
        "top_logprobs": [top for part in parts for top in part["top_logprobs"]],
        "text_offset": [offset for part in parts for offset in part["text_offset"]],
    }
