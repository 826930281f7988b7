"""A request's deadline travels with it: what nobody waits for any more costs no step."""

from __future__ import annotations

from dataclasses import replace

import pytest
from scheduled_lane import ScheduledLane, make_limits, make_request

from stagemesh.router.scheduler import Finish
from stagemesh.wire.errors import ResourceExhaustedError


def test_expired_work_is_dropped_before_it_costs_a_step() -> None:
    """Waiting, in its prompt, and decoding."""
    lane = ScheduledLane(make_limits(max_slots=2, step_tokens=8, depth=4))
    for name, length in (("decodes", 3), ("prefills", 60), ("waits", 3)):
        lane.submit(replace(make_request(name, length, 30), deadline=5.0))
    lane.submit(make_request("stays", 3, 4))
    for _ in range(2):
        lane.step()
        lane.result()
    lane.now = 4.999
    lane.expire()
    assert not lane.finished
    lane.step()
    lane.now = 5.0
    lane.expire()
    assert lane.finished == dict.fromkeys(("decodes", "prefills", "waits"), Finish.DEADLINE)
    assert lane.scheduler.pool.num_free == lane.limits.num_blocks
    sent = len(lane.steps)
    lane.run_to_end()
    lane.check_end()
    for step in lane.steps[sent:]:
        assert [sequence.request.request_id for sequence in step.sequences] == ["stays"]


def test_one_that_ended_in_time_does_not_end_again() -> None:
    lane = ScheduledLane(make_limits())
    lane.submit(replace(make_request("a", 3, 2), deadline=1.0))
    lane.run_to_end()
    lane.now = 2.0
    assert not len(lane.scheduler.expire(lane.now))
    lane.check_end()


def test_the_hint_when_to_try_again_follows_the_pace_of_the_queue() -> None:
    """Ten wait behind the next and one ends a second: a tenth of the queue takes a second; at twice the pace, half."""
    hints = []
    for seconds in (1.0, 0.5):
        lane = ScheduledLane(make_limits(max_slots=1, max_waiting=10))
        for index in range(11):
            lane.submit(make_request(f"r{index}", 3, 1))
        for index in range(11, 40):
            while len(lane.finished) < index - 10:
                if lane.step() is None:
                    lane.now += seconds
                    lane.result()
            lane.submit(make_request(f"r{index}", 3, 1))
        with pytest.raises(ResourceExhaustedError) as full:
            lane.scheduler.submit(make_request("too many"), lane.now)
        hints.append(full.value.retry_after_s)
    assert hints == pytest.approx([1.0, 0.5], rel=0.15)
