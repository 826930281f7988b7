"""docs/architecture.md, "Order": what the rules promise, each with a test that fails when the rule is broken.

The stage of these tests keeps a KV cache of tokens and computes from what it reads back (scheduled_stage), so a
row that takes a wrong token, a block written too late or one shared too far shows in an answer.
"""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from scheduled_lane import ScheduledLane, make_limits, make_request
from scheduled_stage import END_TOKEN, expected_answer

from stagemesh.router.scheduler import Finish, Request, Scheduler, Step
from stagemesh.router.scheduler.step import encode
from stagemesh.wire.columns import U32, U64, unpack


def with_prompt(name: str, tokens: list[int], max_tokens: int = 6) -> Request:
    return replace(make_request(name, max_tokens=max_tokens), prompt=np.array(tokens, np.uint32))


def stopping(at: int, max_tokens: int = 12) -> Request:
    """A request whose answer has its first end token as token `at`, from 0."""
    return next(
        request
        for attempt in range(5000)
        for request in [make_request(f"stops{attempt}", 3 + attempt % 5, max_tokens, stops=True)]
        if len(expected_answer(request)) == at + 1 and expected_answer(request)[-1] == END_TOKEN
    )


def step_of(lane: ScheduledLane) -> Step:
    step = lane.step()
    assert step is not None
    return step


# Rule 1


def test_a_decode_names_the_step_that_sampled_its_input() -> None:
    """Two that began in different steps: each row of a later step names its own."""
    lane = ScheduledLane(make_limits(depth=6, lookahead=3))
    lane.submit(make_request("a", 5, 20))
    first = step_of(lane)
    lane.submit(make_request("b", 5, 20))
    second = step_of(lane)
    assert encode(second, 1).rows.input_steps
    assert unpack(encode(second, 1).rows.input_steps, U64, "inputs").tolist() == [first.number, 0]
    third = step_of(lane)
    assert encode(third, 1).same_rows_as == second.number
    assert [first.number, second.number, third.number] == [1, 2, 3]
    lane.run_to_end()
    lane.check_end()


# That every stage is told the same steps in one order: test_lane_order.


# Rule 2


def test_a_late_token_is_not_for_who_has_the_slot_now() -> None:
    """A end token is found late; B got the slot, and is in a step, before A's last tokens come."""
    lane = ScheduledLane(make_limits(max_slots=1, depth=5, lookahead=3))
    first = stopping(at=1)
    lane.submit(first)
    lane.submit(make_request("b", 6, 5))
    while first.request_id not in lane.finished:
        if lane.step() is None:
            lane.result()
    late = len(lane.in_flight)
    assert late, "nothing of the first was in flight: this shows nothing"
    step = step_of(lane)
    assert [sequence.request.request_id for sequence in step.sequences] == ["b"]
    assert step.slots.tolist() == [0]
    for _ in range(late):
        assert not lane.result()
    assert lane.num_ignored == late
    lane.run_to_end()
    lane.check_end()


# Rule 3


def yielding_lane() -> ScheduledLane:
    """Two that run; the old one needs a block, so the young one, which needs none, has to yield while a step
    of both is on its way."""
    lane = ScheduledLane(make_limits(num_blocks=8, max_blocks=8, lookahead=1, depth=2))
    lane.submit(make_request("old", 8, 16))
    lane.submit(make_request("young", 6, 16))
    while True:
        step = lane.step()
        for young in lane.scheduler.running.yielding.values():
            assert step is None or young not in step.sequences
            return lane
        if step is None or lane.scheduler.num_in_flight == lane.limits.depth:
            lane.result()
        assert not lane.finished


def test_one_that_yields_stays_until_its_last_token_has_come_and_keeps_it() -> None:
    lane = yielding_lane()
    (young,) = lane.scheduler.running.yielding.values()
    assert young.request.request_id == "young"
    in_flight = sum(young in step.sequences for step, _ in lane.in_flight)
    assert in_flight, "nothing of it was in flight: this shows nothing"
    had = len(lane.answers["young"])
    while young.slot >= 0:
        assert not young.num_preemptions
        lane.result()
    assert len(lane.answers["young"]) == had + in_flight
    assert young.to_prefill.tolist() == young.request.prompt.tolist() + lane.answers["young"]
    lane.run_to_end()
    lane.check_end()


def test_one_that_yields_in_its_prompt_stays_while_a_chunk_of_it_is_in_flight() -> None:
    """The chunk samples nothing, and holds it all the same."""
    lane = ScheduledLane(make_limits(step_tokens=4, depth=4))
    lane.submit(make_request("young", 30, 4))
    assert [step_of(lane).sample.tolist() for _ in range(3)] == [[False]] * 3
    running = lane.scheduler.running
    young = lane.scheduler.sequence("young")
    assert young is not None
    running.ask_to_yield(young)
    for left in (3, 2, 1):
        assert young.slot >= 0, f"{left} steps of it are in flight"
        lane.result()
    assert young.slot < 0
    lane.run_to_end()
    lane.check_end()


def test_one_that_yields_takes_no_further_step() -> None:
    lane = yielding_lane()
    (young,) = lane.scheduler.running.yielding.values()
    last = max(step.number for step in lane.steps if young in step.sequences)
    while young.slot >= 0:
        if (step := lane.step()) is not None:
            assert young not in step.sequences
        else:
            lane.result()
    assert not any(young in step.sequences for step in lane.steps if step.number > last)


def test_one_that_is_moved_to_another_slot_goes_on_where_it_was() -> None:
    """It is read into another slot than it had, while its old one is somebody else's."""
    lane = ScheduledLane(make_limits(num_blocks=9, max_blocks=9, max_slots=3, lookahead=2, depth=4))
    lane.submit(make_request("old", 8, 20))
    lane.submit(make_request("moved", 8, 20))
    slots: dict[str, set[int]] = {"old": set(), "moved": set(), "other": set()}
    for _ in range(400):
        step = lane.step()
        if step is None:
            lane.result()
        else:
            for sequence, slot in zip(step.sequences, step.slots.tolist(), strict=True):
                slots[sequence.request.request_id].add(slot)
        moved = lane.scheduler.sequence("moved")
        if moved and moved.num_preemptions and "other" not in lane.requests:
            lane.submit(make_request("other", 2, 3, priority=1))
        if len(lane.finished) == 3:
            break
    lane.run_to_end()
    lane.check_end()
    assert len(slots["moved"]) > 1, "it never moved: this shows nothing"
    assert slots["other"] & slots["moved"], "nobody got its slot: this shows nothing"


# Rule 4


@pytest.mark.parametrize("num_sent", [1, 2, 3])
def test_one_that_is_cancelled_in_flight_is_computed_all_the_same_and_ignored(num_sent: int) -> None:
    """Its blocks are somebody else's before its results come; every step that was sent is answered."""
    lane = ScheduledLane(make_limits(num_blocks=4, max_blocks=4, depth=4, lookahead=3, step_tokens=8))
    lane.submit(make_request("gone", 6, 10))
    sent = [step_of(lane) for _ in range(num_sent)]
    lane.abort("gone")
    assert lane.scheduler.pool.num_free == 4
    lane.submit(make_request("next", 12, 4))
    after = lane.step()
    assert lane.scheduler.num_in_flight == num_sent + (after is not None)
    assert [step.number for step, _ in lane.in_flight][:num_sent] == [step.number for step in sent]
    for _ in sent:
        assert not lane.result()
    lane.run_to_end()
    lane.check_end()


# Rule 5


def test_a_lane_has_at_most_d_unanswered_steps_whatever_waits() -> None:
    lane = ScheduledLane(make_limits(depth=3, lookahead=8, step_tokens=4))
    for name in "abc":
        lane.submit(make_request(name, 30, 9))
    while lane.step():
        pass
    assert lane.scheduler.num_in_flight == 3
    lane.run_to_end()
    lane.check_end()


# Rule 6


def test_a_full_prefix_hit_still_computes_the_last_token_into_a_block_of_its_own() -> None:
    lane = ScheduledLane(make_limits())
    prompt = list(range(9))
    lane.submit(with_prompt("first", prompt))
    lane.run_to_end()
    lane.submit(with_prompt("again", prompt))
    step = step_of(lane)
    assert step.num_tokens == 1
    sequence = step.sequences[0]
    assert sequence.first_position == 8
    own = set(lane.scheduler.running.slots.tables[sequence.slot, 2:3].tolist())
    assert not own & set(lane.scheduler.pool.match(np.array(prompt, np.uint32), []))
    lane.run_to_end()
    lane.check_end()


def test_a_prompt_that_ends_on_a_block_border_computes_its_last_block() -> None:
    lane = ScheduledLane(make_limits())
    prompt = list(range(8))
    for name in ("first", "again"):
        lane.submit(with_prompt(name, prompt))
        step = step_of(lane)
        assert step.num_tokens == (8 if name == "first" else 4)
        lane.run_to_end()
    lane.check_end()


def test_a_block_is_found_by_steps_after_the_one_that_fills_it() -> None:
    """Chunks of 4: the prompt's second block is known only when the step that computes it has been made."""
    lane = ScheduledLane(make_limits(step_tokens=4, depth=6))
    prompt = np.arange(13, dtype=np.uint32)
    lane.submit(with_prompt("first", prompt.tolist()))
    for num_steps in range(1, 4):
        step_of(lane)
        assert len(lane.scheduler.pool.match(prompt, [])) == num_steps
    lane.run_to_end()
    lane.check_end()


def test_generated_tokens_are_found_only_when_their_ids_have_come_back() -> None:
    """With lookahead, blocks are computed whose tokens nobody here knows yet."""
    lane = ScheduledLane(make_limits(depth=9, lookahead=8))
    lane.submit(with_prompt("first", list(range(5)), max_tokens=20))
    while lane.step():
        pass
    assert lane.scheduler.running.slots.position[0] > 8
    sequence = lane.scheduler.sequence("first")
    assert sequence
    lane.result()
    lane.abort("first")
    assert len(sequence.keys) == 1
    answer = expected_answer(with_prompt("first", list(range(5)), max_tokens=20))
    known = np.array([*range(5), *answer], np.uint32)
    assert len(lane.scheduler.pool.match(known, [])) == 1
    while lane.in_flight:
        lane.result()
    assert len(lane.scheduler.pool.match(known, [])) == 1


# Rule 7


def test_a_block_may_be_given_away_while_a_step_that_writes_it_is_in_flight() -> None:
    """The whole memory passes from one to the next with the first one's steps unanswered."""
    lane = ScheduledLane(make_limits(num_blocks=4, max_blocks=4, max_slots=1, depth=6, lookahead=4))
    first = stopping(at=2, max_tokens=7)
    lane.submit(first)
    lane.submit(make_request("second", 7, 5))
    lane.run_to_end()
    lane.check_end()
    assert lane.num_ignored > 0, "nothing was in flight: this shows nothing"


# Rule 8


def test_a_new_epoch_knows_no_prefixes() -> None:
    """A lane that is formed again has a scheduler of its own, and a stage that was told to open it forgets."""
    prompt = np.arange(9, dtype=np.uint32)
    lane = ScheduledLane(make_limits())
    lane.submit(with_prompt("first", prompt.tolist()))
    lane.run_to_end()
    assert lane.scheduler.pool.match(prompt, [])
    assert not Scheduler(lane.limits).pool.match(prompt, [])
    assert lane.finished["first"] is Finish.LENGTH


def test_release_goes_out_with_the_very_next_step() -> None:
    lane = ScheduledLane(make_limits(depth=4))
    lane.submit(make_request("a", 5, 9))
    lane.submit(make_request("b", 5, 9))
    step_of(lane)
    lane.abort("a")
    step = step_of(lane)
    assert unpack(encode(step, 5).release_slots, U32, "release").tolist() == [0]
    assert step.slots.tolist() == [1]
    lane.run_to_end()
    lane.check_end()
