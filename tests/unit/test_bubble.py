"""The bubble share is one number, from a live lane's records and from a simulation."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from stagemesh.router.bubble import ActiveTime, bubble_share
from stagemesh.router.lane.step_records import StepRecords
from stagemesh.router.lane.step_sums import StepSums
from stagemesh.router.lane.timings import COLUMNS, StageTimings
from stagemesh.router.simulate.simulation import Simulation
from stagemesh.router.simulate.spec import SimulationSpec
from stagemesh.v1 import stage_pb2
from stagemesh.wire.columns import U64, pack

MS = 1_000_000
IDLE_NS = 500 * MS


def step(number: int) -> Any:
    return SimpleNamespace(number=number, slots=[0], num_tokens=1, num_decodes=1)


def report(numbers: list[int], wait_ms: list[int], compute_ms: list[int]) -> stage_pb2.StageReport:
    columns = dict.fromkeys(("arrival", *COLUMNS), [0] * len(numbers)) | {
        "wait": wait_ms,
        "compute": compute_ms,
    }
    return stage_pb2.StageReport(
        numbers=pack(np.array(numbers), U64),
        **{f"{name}_ns": pack(np.array(column) * MS, U64) for name, column in columns.items()},
    )


def one_stream(records: StepRecords, step_ms: int, pause_after: int = 0) -> None:
    """Six steps one after the other, with a pause after one of them."""
    now = 1_000 * MS
    for number in range(1, 7):
        records.sent(step(number), now)
        now += step_ms * MS
        records.done(number, now)
        now += IDLE_NS if number == pause_after else 0


def test_time_without_work_is_no_bubble() -> None:
    """A stage that takes 6 of the 10 ms of each step stands idle for 4."""
    records, timings = StepRecords(), StageTimings()
    one_stream(records, step_ms=10, pause_after=3)
    timings.add(report([1, 2, 3], [0, 4, 4], [6, 6, 6]))
    timings.add(report([4, 5, 6], [4, 4, 4], [6, 6, 6]))
    assert records.bubble_share(timings, 1, 6) == pytest.approx(0.4)
    assert records.bubble_share(timings, 4, 4) == pytest.approx(0.4)


def test_what_a_stage_has_not_reported_counts_for_nothing() -> None:
    records, timings = StepRecords(), StageTimings()
    one_stream(records, step_ms=10)
    assert records.bubble_share(timings, 1, 6) == 0.0
    timings.add(report([1, 2], [0, 0], [5, 7]))
    assert records.bubble_share(timings, 1, 6) == pytest.approx(0.4)
    records.clear()
    timings.clear()
    assert records.recent_bubble_share(timings) == 0.0


def test_overlapping_steps_share_their_time() -> None:
    """Two stages of 10 ms, two steps in flight: after the first one nobody waits."""
    records, timings = StepRecords(), StageTimings()
    count = 50
    for number in range(1, count + 1):
        records.sent(step(number), max(0, number - 2) * 10 * MS)
        if number > 1:
            records.done(number - 1, number * 10 * MS)
    numbers = list(range(1, count + 1))
    timings.add(report(numbers, [0] * count, [10] * count))
    assert records.bubble_share(timings, 1, count) == pytest.approx(1 / count, abs=0.001)
    assert records.bubble_share(timings, 2, count) == 0.0


@given(st.lists(st.integers(0, 1_000), min_size=1, max_size=40), st.integers(1, 8))
def test_sums_between_steps_are_those_of_their_amounts(amounts: list[int], at_once: int) -> None:
    size = 16
    sums = StepSums(size)
    for start in range(0, len(amounts), at_once):
        part = np.array(amounts[start : start + at_once])
        sums.add(np.arange(start + 1, start + 1 + len(part)), part)
    last = len(amounts)
    for first in range(1, last + 1):
        expected = sum(amounts[first - 1 :]) if last - first + 1 < size else None
        assert sums.between(first, last) == expected
    assert sums.between(1, last + 1) is None


@pytest.mark.parametrize("num_stages", [1, 2, 4])
def test_a_full_pipeline_loses_its_hops(num_stages: int) -> None:
    """In a simulation: as many microbatches as stages, 8 ms each, 0.2 ms to the next stage."""
    spec = SimulationSpec.model_validate(
        {
            "stages": {"count": num_stages, "cost": "8ms"},
            "link": {"latency": "200us"},
            "router": {"step": 0, "result": 0, "client": 0, "request": 0},
            "load": {"arrivals": "at_once", "requests": 32, "prompt": {"fixed": 1}, "output": {"fixed": 500}},
            "lane": {"max_in_flight": num_stages, "prefix_cache": False},
        }
    )
    ring_ms = num_stages * 0.2 if num_stages > 1 else 0.0
    expected = ring_ms / (8 * num_stages + ring_ms)
    shares = [stage.bubble_share for stage in Simulation(spec).run().stages]
    assert shares == pytest.approx([expected] * num_stages, abs=0.01)


def test_bounds() -> None:
    assert bubble_share(3.0, 0.0) == 0.0
    assert bubble_share(3.0, 2.0) == 0.0
    active = ActiveTime()
    assert [active.answered(0, 10), active.answered(5, 12), active.answered(100, 101)] == [10, 2, 1]
    assert bubble_share(13.0 / 2, active.total_ns) == 0.5
