"""The scheduler's promises, one by one."""

from __future__ import annotations

import random
from dataclasses import replace

import numpy as np
import pytest
from scheduled_lane import ScheduledLane, make_limits, make_request
from scheduled_stage import END_TOKEN, expected_answer

from stagemesh.router.scheduler import Finish, Request, Step
from stagemesh.router.scheduler.step import encode
from stagemesh.wire.columns import U32, unpack
from stagemesh.wire.errors import InvalidArgumentError, ResourceExhaustedError


def names(step: Step | None) -> list[str]:
    """Whose rows a step has."""
    assert step is not None
    return [sequence.request.request_id for sequence in step.sequences]


def request_that_stops(at: int, max_tokens: int = 12) -> Request:
    """One whose answer has its first end token as token `at` (from 0)."""
    for attempt in range(5000):
        request = make_request(f"stops{attempt}", 3 + attempt % 5, max_tokens, stops=True)
        if len(expected_answer(request)) == at + 1 and expected_answer(request)[-1] == END_TOKEN:
            return request
    raise AssertionError("no such request")


def test_a_request_alone() -> None:
    lane = ScheduledLane(make_limits())
    lane.submit(make_request("a", 5, 4))
    lane.run_to_end()
    lane.check_end()
    assert [step.num_tokens for step in lane.steps] == [5, 1, 1, 1]


def test_a_new_request_is_in_the_next_step_beside_those_that_decode() -> None:
    lane = ScheduledLane(make_limits())
    lane.submit(make_request("a", 5, 20))
    lane.step()
    lane.step()
    lane.submit(make_request("b", 7))
    lane.result()
    assert names(lane.step()) == ["a", "b"]


def test_a_step_without_changes_names_the_rows_of_an_earlier_one() -> None:
    lane = ScheduledLane(make_limits(block_size=16))
    for name in "abcd":
        lane.submit(make_request(name, 3, 12))
    sizes = []
    while len(lane.finished) < 4:
        if step := lane.step():
            sizes.append(len(encode(step, 5).SerializeToString()))
        else:
            lane.result()
    lane.run_to_end()
    lane.check_end()
    assert max(sizes[2:]) <= 8, "a step in which nothing changes carries its rows"


def test_prompts_go_in_chunks_within_the_budget() -> None:
    lane = ScheduledLane(make_limits(step_tokens=8))
    lane.submit(make_request("a", 20, 3))
    assert [lane.step().num_tokens, lane.step().num_tokens] == [8, 8]  # type: ignore[union-attr]
    assert not any(step.sample.any() for step in lane.steps)
    lane.result()
    last = lane.step()
    assert last is not None
    assert (last.num_tokens, last.sample.tolist()) == (4, [True])
    lane.run_to_end()
    lane.check_end()


def test_no_more_steps_than_depth_are_unanswered() -> None:
    lane = ScheduledLane(make_limits(depth=3, lookahead=9, num_microbatches=1))
    lane.submit(make_request("a", 5, 20))
    assert [lane.step() is None for _ in range(5)] == [False] * 3 + [True] * 2
    lane.result()
    assert lane.step() is not None
    assert lane.step() is None


@pytest.mark.parametrize("lookahead", [0, 1, 2, 3])
def test_lookahead_is_how_many_tokens_may_be_unseen(lookahead: int) -> None:
    lane = ScheduledLane(make_limits(depth=9, lookahead=lookahead))
    lane.submit(make_request("a", 5, 20))
    while lane.step():
        pass
    assert len(lane.steps) == 1 + lookahead
    lane.run_to_end()
    lane.check_end()


def test_lookahead_never_passes_max_tokens() -> None:
    lane = ScheduledLane(make_limits(depth=9, lookahead=8))
    lane.submit(make_request("a", 5, 3))
    while lane.step():
        pass
    assert len(lane.steps) == 3
    lane.run_to_end()
    lane.check_end()
    assert lane.num_ignored == 0


def test_an_end_token_found_late_costs_ignored_rows_and_nothing_else() -> None:
    lane = ScheduledLane(make_limits(depth=4, lookahead=3))
    request = request_that_stops(at=2)
    lane.submit(request)
    lane.run_to_end()
    lane.check_end()
    assert lane.finished[request.request_id] is Finish.STOP
    assert lane.answers[request.request_id][-1] == END_TOKEN
    assert lane.num_ignored == 3


def test_who_gets_the_slot_of_one_that_ended_late_gets_none_of_its_tokens() -> None:
    """One slot; B takes it while steps of A are still unanswered."""
    lane = ScheduledLane(make_limits(max_slots=1, depth=4, lookahead=3))
    first = request_that_stops(at=1)
    lane.submit(first)
    lane.submit(make_request("b", 6, 5))
    while first.request_id not in lane.finished:
        if lane.step() is None:
            lane.result()
    assert lane.in_flight, "nothing of the first was in flight: this shows nothing"
    step = lane.step()
    assert names(step) == ["b"]
    assert step is not None
    assert step.slots.tolist() == [0]
    assert unpack(encode(step, 5).release_slots, U32, "release").tolist() == [0]
    lane.run_to_end()
    lane.check_end()
    assert lane.num_ignored > 0
    assert lane.answers["b"] == expected_answer(lane.requests["b"])


@pytest.mark.parametrize("num_steps", [0, 1, 2, 3])
def test_abort_frees_at_once_and_the_next_step_says_so(num_steps: int) -> None:
    """Waiting, in its prompt, or decoding."""
    lane = ScheduledLane(make_limits(step_tokens=8, depth=4))
    lane.submit(make_request("a", 14, 20))
    for _ in range(num_steps):
        lane.step()
    lane.abort("a")
    assert lane.scheduler.pool.num_free == lane.limits.num_blocks
    assert lane.scheduler.num_running == lane.scheduler.num_waiting == 0
    assert not len(lane.scheduler.abort("a"))
    lane.submit(make_request("b", 3, 2))
    step = lane.step()
    assert names(step) == ["b"]
    assert step is not None
    assert step.changes.released == ([0] if num_steps else [])
    lane.run_to_end()
    lane.check_end()


def test_an_aborted_id_can_be_used_again_while_its_old_steps_are_in_flight() -> None:
    lane = ScheduledLane(make_limits(depth=4))
    lane.scheduler.submit(make_request("a", 5, 20), 0.0)
    step = lane.scheduler.next_step(0.0)
    assert step is not None
    tokens = lane.stage.run(encode(step, 5))
    lane.scheduler.abort("a")
    lane.scheduler.submit(make_request("a", 9, 3), 0.0)
    assert not len(lane.scheduler.take_result(step.number, tokens, 0.0))


def test_first_come_first_served() -> None:
    lane = ScheduledLane(make_limits(max_slots=1))
    for name in "abc":
        lane.submit(make_request(name, 3, 2))
    lane.run_to_end()
    assert list(lane.finished) == ["a", "b", "c"]


def test_higher_priority_goes_first() -> None:
    lane = ScheduledLane(make_limits(max_slots=1))
    for name, priority in (("a", 0), ("low", -1), ("b", 0), ("high", 5), ("c", 0)):
        lane.submit(make_request(name, 3, 2, priority=priority))
    lane.run_to_end()
    lane.check_end()
    assert list(lane.finished) == ["high", "a", "b", "c", "low"]


def test_out_of_blocks_the_youngest_yields_and_loses_nothing() -> None:
    """Two that need 6 of 8 blocks each."""
    lane = ScheduledLane(make_limits(num_blocks=8, max_blocks=8))
    lane.submit(make_request("old", 8, 16))
    lane.submit(make_request("young", 8, 16))
    lane.run_to_end()
    lane.check_end()
    assert lane.scheduler.num_preemptions > 0
    assert list(lane.finished) == ["old", "young"]


def test_out_of_blocks_the_lower_priority_yields() -> None:
    lane = ScheduledLane(make_limits(num_blocks=8, max_blocks=8))
    lane.submit(make_request("old", 8, 16))
    lane.submit(make_request("young", 8, 16, priority=1))
    lane.run_to_end()
    lane.check_end()
    assert lane.scheduler.num_preemptions > 0
    assert list(lane.finished) == ["young", "old"]


def begins_alike(index: int) -> Request:
    """Ten blocks of its prompt are those of every other, one token is its own."""
    prompt = np.append(make_request("first", 40).prompt, np.uint32(index))
    return replace(make_request(f"r{index}", max_tokens=4), prompt=prompt)


def test_blocks_of_a_prefix_that_others_own_are_not_needed_twice() -> None:
    """Eight that begin alike, and room for one that does not."""
    lane = ScheduledLane(make_limits(num_blocks=20, max_blocks=20))
    for index in range(8):
        lane.submit(begins_alike(index))
        if not index:
            lane.step()
            lane.result()
    while lane.scheduler.num_waiting:
        assert lane.step() or lane.result()
    assert lane.scheduler.num_running == 8
    lane.run_to_end()
    assert lane.scheduler.num_preemptions == 0
    lane.check_end()


def test_a_step_admits_cached_prefixes_up_to_its_positions_and_one_more() -> None:
    """Their blocks cost no time; a GPU stage has room for as many changes of block tables, and those of one prompt."""
    lane = ScheduledLane(make_limits(num_blocks=100, step_tokens=16))
    for index in range(8):
        lane.submit(begins_alike(index))
        while not index and lane.scheduler._prefill_waits():
            lane.step()
            lane.result()
    step = lane.step()
    assert step
    # Ten blocks of the prefix and one of its own for each.
    assert len(step.changes.admitted) == 2
    lane.run_to_end()
    lane.check_end()


def test_prompts_that_wait_for_blocks_are_no_prefill_at_hand() -> None:
    """They would make steps many and small, and keep a part of each for nothing."""
    lane = ScheduledLane(make_limits(num_blocks=12, max_blocks=12, step_tokens=16))
    lane.submit(make_request("runs", 20, 12))
    lane.step()
    lane.step()
    for index in range(4):
        lane.submit(make_request(f"waits{index}", 30, 2))
    scheduler = lane.scheduler
    assert (scheduler.num_running, scheduler.num_waiting, scheduler.pool.num_free) == (1, 4, 7)
    assert scheduler._at_hand() == (0, 0)
    assert not scheduler._prefill_waits()
    lane.run_to_end()
    lane.check_end()


def test_nobody_is_admitted_while_one_yields() -> None:
    """Room comes free before the one that yields has left: it came before those that wait, and is the first to get it."""
    lane = ScheduledLane(make_limits(num_blocks=12, max_blocks=12, max_slots=3, lookahead=3, depth=4))
    for name in ("old", "young", "third"):
        lane.submit(make_request(name, 8, 24, priority=int(name == "third")))
    lane.submit(make_request("later", 4, 4))
    young = lane.scheduler.sequence("young")
    assert young
    while young.order not in lane.scheduler.running.yielding:
        if lane.step() is None:
            lane.result()
    lane.abort("third")
    assert lane.scheduler.pool.num_free > 2
    while young.order in lane.scheduler.running.yielding:
        assert young.slot >= 0
        if (step := lane.step()) is not None:
            assert not step.changes.admitted
        else:
            lane.result()
    lane.run_to_end()
    lane.check_end()
    admitted = [one.request.request_id for step in lane.steps for one in step.changes.admitted]
    assert admitted[:4] == ["third", "old", "young", "young"]


def test_a_long_prompt_does_not_stop_those_that_decode() -> None:
    lane = ScheduledLane(make_limits(step_tokens=4, depth=1))
    lane.submit(make_request("a", 3, 12))
    lane.step()
    lane.result()
    lane.submit(make_request("long", 60, 2))
    for _ in range(8):
        assert "a" in names(lane.step())
        lane.result()
    assert "long" in names(lane.steps[-1])


def test_those_that_decode_leave_a_part_of_every_step_to_prompts() -> None:
    """They could fill it alone; a prompt would wait until one of them ends."""
    lane = ScheduledLane(make_limits(max_slots=20, step_tokens=16))
    for index in range(16):
        lane.submit(make_request(f"decodes{index}", 2, 20))
    while not all(lane.answers[f"decodes{index}"] for index in range(16)):
        if lane.step() is None:
            lane.result()
    lane.submit(make_request("prompt", 6, 2))
    while not lane.answers["prompt"]:
        if lane.step() is None:
            lane.result()
    assert not lane.finished, "somebody ended first"
    lane.run_to_end()
    lane.check_end()


def test_the_blocks_of_those_that_decode_side_by_side_stay_consecutive() -> None:
    lane = ScheduledLane(make_limits(consecutive_blocks=True))
    for name in ("a", "b", "c"):
        lane.submit(make_request(name, 6, 30))
    while len(lane.answers["c"]) < 25:
        if lane.step() is None:
            lane.result()
    slots = lane.scheduler.running.slots
    for sequence in lane.scheduler.live:
        blocks = slots.tables[sequence.slot, : slots.num_blocks[sequence.slot]].tolist()
        assert len(blocks) > 6
        assert blocks == list(range(blocks[0], blocks[0] + len(blocks)))
    lane.run_to_end()
    lane.check_end()


def test_everybody_gets_on_while_new_ones_keep_coming() -> None:
    """The first comer is not overtaken for ever by a stream of later ones."""
    lane = ScheduledLane(make_limits(num_blocks=24, max_blocks=24, max_slots=4, step_tokens=6))
    lane.submit(make_request("first", 20, 20))
    for turn in range(300):
        if turn % 3 == 0:
            lane.submit(make_request(f"later{turn}", 3, 4))
        if lane.step() is None:
            lane.result()
        if "first" in lane.finished:
            break
    assert "first" in lane.finished
    lane.run_to_end()
    lane.check_end()


@pytest.mark.parametrize("num_microbatches", [2, 3, 4])
def test_microbatches_share_the_decodes(num_microbatches: int) -> None:
    """Once all decode, no step has more than its share, and nobody is left out for a round."""
    lane = ScheduledLane(
        make_limits(num_microbatches=num_microbatches, depth=num_microbatches, step_tokens=64)
    )
    for index in range(8):
        lane.submit(make_request(f"r{index}", 3, 16))
    share = -(-8 // num_microbatches)
    for _ in range(12):
        if lane.step() is None:
            lane.result()
    settled = len(lane.steps)
    while not lane.finished:
        if lane.step() is None:
            lane.result()
    rounds = lane.steps[settled : settled + 2 * num_microbatches]
    assert all(len(step.slots) <= share for step in rounds)
    counts = [sum(f"r{index}" in names(step) for step in rounds) for index in range(8)]
    assert max(counts) - min(counts) <= 1
    lane.run_to_end()
    lane.check_end()


def test_refusals_change_nothing() -> None:
    lane = ScheduledLane(make_limits(num_blocks=8, max_blocks=8, max_waiting=1, max_slots=1))
    with pytest.raises(InvalidArgumentError) as above:
        lane.scheduler.submit(make_request("big", 20, 14), 0.0)
    assert (above.value.reason, above.value.field) == ("ABOVE_KV_CAPACITY", "max_tokens")
    lane.submit(make_request("fits", 20, 13))
    with pytest.raises(InvalidArgumentError) as twice:
        lane.scheduler.submit(make_request("fits", 3, 3), 0.0)
    assert twice.value.reason == "DUPLICATE_REQUEST_ID"
    lane.submit(make_request("b"))
    with pytest.raises(ResourceExhaustedError) as full:
        lane.scheduler.submit(make_request("c"), 0.0)
    assert full.value.reason == "QUEUE_FULL"
    assert full.value.retry_after_s
    assert (lane.scheduler.num_waiting, lane.scheduler.num_running) == (2, 0)
    lane.run_to_end()
    lane.check_end()


def test_the_queue_holds_those_that_cannot_start() -> None:
    """Whoever the next step takes does not wait, so an idle lane refuses nobody whom it has a slot and blocks for."""
    lane = ScheduledLane(make_limits(max_slots=6, num_blocks=10, max_blocks=10, max_waiting=2))
    for name in "abcdefg":  # two blocks each: five have room
        lane.submit(make_request(name, max_tokens=1))
    with pytest.raises(ResourceExhaustedError):
        lane.scheduler.submit(make_request("h"), 0.0)
    lane.run_to_end()
    lane.check_end()


def test_without_max_tokens_a_request_may_have_the_whole_lane() -> None:
    lane = ScheduledLane(make_limits(num_blocks=8, max_blocks=100))
    lane.scheduler.submit(replace(make_request("long", 20, 300), open_ended=True), 0.0)
    lane.requests["long"] = make_request("long", 20, 8 * 4 - 20 + 1)
    lane.run_to_end()
    lane.check_end()
    with pytest.raises(InvalidArgumentError, match="prompt of 40 tokens"):
        lane.scheduler.submit(replace(make_request("no", 40, 300), open_ended=True), 0.0)


def test_the_hint_when_to_try_again_does_not_count_idle_time() -> None:
    def hint(idle_s: float) -> float | None:
        lane = ScheduledLane(make_limits(max_slots=1, max_waiting=40))
        for index in range(90):
            lane.now += 0.1
            if index == 30:
                lane.now += idle_s
            if index < 60:
                lane.submit(make_request(f"r{index}", max_tokens=1))
                lane.run_to_end()
        for index in range(41):
            lane.submit(make_request(f"q{index}", max_tokens=1))
        with pytest.raises(ResourceExhaustedError) as full:
            lane.scheduler.submit(make_request("z"), lane.now)
        return full.value.retry_after_s

    assert hint(600.0) == hint(0.0)


def test_a_result_that_does_not_fit_its_step_is_refused() -> None:
    lane = ScheduledLane(make_limits())
    lane.submit(make_request("a", 5, 4))
    lane.step()
    step, tokens = lane.in_flight[0]
    for number, wrong in ((step.number + 1, tokens), (step.number, tokens[:0])):
        with pytest.raises(InvalidArgumentError) as refused:
            lane.scheduler.take_result(number, wrong, 0.0)
        assert refused.value.reason == "BAD_RESULT"


@pytest.mark.parametrize("seed", range(30))
def test_many_at_once_under_pressure(seed: int) -> None:
    """As the random machine, but with more at once and results that lag behind."""
    generator = random.Random(seed)
    blocks = generator.choice([12, 20, 60])
    microbatches = generator.choice([1, 2, 4])
    lookahead = generator.choice([0, 1, 2])
    lane = ScheduledLane(
        make_limits(
            num_blocks=blocks,
            max_blocks=blocks,
            max_slots=generator.choice([2, 8]),
            step_tokens=generator.choice([3, 8, 64]),
            num_microbatches=microbatches,
            depth=microbatches + (lookahead > 0),
            lookahead=lookahead,
        )
    )
    pending = [
        make_request(f"r{index}", generator.randint(1, 20), generator.randint(1, 20), stops=index % 2 == 0)
        for index in range(40)
    ]
    for _ in range(20_000):
        if len(lane.finished) == 40 and not lane.in_flight:
            break
        if pending and generator.random() < 0.3:
            lane.submit(pending.pop())
        if generator.random() < 0.6:
            lane.step()
        elif lane.in_flight:
            lane.result()
    lane.check_end()


def test_every_token_is_known_with_the_step_that_sampled_it() -> None:
    """Also those that were put away, and through a preemption."""
    lane = ScheduledLane(make_limits(num_blocks=80, max_blocks=80, max_slots=2))
    lane.submit(make_request("old", 8, 160))
    lane.submit(make_request("young", 8, 160))
    sequences = {sequence.request.request_id: sequence for sequence in lane.scheduler.live}
    lane.run_to_end()
    assert sequences["young"].num_preemptions, "nobody yielded: this shows less"
    for name, sequence in sequences.items():
        sampled = [step.number for step in lane.steps if sequence in step.sequences[step.sample]]
        assert sequence.token_ids.tolist() == lane.answers[name]
        assert len(lane.answers[name]) == 160
        assert sequence.sampled_steps.tolist() == sampled[:160]
        assert sequence.last_step == sampled[159]
