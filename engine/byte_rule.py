"""How a vocabulary entry becomes bytes of text, read from the decoder of a tokenizer.json.

Known decoders: byte-level (GPT-2's map from bytes to printable characters), and what sentencepiece vocabularies are
converted to: "▁" for a space, tokens <0x00> to <0xFF> for single bytes, one space dropped at the start. A decoder with
any other step is refused, as its text could not be streamed faithfully.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from dibit.engine.errors import CheckpointError

_BYTE_TOKEN = re.compile(r"<0x[0-9A-Fa-f]{2}>")


def _byte_of_char() -> dict[str, int]:
    """GPT-2's table: printable Latin-1 bytes stand for themselves, the others for U+0100 onwards, in order."""
    printable = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    others = [b for b in range(256) if b not in printable]
    return {chr(b): b for b in printable} | {chr(0x100 + n): b for n, b in enumerate(others)}


BYTE_OF_CHAR = _byte_of_char()


@dataclass(frozen=True)
class ByteRule:
    """
    byte_level     every character stands for a byte (a token with any other character is text as it is)
    replacements   (found, put in its place), applied in order
    byte_fallback  <0xXX> is one byte
    strip_left     spaces dropped at the start of the first token
    drop_first     a string taken out of the first token
    joint          what stands before every token but the first
    """

    byte_level: bool = False
    replacements: tuple[tuple[str, str], ...] = ()
    byte_fallback: bool = False
    strip_left: int = 0
    drop_first: str = ""
    joint: str = ""

    @classmethod
    def of_decoder(cls, decoder: Mapping[str, Any] | None) -> ByteRule:
        """From the "decoder" of a tokenizer.json; CheckpointError if it has a step of another kind."""
        if decoder is None:
            return cls(joint=" ")
        rule = cls()
        steps = decoder["decoders"] if decoder["type"] == "Sequence" else [decoder]
        fused = False
        for step in steps:
            match step:
                case {"type": "ByteLevel"} if len(steps) == 1:
                    rule = replace(rule, byte_level=True)
                case {"type": "Replace", "pattern": {"String": str(found)}, "content": str(put)} if not fused:
                    rule = replace(rule, replacements=(*rule.replacements, (found, put)))
                case {"type": "Metaspace", "replacement": str(found)} if not fused:
                    first = "" if step.get("prepend_scheme") == "never" else found
                    rule = replace(rule, replacements=(*rule.replacements, (found, " ")), drop_first=first)
                case {"type": "ByteFallback"} if not fused:
                    rule = replace(rule, byte_fallback=True)
                case {"type": "Fuse"}:
                    fused = True
                case {"type": "Strip", "content": " ", "start": int(start), "stop": 0} if fused:
                    rule = replace(rule, strip_left=start)
                case _:
                    raise CheckpointError(
                        f"the tokenizer's decoder has the step {step!r}, which cannot be streamed; supported: "
                        "byte-level BPE, and sentencepiece (Replace or Metaspace, ByteFallback, Fuse, Strip)"
                    )
        return rule

    def piece(self, token: str, *, first: bool) -> bytes:
        """Bytes of text the token stands for."""
        if self.byte_level:
            try:
                return bytes([BYTE_OF_CHAR[c] for c in token])
            except KeyError:
                return token.encode()
        if first and self.drop_first:
            token = token.replace(self.drop_first, "")
        for found, put in self.replacements:
            token = token.replace(found, put)
        if self.byte_fallback and _BYTE_TOKEN.fullmatch(token):
            piece = bytes([int(token[3:5], 16)])
        else:
            piece = token.encode()
        if not first:
            return self.joint.encode() + piece
        dropped = min(self.strip_left, len(piece) - len(piece.lstrip(b" ")))
        return piece[dropped:]
