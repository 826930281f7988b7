"""The scheduler's side of requests, without stages: who is told what."""

from __future__ import annotations

from collections.abc import AsyncIterator
from dataclasses import replace

import pytest
from scheduled_lane import make_limits, make_request
from served_models import IDS

from stagemesh.router.api.backend import Column, End
from stagemesh.router.api.requests import Requests
from stagemesh.router.config import RouterConfig
from stagemesh.router.scheduler import Scheduler
from stagemesh.wire.errors import StagemeshError, UnavailableError


class Told:
    """An Outlet that keeps what it is told."""

    def __init__(self) -> None:
        self.errors: dict[int, StagemeshError] = {}

    def take(self, handles: Column, token_ids: Column, ends: list[End]) -> None:
        raise AssertionError("nothing was computed")

    def fail(self, handle: int, error: StagemeshError) -> None:
        assert handle not in self.errors
        self.errors[handle] = error


@pytest.fixture
async def requests() -> AsyncIterator[Requests]:
    model = replace(IDS, vocab_size=50, max_context=100, end_token_ids=frozenset())
    made = Requests(RouterConfig(model="m", stages=("127.0.0.1:1",)), model, lambda ready: None)
    made.lane.scheduler = Scheduler(make_limits())
    made.lane.stats.open_lane(8)
    yield made
    for stage in made.lane.stages:
        await stage.aclose()


async def test_a_router_that_stops_answers_those_that_come_after_too(requests: Requests) -> None:
    """A session may still be reading what it was sent when the router is told to stop."""
    told = Told()
    port = requests.connect(told)
    port.submit(1, make_request("runs"), 0.0)
    assert not told.errors
    requests.close(UnavailableError("the router stops", reason="SHUTTING_DOWN", retry_after_s=1.0))
    port.submit(2, make_request("late"), 0.0)
    for handle, name in ((1, "runs"), (2, "late")):
        error = told.errors[handle]
        assert (error.reason, error.request_id, error.retry_after_s) == ("SHUTTING_DOWN", name, 1.0)
    assert requests.num_live == 0
