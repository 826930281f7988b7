"""Which stage a lane names when it breaks: two ends of a link see it, and either may tell first."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from typing import Any

import pytest
from scheduled_lane import make_limits, make_request

from stagemesh.router.config import RouterConfig
from stagemesh.router.lane.lane import Lane, LaneEvents
from stagemesh.router.scheduler import Scheduler
from stagemesh.v1 import stage_pb2
from stagemesh.wire.errors import InternalError

ADDRESSES = ("127.0.0.1:1", "127.0.0.1:2", "127.0.0.1:3")


def ignore(*_: object) -> None:
    """Nobody listens."""


@pytest.fixture
async def lane() -> AsyncIterator[Lane]:
    """One that serves, as far as its losses go."""
    events = LaneEvents(
        on_deltas=ignore, on_admitted=ignore, on_lost=ignore, on_ready=ignore, on_forget=ignore
    )
    one = Lane(RouterConfig(model="m", stages=ADDRESSES), "f" * 64, 128, events)
    one._lost = asyncio.get_running_loop().create_future()
    yield one
    for stage in one.stages:
        await stage.aclose()


@pytest.mark.parametrize(
    ("blamed", "culprit"),
    [("", 0), ("stage 0", 0), (ADDRESSES[1], 1), (ADDRESSES[2], 2), ("127.0.0.1:99", 0)],
)
async def test_a_stage_whose_link_broke_blames_the_other_end(lane: Lane, blamed: str, culprit: int) -> None:
    lane._lose(lane.stages[0], "the link broke", blamed)
    assert lane._lost
    error = lane._lost.result()
    assert error.stage == lane.stages[culprit].name
    assert "the link broke" in error.message
    assert ("stage 0 (127.0.0.1:1) says" in error.message) == (culprit != 0)


async def test_who_tells_first_counts(lane: Lane) -> None:
    lane._lose(lane.stages[2], "gone", "")
    lane._lose(lane.stages[0], "the link broke", ADDRESSES[1])
    assert lane._lost
    assert lane._lost.result().stage == lane.stages[2].name


async def test_an_answer_that_cannot_be_taken_loses_the_stage_and_says_so(lane: Lane) -> None:
    class Call:
        async def read(self) -> stage_pb2.ExecuteResponse:
            return stage_pb2.ExecuteResponse()

    def take(*_: object) -> None:
        raise ValueError("a column is short")

    call: Any = Call()
    await lane.stages[1]._read(call, take, lane._lose)
    assert lane._lost
    error = lane._lost.result()
    assert error.stage == lane.stages[1].name
    assert "a column is short" in error.message


async def test_a_bug_in_the_scheduler_ends_what_runs_with_a_word_and_not_in_silence(
    lane: Lane, caplog: pytest.LogCaptureFixture
) -> None:
    lane.scheduler = Scheduler(make_limits())
    lane.stats.open_lane(8)
    lane.submit(make_request("a"))

    def fail(now: float) -> None:
        raise KeyError("what nobody thought of")

    lane.scheduler.next_step = fail  # type: ignore[assignment, method-assign]
    lane._pump()
    assert lane._lost
    error = await lane._serve()
    assert (type(error), error.reason) == (InternalError, "BUG")
    assert "what nobody thought of" in error.message
    assert "what nobody thought of" in caplog.text
