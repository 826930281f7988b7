"""A stream that nobody reads any more: every block of it is free within one step, as GetStatus shows.

From the public side's streams through the requests and the lane to the scheduler, all in this process; the stages are
lists of what they were told, and answer when the test says so.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from typing import Any, cast

import numpy as np
import pytest
from scheduled_lane import make_limits
from served_models import IDS

from stagemesh.router.api.admin_service import AdminService, Context
from stagemesh.router.api.requests import Requests
from stagemesh.router.api.stream import OneStream, RequestStream
from stagemesh.router.api.streams import Streams
from stagemesh.router.config import RouterConfig
from stagemesh.router.scheduler import Scheduler
from stagemesh.router.scheduler.sequence import Sequence
from stagemesh.v1 import admin_pb2, inference_pb2, stage_pb2
from stagemesh.wire.columns import U32, unpack

STAGES = ("127.0.0.1:1", "127.0.0.1:2")


class Router:
    """Without its servers, and with a lane of one epoch."""

    def __init__(self) -> None:
        model = IDS
        self.requests = Requests(RouterConfig(model="m", stages=STAGES), model, lambda ready: None)
        self.streams = Streams(model)
        self.streams.backend = self.requests.connect(self.streams)
        self.admin = AdminService(self.requests)
        self.lane = self.requests.lane
        self.sent: list[bytes] = []
        self.num_answered = 0

    def open(self, **limits: Any) -> None:
        """Form the lane: four steps in flight, prompts in chunks of 8."""
        fields: dict[str, Any] = {"depth": 4, "lookahead": 3, "step_tokens": 8}
        self.lane.scheduler = Scheduler(make_limits(**fields | limits))
        self.lane.stats.open_lane(8)
        self.lane._lost = asyncio.get_running_loop().create_future()
        for stage, messages in zip(self.lane.stages, (self.sent, []), strict=True):
            stage.send = messages.append  # type: ignore[method-assign]

    @property
    def scheduler(self) -> Scheduler:
        assert self.lane.scheduler
        return self.lane.scheduler

    def start(self, name: str, length: int, max_tokens: int) -> RequestStream:
        message = inference_pb2.GenerateRequest(
            request_id=name,
            token_ids=inference_pb2.TokenIds(ids=range(3 + len(name), 3 + len(name) + length)),
            max_tokens=max_tokens,
        )
        return self.streams.start(message, float("inf"), OneStream())

    def sequence(self, name: str) -> Sequence:
        sequence = self.scheduler.sequence(name)
        assert sequence
        return sequence

    def steps(self) -> list[stage_pb2.Step]:
        """Every step so far."""
        return [step for data in self.sent for step in stage_pb2.ExecuteRequest.FromString(data).steps]

    async def send(self) -> None:
        """Every step that may be sent now leaves."""
        before = -1
        while len(self.sent) > before:
            before = len(self.sent)
            await asyncio.sleep(0)

    async def report(self) -> None:
        """The last stage reports the oldest step, and what may be sent then leaves."""
        self.num_answered += 1
        step = self.scheduler._in_flight[self.num_answered]
        result = stage_pb2.StepResult(number=step.number, token_ids=bytes(4 * int(step.sample.sum())))
        self.lane._take_response(self.lane.stages[-1], stage_pb2.ExecuteResponse(results=[result]))
        await self.send()

    async def num_held_blocks(self) -> int:
        """By GetStatus."""
        response = await self.admin.GetStatus(admin_pb2.GetStatusRequest(), cast(Context, None))
        [lane] = response.status.lanes
        return lane.num_blocks - lane.num_free_blocks

    def blocks_of(self, sequence: Sequence) -> int:
        return int(self.scheduler.running.slots.num_blocks[sequence.slot]) if sequence.slot >= 0 else 0

    def in_flight(self, sequence: Sequence) -> int:
        """Its steps that no report has come of."""
        return sum(sequence in step.sequences for step in self.scheduler._in_flight.values())


@pytest.fixture
async def router() -> AsyncIterator[Router]:
    router = Router()
    yield router
    for stage in router.lane.stages:
        await stage.aclose()


async def until(router: Router, holds: Callable[[], bool]) -> None:
    """Steps go and come, one report at a time, until it holds."""
    await router.send()
    while not holds():
        await router.report()


async def check_cancel(router: Router, stream: RequestStream, neighbour: Sequence) -> None:
    """Cancel: within one report, whatever is in flight, the neighbour's blocks are all that is held."""
    gone = router.sequence(stream.request.request_id)
    slot, num_sent = gone.slot, len(router.sent)
    router.streams.abandon(stream)
    num_reports = 0
    while await router.num_held_blocks() > router.blocks_of(neighbour):
        await router.report()
        num_reports += 1
    assert num_reports <= 1
    router.start("next", 3, 2)
    await until(router, lambda: not router.scheduler.live and not router.scheduler.num_in_flight)
    assert neighbour.finish is not None
    assert await router.num_held_blocks() == 0
    assert router.lane._lost
    assert not router.lane._lost.done(), "a late report fitted no step"
    released = unpack(router.steps()[num_sent].release_slots, U32, "release_slots").tolist()
    assert slot < 0 or slot in released, "the stages keep its table"


async def test_during_prefill(router: Router) -> None:
    """Three chunks of its prompt are in flight, and more to come."""
    router.open()
    router.start("neighbour", 4, 40)
    gone = router.start("gone", 60, 9)
    neighbour, sequence = router.sequence("neighbour"), router.sequence("gone")
    await until(router, lambda: router.in_flight(sequence) > 2)
    assert sequence.order in router.scheduler.running.prefilling
    await check_cancel(router, gone, neighbour)


async def test_during_lookahead(router: Router) -> None:
    """Four tokens are on their way that nobody has seen."""
    router.open()
    router.start("neighbour", 4, 40)
    gone = router.start("gone", 6, 200)
    neighbour, sequence = router.sequence("neighbour"), router.sequence("gone")
    await until(router, lambda: sequence.num_generated > 10)
    assert router.scheduler.running.slots.unseen(np.array([sequence.slot])).tolist() == [4]
    await check_cancel(router, gone, neighbour)


async def preempted(
    router: Router, holds: Callable[[Sequence], bool]
) -> tuple[RequestStream, Sequence, Sequence]:
    """The neighbour needs a block, so the other, which is younger, has to yield; back when that one is as asked for.

    Returns:
        The stream of the one that yields, its sequence and the neighbour's.
    """
    router.open(num_blocks=24, max_blocks=24, prefix_cache=False)
    router.start("neighbour", 8, 80)
    gone = router.start("gone", 8, 60)
    neighbour, sequence = router.sequence("neighbour"), router.sequence("gone")
    await until(router, lambda: holds(sequence))
    return gone, sequence, neighbour


async def test_while_it_yields(router: Router) -> None:
    """It would stay until the last of its reports has come."""
    gone, sequence, neighbour = await preempted(
        router, lambda one: one.order in router.scheduler.running.yielding
    )
    assert router.in_flight(sequence) > 1
    await check_cancel(router, gone, neighbour)


async def test_while_it_waits_to_be_computed_again(router: Router) -> None:
    gone, sequence, neighbour = await preempted(router, lambda one: one.num_preemptions > 0)
    assert sequence.slot < 0
    await check_cancel(router, gone, neighbour)


async def test_while_it_is_computed_again(router: Router) -> None:
    gone, sequence, neighbour = await preempted(
        router, lambda one: one.num_preemptions > 0 and router.in_flight(one) > 1
    )
    assert sequence.order in router.scheduler.running.prefilling
    await check_cancel(router, gone, neighbour)
