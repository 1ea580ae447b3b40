"""The KV cache's blocks: who holds which, and which hold a known prefix. Plain Python; no tensors.

A full block is known by a key that chains over its parent's key, so one key names the whole prefix up to the block's
end. A block that nobody holds any more stays findable by its key until it is taken for something else; the least
recently freed goes first.

Invariant (`check`): every block is either held (ref_count > 0) or in the free list, never both, and the index maps a
key to exactly the block that carries it.

Two different prefixes share a key with probability 2^-128 (blake2b); a hit compares the block's tokens besides, so a
collision would have to happen between two parents.
"""

from __future__ import annotations

import array
import hashlib
from collections import Counter, OrderedDict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

KEY_BYTES = 16


def root_key(extra: str = "") -> bytes:
    """Parent key of a sequence's first block; `extra` is whatever besides the tokens its cache depends on."""
    return hashlib.blake2b(extra.encode(), digest_size=KEY_BYTES).digest()


def block_key(parent: bytes, tokens: Sequence[int]) -> bytes:
    """Key of a full block of `tokens` that follows the block of key `parent`."""
    return hashlib.blake2b(parent + array.array("q", tokens).tobytes(), digest_size=KEY_BYTES).digest()


@dataclass(slots=True)
class Block:
    """A block's bookkeeping. `key` and `tokens` are set once it is full and indexed."""

    id: int
    ref_count: int = 0
    key: bytes | None = None
    tokens: tuple[int, ...] = ()


class BlockPool:
    """All the blocks there are; every operation costs O(blocks named in it)."""

    def __init__(self, num_blocks: int, block_size: int) -> None:
        self.num_blocks = num_blocks
        self.block_size = block_size
        self._blocks = [Block(i) for i in range(num_blocks)]
        self._free: OrderedDict[int, None] = OrderedDict.fromkeys(range(num_blocks))  # first = next to be taken
        self._index: dict[bytes, int] = {}

    @property
    def num_free(self) -> int:
        return len(self._free)

    @property
    def num_cached(self) -> int:
        """Blocks that can be found by a key, held or free."""
        return len(self._index)

    def blocks_for(self, num_tokens: int) -> int:
        return -(-num_tokens // self.block_size)

    def match(self, keys: Sequence[bytes], token_ids: Sequence[int]) -> list[int]:
        """Blocks that hold the longest known prefix of `token_ids`, whose full blocks have the keys `keys`."""
        found: list[int] = []
        for i, key in enumerate(keys):
            block_id = self._index.get(key)
            if block_id is None:
                break
            start = i * self.block_size
            if self._blocks[block_id].tokens != tuple(token_ids[start : start + self.block_size]):
                break
            found.append(block_id)
        return found

    def num_free_without(self, block_ids: Iterable[int]) -> int:
        """How many blocks could be taken once `block_ids` are held."""
        return len(self._free) - sum(1 for block_id in block_ids if block_id in self._free)

    def hold(self, block_ids: Iterable[int]) -> None:
        """One more holder for blocks found by `match`."""
        for block_id in block_ids:
            self._blocks[block_id].ref_count += 1
            self._free.pop(block_id, None)

    def take(self, count: int) -> list[int]:
        """`count` blocks to be written; what they held is forgotten. The caller has looked at `num_free`."""
        assert count <= len(self._free), f"{count} blocks asked, {len(self._free)} free"
        taken: list[int] = []
        for _ in range(count):
            block_id, _none = self._free.popitem(last=False)
            block = self._blocks[block_id]
            if block.key is not None:
                del self._index[block.key]
                block.key, block.tokens = None, ()
            block.ref_count = 1
            taken.append(block_id)
        return taken

    def index(self, block_id: int, key: bytes, tokens: Sequence[int]) -> None:
        """Makes a full, computed block findable. Of two blocks with the same content the first stays the known one."""
        block = self._blocks[block_id]
        if block.key is None and key not in self._index:
            block.key, block.tokens = key, tuple(tokens)
            self._index[key] = block_id

    def release(self, block_ids: Sequence[int]) -> None:
        """One holder less for each block of a sequence, given in order.

        Freed from the tail on, so that a chain is forgotten from its tail: a prefix without its tail is of use, a
        tail without its prefix is not. Blocks without a key are of no use to anybody and are taken first.
        """
        for block_id in reversed(block_ids):
            block = self._blocks[block_id]
            assert block.ref_count > 0, f"block {block_id} released while free"
            block.ref_count -= 1
            if block.ref_count == 0:
                self._free[block_id] = None
                if block.key is None:
                    self._free.move_to_end(block_id, last=False)

    def check(self, tables: Iterable[Sequence[int]]) -> None:
        """AssertionError unless the pool is consistent with `tables`, the block tables of all sequences there are."""
        held = Counter(block_id for table in tables for block_id in table)
        for block in self._blocks:
            count = held[block.id]
            assert block.ref_count == count, f"block {block.id}: ref_count {block.ref_count}, held by {count}"
            assert (block.id in self._free) == (count == 0), f"block {block.id}: held by {count}, or free, not both"
            if block.key is None:
                assert block.tokens == (), f"block {block.id} has tokens and no key"
            else:
                assert self._index.get(block.key) == block.id, f"block {block.id} is not under its key"
                assert len(block.tokens) == self.block_size, f"block {block.id} is indexed and not full"
        indexed = sum(block.key is not None for block in self._blocks)
        assert indexed == len(self._index), "the index names blocks that do not carry its keys"
