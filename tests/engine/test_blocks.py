"""BlockPool: who holds what, what stays findable, in which order blocks are taken."""

from __future__ import annotations

import random

import pytest

from dibit.engine.blocks import BlockPool, block_key, root_key

SIZE = 4


def keys_of(tokens: list[int], extra: str = "") -> list[bytes]:
    keys: list[bytes] = []
    for start in range(0, len(tokens) - SIZE + 1, SIZE):
        keys.append(block_key(keys[-1] if keys else root_key(extra), tokens[start : start + SIZE]))
    return keys


def fill(pool: BlockPool, tokens: list[int], extra: str = "") -> list[int]:
    """Takes blocks for `tokens` and indexes the full ones."""
    blocks = pool.take(pool.blocks_for(len(tokens)))
    for i, key in enumerate(keys_of(tokens, extra)):
        pool.index(blocks[i], key, tokens[i * SIZE : (i + 1) * SIZE])
    return blocks


def test_a_key_names_the_whole_prefix() -> None:
    first, second = keys_of([1, 2, 3, 4, 5, 6, 7, 8])
    assert len({first, second}) == 2
    assert keys_of([9, 2, 3, 4, 5, 6, 7, 8])[1] != second
    assert keys_of([1, 2, 3, 4, 5, 6, 7, 9])[0] == first
    assert keys_of([1, 2, 3, 4], extra="tenant")[0] != first
    assert len(first) == 16


def test_blocks_of_a_prefix_are_found_while_held_and_after() -> None:
    pool = BlockPool(8, SIZE)
    tokens = list(range(10))
    blocks = fill(pool, tokens)
    pool.check([blocks])
    assert pool.match(keys_of(tokens), tokens) == blocks[:2]
    pool.release(blocks)
    pool.check([])
    assert pool.num_free == 8
    assert pool.match(keys_of(tokens), tokens) == blocks[:2]
    other = [*range(4), 99, 98, 97, 96]
    assert pool.match(keys_of(other), other) == blocks[:1]


def test_a_held_hit_is_no_longer_free_and_is_shared() -> None:
    pool = BlockPool(4, SIZE)
    tokens = list(range(8))
    blocks = fill(pool, tokens)
    pool.release(blocks)
    assert pool.num_free_without(blocks) == 2
    pool.hold(blocks)
    pool.hold(blocks)
    assert pool.num_free == 2
    pool.check([blocks, blocks])
    pool.release(blocks)
    assert pool.num_free == 2
    pool.release(blocks)
    assert pool.num_free == 4
    pool.check([])


def test_a_chain_is_forgotten_from_its_tail() -> None:
    pool = BlockPool(3, SIZE)
    tokens = list(range(12))
    blocks = fill(pool, tokens)
    pool.release(blocks)
    for known in (2, 1, 0):
        pool.take(1)
        assert pool.match(keys_of(tokens), tokens) == blocks[:known]


def test_the_least_recently_freed_goes_first() -> None:
    pool = BlockPool(4, SIZE)
    old, new = [1] * 4, [2] * 4
    old_blocks, new_blocks = fill(pool, old), fill(pool, new)
    rest = pool.take(2)
    pool.release(old_blocks)
    pool.release(new_blocks)
    assert pool.match(keys_of(old), old) == old_blocks
    pool.hold(old_blocks)
    pool.release(old_blocks)
    assert pool.take(1) == new_blocks
    assert pool.match(keys_of(new), new) == []
    assert pool.match(keys_of(old), old) == old_blocks
    pool.release(rest)


def test_blocks_without_a_known_prefix_are_taken_before_those_with_one() -> None:
    pool = BlockPool(2, SIZE)
    known, unknown = fill(pool, [1] * 4), pool.take(1)
    pool.release(known)
    pool.release(unknown)
    assert pool.take(1) == unknown


def test_of_two_equal_blocks_the_first_stays_the_known_one() -> None:
    pool = BlockPool(2, SIZE)
    first, second = fill(pool, [7] * 4), fill(pool, [7] * 4)
    pool.check([first, second])
    assert pool.match(keys_of([7] * 4), [7] * 4) == first
    pool.release(first)
    pool.release(second)
    pool.check([])


def test_a_key_that_collides_is_no_hit() -> None:
    pool = BlockPool(2, SIZE)
    tokens = [1, 2, 3, 4]
    fill(pool, tokens)
    assert pool.match(keys_of(tokens), [1, 2, 3, 5]) == []


def test_check_sees_a_leak_and_a_wrong_holder() -> None:
    pool = BlockPool(4, SIZE)
    blocks = pool.take(2)
    with pytest.raises(AssertionError, match="ref_count 1, held by 0"):
        pool.check([])
    with pytest.raises(AssertionError, match="ref_count 0, held by 1"):
        pool.check([blocks, [3]])
    with pytest.raises(AssertionError, match="released while free"):
        pool.release([3])


def test_a_long_random_life_leaks_nothing() -> None:
    rng = random.Random(3)
    pool = BlockPool(16, SIZE)
    tables: list[list[int]] = []
    for _ in range(2000):
        tokens = [rng.randrange(2) for _ in range(rng.randrange(1, 20))]
        keys = keys_of(tokens)
        hits = pool.match(keys, tokens)
        missing = pool.blocks_for(len(tokens)) - len(hits)
        if missing <= pool.num_free_without(hits):
            pool.hold(hits)
            table = hits + pool.take(missing)
            for i, key in enumerate(keys):
                pool.index(table[i], key, tokens[i * SIZE : (i + 1) * SIZE])
            tables.append(table)
        elif tables:
            pool.release(tables.pop(rng.randrange(len(tables))))
        pool.check(tables)
    for table in tables:
        pool.release(table)
    pool.check([])
    assert pool.num_free == 16
