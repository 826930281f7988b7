"""What a lane counts, through preemptions and slots that change hands."""

from __future__ import annotations

import numpy as np

from stagemesh.router.lane.stats import LaneStats
from stagemesh.router.scheduler import Finish, Request, StepDeltas
from stagemesh.router.scheduler.sequence import TOKEN_BITS, Sequence
from stagemesh.wire.telemetry.histogram import BulkHistogram


def sequence(name: str, slot: int, arrived: float = 0.0) -> Sequence:
    prompt = np.array([1, 2], np.uint32)
    made = Sequence(Request(request_id=name, prompt=prompt, max_tokens=9, arrived=arrived), order=1)
    made.slot = slot
    return made


def tokens(stats: LaneStats, now: float, *sequences: Sequence, end: Sequence | None = None) -> None:
    """A step brings each of them a token."""
    for one in sequences:
        one.chunks.append(np.array([1 << TOKEN_BITS | 7], np.uint64))
    stats.take(
        StepDeltas(
            sequences=np.array([*sequences, None], object)[:-1],
            slots=np.array([one.slot for one in sequences], np.int64),
            token_ids=np.full(len(sequences), 7, np.uint32),
            ends=((end, Finish.LENGTH),) if end else (),
        ),
        now,
    )
    if end:
        end.finish = Finish.LENGTH


def total(histogram: BulkHistogram) -> tuple[int, float]:
    (snapshot,) = histogram.snapshots()
    return snapshot.count, round(snapshot.total, 6)


def test_times_of_requests_that_run_side_by_side() -> None:
    stats = LaneStats()
    stats.open_lane(4)
    a, b = sequence("a", 0, arrived=1.0), sequence("b", 1, arrived=2.0)
    stats.admitted(a, 1.5)
    stats.admitted(b, 2.25)
    tokens(stats, 3.0, a, b)
    tokens(stats, 3.5, a)
    tokens(stats, 4.0, a, b, end=a)
    assert total(stats.queue) == (2, 0.75)
    assert total(stats.ttft) == (2, 3.0)
    assert total(stats.inter_token) == (3, 2.0), "half a second twice, and one of b"
    assert total(stats.duration) == (1, 3.0)
    assert total(stats.time_per_token) == (1, 0.5)
    assert stats.finished == {"length": 1}


def test_a_preemption_is_one_long_inter_token_time_and_no_second_first_token() -> None:
    stats = LaneStats()
    stats.open_lane(2)
    a = sequence("a", 0)
    stats.admitted(a, 0.1)
    tokens(stats, 1.0, a)
    # a yields slot 0 to b, and comes back on slot 1.
    a.num_preemptions, a.slot = 1, -1
    b = sequence("b", 0)
    stats.admitted(b, 1.5)
    tokens(stats, 2.0, b)
    a.slot = 1
    stats.admitted(a, 2.5)
    tokens(stats, 4.0, a, b, end=a)
    assert total(stats.queue)[0] == 2
    assert total(stats.ttft) == (2, 3.0)
    assert total(stats.inter_token) == (2, 3.0 + 2.0)
    assert total(stats.time_per_token) == (1, 3.0)


def test_a_slot_that_changes_hands_starts_anew() -> None:
    stats = LaneStats()
    stats.open_lane(1)
    a = sequence("a", 0)
    stats.admitted(a, 0.0)
    tokens(stats, 1.0, a, end=a)
    b = sequence("b", 0, arrived=1.0)
    stats.admitted(b, 5.0)
    tokens(stats, 6.0, b)
    assert total(stats.inter_token) == (0, 0.0)
    assert total(stats.ttft) == (2, 1.0 + 5.0)
