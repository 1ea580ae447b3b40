"""The incremental detokenizer: what it sends, when it sends it, and where it stops."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dibit.engine.byte_rule import ByteRule
from dibit.engine.detokenizer import IncrementalDetokenizer
from dibit.engine.errors import CheckpointError

HIDDEN = 1000
LLAMA = ByteRule.of_decoder(
    {
        "type": "Sequence",
        "decoders": [
            {"type": "Replace", "pattern": {"String": "▁"}, "content": " "},
            {"type": "ByteFallback"},
            {"type": "Fuse"},
            {"type": "Strip", "content": " ", "start": 1, "stop": 0},
        ],
    }
)


class Bytes:
    """Ids below 256 are bytes; HIDDEN never shows."""

    def text_bytes(self, token_id: int, *, first: bool) -> bytes | None:
        return None if token_id == HIDDEN else bytes([token_id])


class Words:
    """Vocabulary entries under a rule."""

    def __init__(self, tokens: Sequence[str], rule: ByteRule) -> None:
        self.tokens, self.rule = tokens, rule

    def text_bytes(self, token_id: int, *, first: bool) -> bytes | None:
        return None if token_id == HIDDEN else self.rule.piece(self.tokens[token_id], first=first)


class Pieces:
    """Each id is a piece of a text, cut anywhere."""

    def __init__(self, pieces: Sequence[bytes]) -> None:
        self.pieces = pieces

    def text_bytes(self, token_id: int, *, first: bool) -> bytes | None:
        return self.pieces[token_id]


def stream(
    data: bytes, *, prompt_ids: Sequence[int] = (), stop: Sequence[str] = ()
) -> tuple[list[str], IncrementalDetokenizer]:
    detokenizer = IncrementalDetokenizer(Bytes(), prompt_ids, stop)
    deltas = [detokenizer.push(b) for b in data]
    return [*deltas, detokenizer.flush()], detokenizer


# The borders of UTF-8's table: ASCII, continuations, leads of two, three and four bytes, bytes that never occur.
EDGES = [*bytes.fromhex("41 80 8f 90 9f a0 bf c0 c2 df e0 e1 ed ef f0 f1 f4 f5 ff")]


@settings(deadline=None, max_examples=500)
@given(st.lists(st.sampled_from(EDGES) | st.integers(0, 255), max_size=30).map(bytes))
def test_any_bytes_give_the_text_of_all_at_once(data: bytes) -> None:
    assert "".join(stream(data)[0]) == data.decode("utf-8", "replace")


def test_a_character_comes_whole_and_at_once() -> None:
    deltas, _ = stream("é🎉z".encode())
    assert deltas == ["", "é", "", "", "", "🎉", "z", ""]


@pytest.mark.parametrize(
    ("data", "deltas"),
    [
        (b"\xff", ["\ufffd", ""]),
        (b"\x80", ["\ufffd", ""]),
        (b"\xf0\x9f", ["", "", "\ufffd"]),
        (b"\xf0\x9fA", ["", "", "\ufffdA", ""]),
        (b"\xe4\xbd\xe4", ["", "", "\ufffd", "\ufffd"]),
        (b"\xf4\x90A", ["", "\ufffd\ufffd", "A", ""]),
    ],
)
def test_a_replacement_comes_once_it_is_certain(data: bytes, deltas: list[str]) -> None:
    assert stream(data)[0] == deltas


def test_the_output_may_finish_a_character_of_the_prompt() -> None:
    whole = "a🎉".encode()
    for cut in range(2, len(whole)):
        detokenizer = IncrementalDetokenizer(Bytes(), list(whole[:cut]))
        assert "".join([*map(detokenizer.push, whole[cut:]), detokenizer.flush()]) == "🎉"
    hidden_between = IncrementalDetokenizer(Bytes(), [*whole[:3], HIDDEN])
    assert "".join(map(hidden_between.push, whole[3:])) == "🎉"
    assert "".join(stream(b"\xa0b", prompt_ids=list(b"abc\xff"))[0]) == "\ufffdb"


def test_hidden_tokens_leave_no_trace() -> None:
    detokenizer = IncrementalDetokenizer(Bytes(), stop=["ab"])
    parts = [detokenizer.push(i) for i in (0xC3, HIDDEN, 0xA9, ord("a"), HIDDEN, ord("b"), ord("c"))]
    assert parts == ["", "", "é", "", "", "", ""]
    assert detokenizer.stopped == "ab"


def test_the_leading_space_goes_only_at_the_start_of_a_text() -> None:
    words = Words(["▁Hello", "▁", "<0xE4>", "<0xBD>", "<0xA0>", "x"], LLAMA)

    def text(prompt: list[int], output: list[int]) -> str:
        detokenizer = IncrementalDetokenizer(words, prompt)
        return "".join([*map(detokenizer.push, output), detokenizer.flush()])

    assert text([], [0, 0]) == "Hello Hello"
    assert text([HIDDEN], [HIDDEN, 0]) == "Hello"
    assert text([5], [0]) == " Hello"
    assert text([1], [0]) == " Hello"
    assert text([], [1, 0]) == " Hello"
    assert text([], [2, 3, 4, 0]) == "你 Hello"
    assert text([0, 2, 3], [4, 5]) == "你x"
    assert text([], [2, 3, 5]) == "\ufffdx"


def plain_stop(text: str, stop: Sequence[str], *, include: bool) -> tuple[str, str | None]:
    """Grow the text by a character; stop at the first stop string it ends with, the longest if several."""
    for end in range(1, len(text) + 1):
        found = max((s for s in stop if text[:end].endswith(s)), key=len, default=None)
        if found is not None:
            return text[: end if include else end - len(found)], found
    return text, None


@settings(deadline=None, max_examples=500)
@given(
    text=st.text("ab🎉", max_size=25),
    stop=st.lists(st.text("ab🎉", min_size=1, max_size=5), min_size=1, max_size=4),
    include=st.booleans(),
    data=st.data(),
)
def test_stop_strings_whatever_the_token_borders(
    *, text: str, stop: list[str], include: bool, data: st.DataObject
) -> None:
    raw = text.encode()
    cuts = sorted(data.draw(st.sets(st.integers(0, len(raw)))))
    pieces = [raw[a:b] for a, b in zip([0, *cuts], [*cuts, len(raw)], strict=True)]
    detokenizer = IncrementalDetokenizer(Pieces(pieces), stop=stop, include_stop=include)
    expected, found = plain_stop(text, stop, include=include)
    sent, fed = "", b""
    for i, piece in enumerate(pieces):
        sent += detokenizer.push(i)
        fed += piece
        if detokenizer.stopped is None:
            known = fed.decode("utf-8", "ignore")
            held = max(n for n in range(len(known) + 1) if n == 0 or any(s.startswith(known[-n:]) for s in stop))
            assert sent == known[: len(known) - held], "held back more or less than needed"
    sent += detokenizer.flush()
    assert (sent, detokenizer.stopped) == (expected, found)
    if found is not None:
        assert detokenizer.push(0) == detokenizer.flush() == ""


def test_several_stop_strings_in_one_token() -> None:
    detokenizer = IncrementalDetokenizer(Pieces([b"one STOP two END", b" three"]), stop=["END", "STOP"])
    assert detokenizer.push(0) == "one "
    assert detokenizer.stopped == "STOP"
    assert detokenizer.push(1) == ""
    assert detokenizer.flush() == ""


def test_a_false_start_is_sent_as_soon_as_it_is_known_to_be_one() -> None:
    deltas, detokenizer = stream(b"a###b##", stop=["####"])
    assert deltas == ["a", "", "", "", "###b", "", "", "##"]
    assert detokenizer.stopped is None


def test_a_very_long_stop_string_costs_no_more_per_character() -> None:
    stop = "ab" * 50_000 + "c"
    deltas, detokenizer = stream(b"ab" * 2000, stop=[stop])
    assert deltas[:-1] == [""] * 4000
    assert deltas[-1] == "ab" * 2000
    assert detokenizer.stopped is None


@pytest.mark.parametrize(
    "decoder",
    [
        {"type": "WordPiece", "prefix": "##", "cleanup": True},
        {"type": "Replace", "pattern": {"Regex": "a+"}, "content": "b"},
        {"type": "Sequence", "decoders": [{"type": "Strip", "content": " ", "start": 1, "stop": 0}]},
        {"type": "Sequence", "decoders": [{"type": "Fuse"}, {"type": "Strip", "content": " ", "start": 0, "stop": 1}]},
        {"type": "Sequence", "decoders": [{"type": "ByteLevel"}, {"type": "Fuse"}]},
    ],
    ids=str,
)
def test_a_decoder_that_cannot_be_streamed_is_refused(decoder: dict[str, object]) -> None:
    with pytest.raises(CheckpointError, match="cannot be streamed"):
        ByteRule.of_decoder(decoder)
