"""A stage whose workers are gone."""

from __future__ import annotations

import asyncio
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import pytest

from stagemesh.stage.leader import leader as leader_module
from stagemesh.stage.leader.lane import LeaderLane
from stagemesh.stage.leader.leader import StageLeader
from stagemesh.stage.local_queue import StepTiming
from stagemesh.v1 import stage_pb2
from stagemesh.wire.errors import StageLostError, UnavailableError


@dataclass
class Scene:
    """A leader that serves with a group of no processes."""

    leader: StageLeader
    group: Any
    serving: asyncio.Task[None]
    happened: list[Any]
    """Health that was said, errors of the lane, and "stopped"."""


@pytest.fixture
async def scene(monkeypatch: pytest.MonkeyPatch) -> Scene:
    monkeypatch.setattr(leader_module, "load_line", lambda *_: "loaded")
    monkeypatch.setattr(leader_module, "settle", lambda: None)
    happened: list[Any] = []

    async def say_health(service: str, status: int) -> None:
        happened.append(status)

    async def stop() -> None:
        happened.append("stopped")

    health: Any = SimpleNamespace(set=say_health)
    nothing: Any = None
    leader = StageLeader(nothing, nothing, "stage 1", health, "0")
    lane: Any = SimpleNamespace(fail=happened.append, close_receivers=lambda: None)
    leader._lane = lane
    group: Any = SimpleNamespace(lost=asyncio.get_running_loop().create_future(), facts=[], stop=stop)
    serving = asyncio.create_task(leader._serve_with(group))
    await asyncio.sleep(0)
    assert leader.not_ready == ""
    return Scene(leader, group, serving, happened)


async def test_the_router_hears_of_a_lost_group_before_what_is_left_of_it_has_ended(scene: Scene) -> None:
    scene.group.lost.set_result("worker 0 (pid 7) was killed by signal 9")
    await scene.serving
    up, error, down, stopped = scene.happened
    assert isinstance(error, StageLostError)
    assert (error.stage, "worker 0 (pid 7)" in error.message) == ("stage 1", True)
    assert up != down
    assert stopped == "stopped"
    assert scene.leader.not_ready == "worker 0 (pid 7) was killed by signal 9; starting again"
    with pytest.raises(UnavailableError, match="starting again") as caught:
        scene.leader.hand_frame(b"", 0)
    assert (caught.value.reason, caught.value.stage) == ("STAGE_NOT_READY", "stage 1")


async def test_the_workers_of_a_stage_that_is_stopped_are_not_taken_for_lost(scene: Scene) -> None:
    """A group asks its workers to end only if none is lost; otherwise it kills them."""
    scene.serving.cancel()
    with pytest.raises(asyncio.CancelledError):
        await scene.serving
    assert scene.happened[-1] == "stopped"
    assert not scene.group.lost.done()
    assert scene.leader.not_ready == "stopping"


async def test_whoever_awaits_an_answer_of_ranks_that_are_gone_hears_it_at_once() -> None:
    """Not after the seconds that an answer may take: other stages wait with them."""
    nothing: Any = None
    config: Any = SimpleNamespace(tp=2)
    leader = StageLeader(config, nothing, "stage 1", nothing, "0")
    group: Any = SimpleNamespace(broadcast=lambda *_: None)
    leader._group = group
    lane = LeaderLane(stage_pb2.OpenLaneRequest(epoch=5))
    preparing = asyncio.create_task(leader.prepare_nccl(lane, stage_pb2.LINK_KIND_RING, 60.0))
    await asyncio.sleep(0)
    lane.answer(("prepare", stage_pb2.LINK_KIND_RING), 0, b"id")
    lane.fail(StageLostError("worker 1 (pid 7) exited with code 4", reason="STAGE_LOST"))
    async with asyncio.timeout(5):
        with pytest.raises(StageLostError, match="exited with code 4"):
            await preparing
    lane.answer(("prepare", stage_pb2.LINK_KIND_RING), 1, b"late")


def test_traced_steps_are_kept_for_their_spans() -> None:
    nothing: Any = None
    kept: list[tuple[int, str]] = []
    spans: Any = SimpleNamespace(take_step=lambda *step: kept.append(step))
    leader = StageLeader(nothing, nothing, "stage 1", nothing, "0", spans)
    group: Any = SimpleNamespace(broadcast=lambda *_: None)
    leader._group = group
    lane = LeaderLane(stage_pb2.OpenLaneRequest(epoch=5))
    plain, traced = stage_pb2.Step(number=1), stage_pb2.Step(number=2, traceparent="00-")
    for steps in ([plain], [traced], [plain, traced, plain]):
        request = stage_pb2.ExecuteRequest(steps=steps)
        leader.hand_steps(lane, request, request.SerializeToString(), 0)
    assert kept == [(2, "00-")] * 2
    assert lane.last_received == 1


async def test_spans_get_the_last_steps_of_an_epoch_before_they_hear_of_the_next(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Timings go to the spans with a report; those of steps that were not reported any more, with the epoch's end."""
    nothing: Any = None
    heard: list[Any] = []
    spans: Any = SimpleNamespace(
        any_traced=True,
        take_timings=lambda timings: heard.append(timings["number"].tolist()),
        open_lane=lambda index, epoch: heard.append(f"epoch {epoch}"),
    )
    leader = StageLeader(nothing, nothing, "stage 1", nothing, "0", spans)
    monkeypatch.setattr(leader, "_check_opening", lambda request: None)
    group: Any = SimpleNamespace(broadcast=lambda *_: None)
    leader._group = group
    for epoch in (5, 6):
        await leader.open_lane(stage_pb2.OpenLaneRequest(epoch=epoch))
        for number in (1, 2):
            leader.lane(epoch).add_timings(StepTiming(epoch, number, *range(7)).pack())
    assert heard == ["epoch 5", [1, 2], "epoch 6"]
    assert leader.take_timings(leader.lane(6))["number"].tolist() == [1, 2]
    assert heard[3:] == [[1, 2]]
    assert not len(leader.take_timings(leader.lane(6)))
    assert len(heard) == 4
