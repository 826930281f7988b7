"""Traces of ended requests: kept to a number, and worked out without their requests being kept."""

from __future__ import annotations

import asyncio
import gc
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from scheduled_lane import make_request

from stagemesh.router.api import history
from stagemesh.router.api.history import REQUESTS_KEPT, SAFE_STEPS, RequestHistory
from stagemesh.router.api.live_request import LiveRequest
from stagemesh.router.lane.step_records import StepRecords
from stagemesh.router.lane.timings import STEPS_KEPT, StageTimings
from stagemesh.router.scheduler import Finish
from stagemesh.router.scheduler.sequence import TOKEN_BITS, Sequence
from stagemesh.v1 import stage_pb2
from stagemesh.wire.columns import U64, pack

PORT: Any = SimpleNamespace(index=0)


def make_live(name: str, first_step: int = 4) -> LiveRequest:
    """One whose prompt took a step, and that decoded in the two after it."""
    request = make_request(name)
    live = LiveRequest(request=request, port=PORT, handle=1, arrived=1.0, first_token=1.5, ended=3.0)
    live.sequence = Sequence(request, order=1)
    live.sequence.prefill_steps = [first_step]
    steps = first_step + np.arange(3, dtype=np.uint64)
    live.sequence.chunks = [np.array([1, 2, 3], np.uint64) | steps << np.uint64(TOKEN_BITS)]
    live.finish = Finish.LENGTH
    return live


async def test_a_trace_is_the_same_before_and_after_it_settles(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(history, "SETTLE_S", 0.01)
    kept = RequestHistory([], StepRecords())
    live = make_live("a")
    kept.add(live)
    kept.end(live)
    before = kept.trace("a")
    assert before is not None
    assert (before.state, before.output_tokens, before.ttft_ms, before.total_ms) == (
        "length",
        3,
        500.0,
        2000.0,
    )
    await asyncio.sleep(0.1)
    del live
    gc.collect()
    assert not any(type(one) is LiveRequest for one in gc.get_objects())
    assert kept.trace("a") == before
    assert kept.trace("b") is None


def a_stage(*numbers: int) -> Any:
    """That computed each of these steps for a millisecond."""
    stage: Any = SimpleNamespace(index=0, timings=StageTimings())
    report(stage, *numbers)
    return stage


def report(stage: Any, *numbers: int) -> None:
    times = {
        f"{name}_ns": pack([0] * len(numbers), U64)
        for name in ("arrival", "queue", "wait", "receive", "send")
    }
    compute_ns = pack([1_000_000] * len(numbers), U64)
    stage.timings.add(stage_pb2.StageReport(numbers=pack(numbers, U64), compute_ns=compute_ns, **times))


async def test_the_times_of_an_ended_request_are_read_before_the_stages_forget_them() -> None:
    stage, records = a_stage(4, 5, 6), StepRecords()
    kept = RequestHistory([stage], records)
    live = make_live("a")
    kept.add(live)
    kept._settle(live)
    before = kept.trace("a")
    assert before is not None
    assert [
        (one.prefill.num_steps, one.decode.num_steps, one.decode.compute_ms) for one in before.stages
    ] == [(1, 2, 2.0)]
    records.newest = 3 + SAFE_STEPS
    kept._settle_due()
    assert list(kept._unread) == ["a"], "it was read though its steps are not old"
    records.newest += 1
    kept._settle_due()
    report(stage, *(STEPS_KEPT + number for number in (4, 5, 6)))
    assert kept.trace("a") == before
    assert not kept._unread


async def test_what_is_kept_for_later_is_read_when_an_epoch_ends() -> None:
    stage = a_stage(4, 5, 6)
    kept = RequestHistory([stage], StepRecords())
    live, ended = make_live("a"), make_live("b")
    for one in (live, ended):
        kept.add(one)
    kept._settle(live)
    kept.end(ended)
    before = kept.trace("a")
    kept.settle_all()
    stage.timings.clear()
    assert before is not None
    assert before.stages[0].decode.num_steps == 2
    assert kept.trace("a") == before
    trace = kept.trace("b")
    assert trace is not None
    assert list(trace.stages) == list(before.stages)


async def test_a_request_that_took_long_is_not_left_behind_younger_ones() -> None:
    records = StepRecords()
    records.newest = 10 + SAFE_STEPS
    kept = RequestHistory([a_stage(4, 5, 6)], records)
    young, old = make_live("young", records.newest - 2), make_live("old")
    for live in (young, old):
        kept.add(live)
        kept._settle(live)
    assert list(kept._unread) == ["young"]


async def test_ended_requests_are_kept_to_a_number_however_fast_they_end() -> None:
    gc.collect()
    before = sum(type(one) is LiveRequest for one in gc.get_objects())
    kept = RequestHistory([], StepRecords())
    for number in range(3 * REQUESTS_KEPT):
        live = make_live(f"r{number}")
        kept.add(live)
        kept.end(live)
    gc.collect()
    assert sum(type(one) is LiveRequest for one in gc.get_objects()) - before <= REQUESTS_KEPT + 1
    assert kept.trace(f"r{number}") is not None
    assert kept.trace("r0") is None
    kept.settle_all()
    assert len(kept._kept) == REQUESTS_KEPT


async def test_requests_that_nobody_asks_for_are_let_go_of_unread() -> None:
    kept = RequestHistory([], StepRecords())
    for number in range(2 * REQUESTS_KEPT):
        live = make_live(f"r{number}")
        kept.add(live)
        kept._settle(live)
    assert len(kept._unread) == len(kept._kept) == REQUESTS_KEPT


async def test_an_id_that_is_used_again_has_the_trace_of_its_last_request() -> None:
    kept = RequestHistory([], StepRecords())
    first, second = make_live("a"), make_live("a")
    assert second.sequence is not None
    second.finish, second.sequence.chunks = None, []
    kept.add(first)
    kept.end(first)
    kept.add(second)
    kept._settle(first)
    trace = kept.trace("a")
    assert trace is not None
    assert (trace.state, trace.output_tokens) == ("running", 0)


async def test_a_trace_waits_for_reports_that_came_while_the_router_had_no_turn(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    clock = SimpleNamespace(now=3.0)
    monkeypatch.setattr(history, "time", SimpleNamespace(monotonic=lambda: clock.now))
    stage = a_stage(4, 5)
    kept = RequestHistory([stage], StepRecords())
    live, lacking = make_live("a"), make_live("b", first_step=8)
    for one in (live, lacking):
        kept.add(one)
        kept.end(one)
    clock.now += 60.0
    kept._settle_due()
    assert not kept._unread, "it settled before the reports that came meanwhile were read"
    report(stage, 6)
    clock.now += history.SETTLE_S
    kept._settle_due()
    assert list(kept._unread) == ["a", "b"], "only a stall excuses the reports"
    trace = kept.trace("a")
    assert trace is not None
    assert trace.stages[0].decode.num_steps == 2
    kept.settle_all()
