"""The prefix cache: what is shared, when, and that nobody's answer changes by it.

The stage under these tests reads a sequence back through its block table, so a block shared too early, too
far or with the wrong tokens in it shows in the answer.
"""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from scheduled_lane import ScheduledLane, make_limits, make_request

from stagemesh.router.scheduler import Request

SIZE = 4


def with_prompt(name: str, tokens: list[int], max_tokens: int = 6) -> Request:
    return replace(make_request(name, max_tokens=max_tokens), prompt=np.array(tokens, np.uint32))


def run(lane: ScheduledLane, *requests: Request) -> None:
    for request in requests:
        lane.submit(request)
    lane.run_to_end()


def num_cached(lane: ScheduledLane, request: Request) -> int:
    """Prompt tokens that `request`, alone on the lane, need not compute."""
    before = lane.scheduler.num_cached_tokens
    run(lane, request)
    return lane.scheduler.num_cached_tokens - before


@pytest.mark.parametrize(
    ("length", "cached"), [(1, 0), (4, 0), (5, 4), (8, 4), (9, 8), (12, 8), (13, 12)], ids=str
)
def test_a_hit_is_full_blocks_and_leaves_the_last_token(length: int, cached: int) -> None:
    lane = ScheduledLane(make_limits())
    prompt = list(range(length))
    run(lane, with_prompt("first", prompt))
    assert num_cached(lane, with_prompt("second", prompt)) == cached
    lane.check_end()


def test_only_what_is_equal_from_the_first_token_on_is_shared() -> None:
    lane = ScheduledLane(make_limits())
    run(lane, with_prompt("first", [1, 2, 3, 4, 5, 6, 7, 8, 9]))
    assert num_cached(lane, with_prompt("other end", [1, 2, 3, 4, 5, 6, 7, 0, 9])) == 4
    assert num_cached(lane, with_prompt("other begin", [0, 2, 3, 4, 5, 6, 7, 8, 9])) == 0
    lane.check_end()


def test_generated_tokens_are_shared_once_they_came_back() -> None:
    lane = ScheduledLane(make_limits())
    first = with_prompt("first", [1, 2, 3, 4, 5], max_tokens=12)
    run(lane, first)
    history = first.prompt.tolist() + lane.answers["first"]
    assert num_cached(lane, with_prompt("second", [*history, 7])) >= 12
    lane.check_end()


def test_two_in_one_step_share_nothing_and_a_third_shares_with_both_running() -> None:
    lane = ScheduledLane(make_limits())
    prompt = list(range(10))
    lane.submit(with_prompt("one", prompt))
    lane.submit(with_prompt("two", prompt))
    step = lane.step()
    assert step is not None
    assert step.num_tokens == 20
    lane.submit(with_prompt("three", prompt))
    lane.result()
    lane.run_to_end()
    assert lane.scheduler.num_cached_tokens == 8
    lane.check_end()


def test_the_block_left_longest_ago_goes_first() -> None:
    lane = ScheduledLane(make_limits(num_blocks=6))
    old, new = list(range(9)), list(range(20, 29))
    run(lane, with_prompt("old", old, 1))
    run(lane, with_prompt("new", new, 1))
    run(lane, with_prompt("third", list(range(9, 18)), 4))  # three blocks: two are free, one is evicted
    assert num_cached(lane, with_prompt("new again", new, 1)) == 8
    assert num_cached(lane, with_prompt("old again", old, 1)) < 8
    lane.check_end()


def test_the_end_of_a_prefix_goes_before_its_beginning() -> None:
    """Without its beginning nothing of it could be found again."""
    lane = ScheduledLane(make_limits(num_blocks=5))
    prompt = list(range(17))
    run(lane, with_prompt("first", prompt, 1))
    run(lane, with_prompt("other", list(range(20, 26)), 1))  # two blocks: one is free, one is evicted
    assert num_cached(lane, with_prompt("again", prompt, 1)) == 12
    lane.check_end()


def test_an_aborted_sharer_takes_nothing_from_the_others() -> None:
    lane = ScheduledLane(make_limits())
    prompt = list(range(13))
    run(lane, with_prompt("first", prompt))
    for name in ("a", "b"):
        lane.submit(with_prompt(name, prompt, 20))
    lane.step()
    lane.abort("a")
    lane.run_to_end()
    lane.check_end()


def test_off_nothing_is_shared() -> None:
    lane = ScheduledLane(make_limits(prefix_cache=False))
    run(lane, with_prompt("first", list(range(13))))
    assert num_cached(lane, with_prompt("second", list(range(13)))) == 0
    lane.check_end()
