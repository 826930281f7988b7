"""A stage whose workers are gone."""

from __future__ import annotations

import asyncio
from types import SimpleNamespace
from typing import Any

import pytest

from stagemesh.stage.leader import leader as leader_module
from stagemesh.stage.leader.leader import StageLeader
from stagemesh.wire.errors import StageLostError, UnavailableError


async def test_the_router_hears_of_a_lost_group_before_what_is_left_of_it_has_ended(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
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
    group.lost.set_result("worker 0 (pid 7) was killed by signal 9")
    await serving
    up, error, down, stopped = happened
    assert isinstance(error, StageLostError)
    assert (error.stage, "worker 0 (pid 7)" in error.message) == ("stage 1", True)
    assert up != down
    assert stopped == "stopped"
    assert leader.not_ready == "worker 0 (pid 7) was killed by signal 9; starting again"
    with pytest.raises(UnavailableError, match="starting again") as caught:
        leader.hand_frame(b"", 0)
    assert (caught.value.reason, caught.value.stage) == ("STAGE_NOT_READY", "stage 1")
