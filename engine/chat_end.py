"""Which tokens end a chat turn, for models whose files name only the end of a document."""

from __future__ import annotations

from collections.abc import Mapping

CHAT_END_TOKENS = ("<|im_end|>", "<|eot_id|>", "<|end|>", "<end_of_turn>", "<|end_of_turn|>", "<|eot|>")


def chat_end_ids(special: Mapping[str, int], template: str) -> set[int]:
    """Ids of the special tokens, known by name, that the chat template mentions."""
    return {special[token] for token in CHAT_END_TOKENS if token in special and token in template}
