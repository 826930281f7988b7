"""The free list: a block has one owner or none."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from stagemesh.router.scheduler.blocks import BlockPool
from stagemesh.router.scheduler.prefix_index import block_keys

BLOCK_SIZE = 4
OPERATIONS = st.lists(st.tuples(st.sampled_from(["take", "next", "give"]), st.integers(0, 100)), max_size=60)


@given(num_blocks=st.integers(1, 40), operations=OPERATIONS, runs=st.booleans())
def test_no_block_is_owned_twice_or_lost(
    num_blocks: int, operations: list[tuple[str, int]], runs: bool
) -> None:
    pool = BlockPool(num_blocks, BLOCK_SIZE, runs=runs)
    owners: list[tuple[int, int, list[int]]] = []
    for what, number in operations:
        if what == "give" and owners:
            begin, room, blocks = owners.pop(number % len(owners))
            pool.give_back(np.array(blocks))
            pool.drop_claim(begin, room)
        elif what == "next" and 0 < len(owners) <= pool.num_free:
            for (_, _, blocks), block in zip(
                owners,
                pool.take_next(np.array([blocks[-1] for _, _, blocks in owners])).tolist(),
                strict=True,
            ):
                blocks.append(block)
        elif what == "take" and pool.num_free:
            count = 1 + number % pool.num_free
            room = count + number % 7
            begin = pool.claim(room) if runs else -1
            owners.append((begin, room, pool.take(count, begin)))
        owned = [block for _, _, blocks in owners for block in blocks]
        assert len(set(owned)) == len(owned)
        assert all(0 <= block < num_blocks for block in owned)
        assert pool.num_free == num_blocks - len(owned)
    for begin, room, blocks in owners:
        pool.give_back(np.array(blocks))
        pool.drop_claim(begin, room)
    assert pool.num_free == pool.num_blocks == num_blocks
    assert sorted(pool.take(num_blocks)) == list(range(num_blocks))


def test_what_others_claimed_is_taken_last() -> None:
    pool = BlockPool(12, BLOCK_SIZE)
    gone, begin = pool.claim(7), pool.claim(5)
    pool.drop_claim(gone, 7)
    assert set(pool.take(7)).isdisjoint(range(begin, begin + 5))
    assert set(pool.take(5)) == set(range(begin, begin + 5))


def test_an_owner_that_grows_gets_the_run_it_claimed() -> None:
    pool = BlockPool(12, BLOCK_SIZE)
    one, other = pool.claim(5), pool.claim(5)
    first, second = pool.take(2, one), pool.take(2, other)
    for _ in range(3):
        more = pool.take_next(np.array([first[-1], second[-1]])).tolist()
        first.append(more[0])
        second.append(more[1])
    for blocks in (first, second):
        assert blocks == list(range(blocks[0], blocks[0] + 5))


def test_claims_give_way_when_nothing_else_is_free() -> None:
    pool = BlockPool(4, BLOCK_SIZE)
    assert pool.claim(4) == 0
    assert pool.claim(1) == -1
    assert sorted(pool.take(4)) == [0, 1, 2, 3]
    assert pool.num_free == 0


def test_giving_back_what_is_free_is_a_bug() -> None:
    pool = BlockPool(4, BLOCK_SIZE)
    blocks = np.array(pool.take(2))
    pool.give_back(blocks)
    with pytest.raises(AssertionError):
        pool.give_back(blocks)


def test_all_owners_of_a_block_may_leave_together() -> None:
    pool = BlockPool(4, BLOCK_SIZE)
    tokens = np.arange(9, dtype=np.uint32)
    first, second = pool.take(2), pool.take(1)
    pool.publish(block_keys(b"", tokens, BLOCK_SIZE)[:1], first[:1])
    pool.share(np.array(first[:1]))
    pool.give_back(np.array([*first, first[0], *second]))
    assert pool.num_free == 4
    assert pool.match(tokens, []) == first[:1]
    assert sorted(pool.take(4)) == [0, 1, 2, 3]
    assert pool.match(tokens, []) == []
