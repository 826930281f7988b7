"""The scheduler keeps nothing of requests that have ended."""

from __future__ import annotations

import gc
from dataclasses import replace

from scheduled_lane import make_limits, make_request

from stagemesh.router.scheduler import Scheduler
from stagemesh.router.scheduler.sequence import Sequence


def num_sequences() -> int:
    gc.collect()
    return sum(type(one) is Sequence for one in gc.get_objects())


def test_ended_requests_do_not_wait_for_their_deadlines() -> None:
    before = num_sequences()
    scheduler = Scheduler(make_limits())
    for number in range(2_000):
        scheduler.submit(replace(make_request(f"r{number}"), deadline=1e6 + number), float(number))
        if number >= 10:
            scheduler.abort(f"r{number - 10}")
    assert num_sequences() - before < 200
    assert len(scheduler.live) == 10
    assert len(scheduler.expire(1e6 + 1_990)) == 1, "a live one lost its deadline"
