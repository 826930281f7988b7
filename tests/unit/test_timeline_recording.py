"""Whose steps a timeline has, where the lane is lost before or meanwhile."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from scheduled_lane import make_limits

from stagemesh.router.config import RouterConfig
from stagemesh.router.lane import timeline as recording
from stagemesh.router.lane.lane import Lane
from stagemesh.router.lane.timeline import record_timeline
from stagemesh.router.scheduler import Scheduler
from stagemesh.v1 import admin_pb2
from stagemesh.wire.columns import U64, unpack
from stagemesh.wire.errors import StageLostError, UnavailableError


@pytest.fixture
async def lane() -> AsyncIterator[Lane]:
    """Of one stage, formed once, in epoch 7."""
    events: Any = SimpleNamespace(on_ready=lambda ready: None)
    one = Lane(RouterConfig(model="m", stages=("127.0.0.1:1",)), "f" * 64, 128, events)
    form(one, 7)
    yield one
    for stage in one.stages:
        await stage.aclose()


def form(lane: Lane, epoch: int) -> None:
    lane.scheduler = Scheduler(make_limits())
    lane.epoch, lane.num_steps, lane.num_formed = epoch, 0, lane.num_formed + 1
    lane.records.clear()


def send(lane: Lane, count: int) -> None:
    for _ in range(count):
        lane.num_steps += 1
        step: Any = SimpleNamespace(number=lane.num_steps, num_tokens=1, num_decodes=1, slots=np.zeros(1))
        lane.records.sent(step, 1_000 * lane.num_steps)


def lose(lane: Lane) -> None:
    lane._drop(StageLostError("stage 0 is gone"))


async def record(
    lane: Lane, monkeypatch: pytest.MonkeyPatch, meanwhile: Callable[[], None]
) -> admin_pb2.GetTimelineResponse:
    async def sleep(seconds: float) -> None:
        meanwhile()

    monkeypatch.setattr(recording, "REPORT_WAIT_S", 0.0)
    monkeypatch.setattr(recording, "asyncio", SimpleNamespace(sleep=sleep))
    return await record_timeline(lane, 1.0)


def numbers(timeline: admin_pb2.GetTimelineResponse) -> list[int]:
    return list(unpack(timeline.numbers, U64, "numbers").tolist())


async def test_without_a_lane_there_is_none_and_it_says_why(
    lane: Lane, monkeypatch: pytest.MonkeyPatch
) -> None:
    lose(lane)
    with pytest.raises(UnavailableError, match="no lane is ready: stage 0 is gone") as refused:
        await record(lane, monkeypatch, lambda: None)
    assert refused.value.reason == "LANE_NOT_READY"


async def test_a_lane_that_is_formed_again_has_the_steps_of_its_new_epoch(
    lane: Lane, monkeypatch: pytest.MonkeyPatch
) -> None:
    send(lane, 3)

    def meanwhile() -> None:
        send(lane, 4)
        form(lane, 8)
        send(lane, 2)

    timeline = await record(lane, monkeypatch, meanwhile)
    assert (timeline.epoch, numbers(timeline)) == (8, [1, 2])


async def test_a_lane_that_is_lost_for_good_has_the_steps_until_then(
    lane: Lane, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It raises its epoch when it tries again, and forgets nothing before it succeeds."""
    send(lane, 3)

    def meanwhile() -> None:
        send(lane, 2)
        lose(lane)
        lane.epoch = 8

    timeline = await record(lane, monkeypatch, meanwhile)
    assert (timeline.epoch, numbers(timeline)) == (7, [4, 5])
