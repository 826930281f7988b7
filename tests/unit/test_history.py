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
from stagemesh.router.api.history import REQUESTS_KEPT, RequestHistory
from stagemesh.router.api.live_request import LiveRequest
from stagemesh.router.lane.step_records import StepRecords
from stagemesh.router.scheduler import Finish
from stagemesh.router.scheduler.sequence import Sequence

PORT: Any = SimpleNamespace(index=0)


def make_live(name: str) -> LiveRequest:
    request = make_request(name)
    live = LiveRequest(request=request, port=PORT, handle=1, arrived=1.0, first_token=1.5, ended=3.0)
    live.sequence = Sequence(request, order=1)
    live.sequence.chunks = [(np.array([1, 2, 3], np.uint32), np.array([4, 5, 6]))]
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
