"""Text from tokens, one token at a time.

The invariant: whatever the tokens, the pieces returned by `push` and the last one by `flush`, joined, are exactly
`decode` of all the ids (special tokens left out), cut at the first stop string. Text is held back only while it could
still change: the bytes of an unfinished UTF-8 character, and a tail that may grow into a stop string. A replacement
character is never sent before it is certain (U+FFFD for each maximal malformed part, Unicode 3.9).

The text is the concatenation of per-token bytes, so a character or a stop string may spread over any number of tokens
and one token may hold several. Stop strings are followed by a Knuth-Morris-Pratt automaton each: the match that ends
first wins, so that the result does not depend on where token borders fall.
"""

from __future__ import annotations

import codecs
from collections.abc import Sequence
from typing import Protocol

# A character is at most four bytes: what is unfinished is at most three.
_MAX_UNFINISHED_BYTES = 3


class Pieces(Protocol):
    """What the detokenizer needs of a tokenizer."""

    def text_bytes(self, token_id: int, *, first: bool) -> bytes | None:
        """Bytes the token adds to a text, or None if it never shows (a special or unknown id).

        `first` says that no showing token came before it: some tokenizers drop a leading space there.
        """
        ...


class IncrementalDetokenizer:
    """State of one running text.

    prompt_ids    what comes before: decides whether a leading space is dropped, and gives the start of a character
                  that the output finishes
    stop          strings that end the text; none of them empty
    include_stop  whether the stop string itself belongs to the text

    `stopped` is the stop string found, or None. After that, `push` and `flush` return "".
    """

    def __init__(
        self,
        tokenizer: Pieces,
        prompt_ids: Sequence[int] = (),
        stop: Sequence[str] = (),
        *,
        include_stop: bool = False,
    ) -> None:
        self.stopped: str | None = None
        self._tokenizer = tokenizer
        self._include_stop = include_stop
        self._matchers = [_Matcher(s) for s in stop]
        self._held = ""
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")
        tail = _tail(tokenizer, prompt_ids)
        self._first = tail is None
        if tail:
            self._decoder.decode(tail)

    def push(self, token_id: int) -> str:
        """The text that became certain with this token; often "" or a word."""
        if self.stopped is not None:
            return ""
        piece = self._tokenizer.text_bytes(token_id, first=self._first)
        if piece is None:
            return ""
        self._first = False
        return self._release(self._decoder.decode(piece))

    def flush(self) -> str:
        """The rest, when no token follows: an unfinished character becomes U+FFFD, an unfinished stop string text."""
        if self.stopped is not None:
            return ""
        text = self._release(self._decoder.decode(b"", final=True))
        if self.stopped is None:
            text, self._held = text + self._held, ""
            for matcher in self._matchers:
                matcher.matched = 0
        return text

    def _release(self, text: str) -> str:
        if not self._matchers:
            return text
        known = self._held + text
        for end, char in enumerate(text, start=len(self._held) + 1):
            found = ""
            for matcher in self._matchers:
                if matcher.advance(char) and len(matcher.text) > len(found):
                    found = matcher.text
            if found:
                self.stopped, self._held = found, ""
                return known[:end] if self._include_stop else known[: end - len(found)]
        keep = max(matcher.matched for matcher in self._matchers)
        self._held = known[len(known) - keep :]
        return known[: len(known) - keep]


class _Matcher:
    """How much of the start of `text` the characters so far end with (Knuth, Morris, Pratt 1977)."""

    def __init__(self, text: str) -> None:
        self.text = text
        self.matched = 0
        self._borders = [0] * len(text)
        length = 0
        for i in range(1, len(text)):
            while length and text[i] != text[length]:
                length = self._borders[length - 1]
            if text[i] == text[length]:
                length += 1
            self._borders[i] = length

    def advance(self, char: str) -> bool:
        """Take one character; whether the whole of `text` now stands at the end."""
        while self.matched and self.text[self.matched] != char:
            self.matched = self._borders[self.matched - 1]
        if self.text[self.matched] == char:
            self.matched += 1
        return self.matched == len(self.text)


def _tail(tokenizer: Pieces, prompt_ids: Sequence[int]) -> bytes | None:
    """The last bytes of the prompt's text, enough to hold an unfinished character; None if the prompt shows nothing."""
    tail: bytes | None = None
    for token_id in reversed(prompt_ids):
        piece = tokenizer.text_bytes(token_id, first=False)
        if piece is not None:
            tail = piece + (tail or b"")
            if len(tail) >= _MAX_UNFINISHED_BYTES:
                break
    return None if tail is None else tail[-_MAX_UNFINISHED_BYTES:]
