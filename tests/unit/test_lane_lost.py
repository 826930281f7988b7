"""Which stage a lane names when it breaks: two ends of a link see it, and either may tell first."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from types import SimpleNamespace
from typing import Any

import pytest
from scheduled_lane import make_limits, make_request

from stagemesh.router.config import RouterConfig
from stagemesh.router.lane import lane as lane_module
from stagemesh.router.lane.lane import POLL_S, Lane, LaneEvents
from stagemesh.router.scheduler import Scheduler
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
    def take(*_: object) -> None:
        raise ValueError("a column is short")

    lane.stages[1]._take(b"", take, lane._lose)
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


class Waits:
    """The waits of a lane that serves, in a time of their own.

    Args:
        monkeypatch: Puts them in place of the lane's own.
        frozen_s: How long the first takes; the others take as long as asked.
        after: Called after each with its number, from 1; what it does, the lane sees when the wait is over.
    """

    def __init__(
        self, monkeypatch: pytest.MonkeyPatch, frozen_s: float, after: Callable[[int], None] = ignore
    ) -> None:
        self.now = 1000.0
        self.number = 0
        self._frozen_s = frozen_s
        self._after = after
        monkeypatch.setattr(lane_module, "time", SimpleNamespace(monotonic=lambda: self.now))
        names = {name: getattr(asyncio, name) for name in ("Future", "get_running_loop")}
        monkeypatch.setattr(lane_module, "asyncio", SimpleNamespace(wait=self._wait, **names))

    async def _wait(
        self, lost: set[asyncio.Future[Any]], timeout: float
    ) -> tuple[set[asyncio.Future[Any]], set[Any]]:
        self.number += 1
        assert self.number < 1000, "the lane is never lost"
        self.now += timeout if self.number > 1 else self._frozen_s
        self._after(self.number)
        return {one for one in lost if one.done()}, set()


@pytest.mark.parametrize("frozen_s", [POLL_S, 4.9, 20.0, 300.0])
@pytest.mark.parametrize("heard_at_once", [False, True])
async def test_time_without_a_turn_is_not_the_stages_silence(
    lane: Lane, monkeypatch: pytest.MonkeyPatch, frozen_s: float, heard_at_once: bool
) -> None:
    """Of three stages the second says nothing after it, or only just after it: that one is lost, and no later than ever."""

    def hear(number: int) -> None:
        for stage in lane.stages:
            if heard_at_once if number == 1 else stage.index != 1:
                stage.heard_at = waits.now

    waits = Waits(monkeypatch, frozen_s, hear)
    for stage in lane.stages:
        stage.heard_at = waits.now
    error = await lane._serve()
    assert error.stage == lane.stages[1].name
    assert "no heartbeat for 5.2 s" in error.message
    assert waits.number == 5.0 / POLL_S + 1 + heard_at_once


@pytest.mark.parametrize("frozen_s", [POLL_S, 300.0])
async def test_time_without_a_turn_is_not_a_steps(
    lane: Lane, monkeypatch: pytest.MonkeyPatch, frozen_s: float
) -> None:
    def hear(number: int) -> None:
        for stage in lane.stages:
            stage.heard_at = waits.now

    waits = Waits(monkeypatch, frozen_s, hear)
    scheduler: Any = SimpleNamespace(oldest_in_flight=7)
    lane.scheduler = scheduler
    lane._pump_soon = ignore  # type: ignore[method-assign]
    lane._config = lane._config.model_copy(update={"step_timeout_s": 30.0})
    lane._sent_at = {6: waits.now - 9.0, 7: waits.now}
    hear(0)
    error = await lane._serve()
    assert "step 7 is unanswered for 30 s" in error.message
    assert waits.number == 30.0 / POLL_S + 1
