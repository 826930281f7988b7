"""Stages that die, hang, come late and come back. The tests run in order on one mesh of two stages."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from pathlib import Path

import grpc
import pytest
from mesh_calls import generate, make_prompt, read_answer, read_refusal, refusal, start
from mesh_processes import is_alive, wait_for
from running_mesh import CALL_TIMEOUT_S, RunningMesh

from stagemesh.v1 import admin_pb2

HEARTBEAT_S = 8.0
"""Above what a busy machine keeps a stage silent for, and below the 10 s after which the channel's keepalive speaks first."""
PROMPT = make_prompt(13)


@pytest.fixture(scope="module")
def frail(small: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[RunningMesh]:
    """Two stages, the second with two ranks, that the tests treat badly."""
    folder = tmp_path_factory.mktemp("frail")
    flags = ("--heartbeat-timeout-s", str(HEARTBEAT_S))
    mesh = RunningMesh(folder, small, (1, 2), router_flags=flags)
    mesh.wait_ready()
    yield mesh
    mesh.close()


@pytest.fixture(scope="module")
def expected(frail: RunningMesh) -> list[int]:
    """What the mesh answers before anything happens to it."""
    return generate(frail, PROMPT, 24).token_ids


@pytest.fixture(autouse=True)
def serves_again(frail: RunningMesh, expected: list[int]) -> Iterator[None]:
    """Whatever a test does, the mesh gives the same answer after it."""
    yield
    for index, stage in enumerate(frail.stages):
        if stage.process.poll() is not None:  # the test failed half-way: it alone should
            frail.restart_stage(index)
    if frail.router.process.poll() is not None:
        frail.start_router()
    lane = frail.wait_ready()
    assert generate(frail, PROMPT, 24).token_ids == expected
    frail.wait_idle()
    lane = frail.lane
    assert lane.num_free_blocks == lane.num_blocks


def assert_lost(frail: RunningMesh, call: grpc.Call, index: int, *, by_silence: bool = False) -> None:
    """The stream ends with UNAVAILABLE that names the stage; nothing had to time out for it, unless `by_silence`."""
    lost = read_refusal(call)
    assert lost.code is grpc.StatusCode.UNAVAILABLE
    assert lost.reason == "STAGE_LOST"
    assert lost.domain == "stagemesh"
    assert lost.metadata["stage"] == f"stage {index} ({frail.addresses[index]})"
    assert f"stage {index}" in lost.message
    assert ("no heartbeat" in lost.message) is by_silence
    assert "unanswered" not in lost.message
    assert lost.metadata["request_id"]
    assert lost.retry_s > 0


def assert_refused_at_once(frail: RunningMesh, index: int) -> None:
    refused = refusal(frail)
    assert refused.code is grpc.StatusCode.UNAVAILABLE
    assert refused.reason == "LANE_NOT_READY"
    assert refused.retry_s > 0
    assert f"stage {index}" in refused.message
    lane = frail.lane
    assert lane.state == admin_pb2.LANE_STATE_FORMING
    assert f"stage {index}" in lane.reason


def test_a_killed_stage(frail: RunningMesh) -> None:
    pids = frail.worker_pids()
    epoch = frail.lane.epoch
    router = frail.router.pid
    call = start(frail)
    frail.stages[1].kill()
    assert_lost(frail, call, 1)
    assert_refused_at_once(frail, 1)
    wait_for(lambda: not any(is_alive(pid) for pid in pids[1]), "the end of the killed stage's workers")
    frail.restart_stage(1)
    lane = frail.wait_ready()
    assert lane.epoch > epoch
    assert frail.router.pid == router
    assert frail.router.process.poll() is None
    assert frail.worker_pids()[0] == pids[0], "the other stage was restarted"
    assert frail.worker_pids()[1] != pids[1]


@pytest.mark.parametrize("index", [0, 1])
def test_a_killed_worker(frail: RunningMesh, index: int) -> None:
    """Its stage ends the whole group, says so, and starts another by itself."""
    pids = frail.worker_pids()
    services = [stage.pid for stage in frail.stages]
    victim = pids[index][-1]
    call = start(frail)
    assert victim in frail.stages[index].children()
    os.kill(victim, signal.SIGKILL)
    assert_lost(frail, call, index)
    assert_refused_at_once(frail, index)
    frail.wait_ready()
    assert [stage.pid for stage in frail.stages] == services
    assert all(stage.process.poll() is None for stage in frail.stages)
    assert frail.worker_pids()[1 - index] == pids[1 - index]
    assert not set(frail.worker_pids()[index]) & set(pids[index]), "a rank of the old group lives on"


def test_a_stopped_stage_is_found_by_its_silence(frail: RunningMesh) -> None:
    pids = frail.worker_pids()
    call = start(frail)
    frail.stages[1].signal(signal.SIGSTOP)
    try:
        assert_lost(frail, call, 1, by_silence=True)
        frail.wait_reason("stage 1")
        assert_refused_at_once(frail, 1)
    finally:
        frail.stages[1].signal(signal.SIGCONT)
    frail.wait_ready()
    assert frail.worker_pids() == pids


def test_a_stage_told_to_stop_and_a_router_that_waits_for_it(frail: RunningMesh) -> None:
    """SIGTERM ends it in good order; a router that starts now says for whom it waits."""
    pids = frail.worker_pids()
    call = start(frail)
    assert frail.stages[1].stop() == 0
    assert not any(is_alive(pid) for pid in pids[1])
    assert_lost(frail, call, 1)
    assert frail.router.stop() == 0
    frail.start_router()
    reason = frail.wait_reason("waiting for stage 1")
    assert frail.addresses[1] in reason
    assert "stage 0" not in reason
    assert [stage.state for stage in frail.lane.stages] == ["ready", "absent"]
    assert_refused_at_once(frail, 1)
    frail.restart_stage(1)
    frail.wait_reason("loading")
    frail.wait_ready()
    assert frail.worker_pids()[0] == pids[0]


def test_a_router_told_to_stop_ends_its_streams_and_another_takes_over(frail: RunningMesh) -> None:
    pids = frail.worker_pids()
    call = start(frail)
    assert frail.router.stop() == 0
    refused = read_refusal(call)
    assert refused.code is grpc.StatusCode.UNAVAILABLE
    assert refused.reason == "SHUTTING_DOWN"
    frail.start_router()
    frail.wait_ready()
    assert frail.worker_pids() == pids


def test_a_killed_router_leaves_stages_that_another_can_use(frail: RunningMesh) -> None:
    pids = frail.worker_pids()
    call = start(frail)
    frail.router.kill()
    assert read_refusal(call).code is grpc.StatusCode.UNAVAILABLE
    frail.start_router()
    frail.wait_ready()
    assert frail.worker_pids() == pids


def test_drain_lets_what_runs_finish_and_takes_nothing_new(frail: RunningMesh) -> None:
    call = start(frail, PROMPT, 120)
    drain = frail.admin.Drain.future(admin_pb2.DrainRequest(), timeout=CALL_TIMEOUT_S)
    wait_for(lambda: frail.lane.state == admin_pb2.LANE_STATE_DRAINING, "draining")
    refused = refusal(frail)
    assert refused.code is grpc.StatusCode.UNAVAILABLE
    assert refused.reason == "DRAINING"
    returned = drain.done()
    assert not (returned and frail.status().num_running), "it returned while a request ran"
    assert read_answer(call).usage.completion_tokens == 120
    assert drain.result().num_left == 0
    frail.restart_router()


def drain_briefly(frail: RunningMesh) -> admin_pb2.DrainResponse:
    """With a deadline that passes while a request runs; asked again where the answer, 1 s ahead of it, came too late."""
    for _ in range(2):
        try:
            return frail.admin.Drain(admin_pb2.DrainRequest(), timeout=2.0)
        except grpc.RpcError as error:
            if error.code() is not grpc.StatusCode.DEADLINE_EXCEEDED:
                raise
    return frail.admin.Drain(admin_pb2.DrainRequest(), timeout=2.0)


def test_drain_says_how_many_are_left_at_its_deadline(frail: RunningMesh) -> None:
    call = start(frail, max_tokens=1900)
    assert drain_briefly(frail).num_left == 1
    call.cancel()
    frail.restart_router()
