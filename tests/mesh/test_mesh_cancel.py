"""A request that nobody wants any more: its blocks are free at once, its neighbours do not notice."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import grpc
import pytest
from mesh_calls import generate, make_prompt, make_request, read_answer, read_refusal, start
from mesh_processes import wait_for
from running_mesh import CALL_TIMEOUT_S, RunningMesh

from stagemesh.v1 import inference_pb2


@contextmanager
def alongside(mesh: RunningMesh) -> Iterator[None]:
    """A stream runs meanwhile, and gets exactly what it gets alone."""
    alone = generate(mesh, make_prompt(11, 3), 60).token_ids
    call = mesh.stub.Generate(make_request(make_prompt(11, 3), 60), timeout=CALL_TIMEOUT_S)
    yield
    assert read_answer(call).token_ids == alone


@pytest.fixture
def neighbour(mesh: RunningMesh) -> Iterator[None]:
    """A stream that runs alongside."""
    with alongside(mesh):
        yield


@pytest.fixture
def slow_mesh(small: Path, tmp_path: Path) -> Iterator[RunningMesh]:
    """Takes a prompt by so few tokens at once that a test which is held up still cancels before its end."""
    running = RunningMesh(tmp_path, small, (1, 2, 1), router_flags=("--step-tokens", "2"))
    try:
        running.wait_ready()
        yield running
    finally:
        running.close()


def wait_free(mesh: RunningMesh) -> int:
    """Wait until every block is free again; returns the number of the last step sent by then."""

    def look() -> int | None:
        lane = mesh.lane
        return lane.num_steps if lane.num_free_blocks == lane.num_blocks else None

    return wait_for(look, "the blocks")


def tail(log: Path, begin: int) -> bytes:
    """From that byte on."""
    with log.open("rb") as file:
        file.seek(begin)
        return file.read()


def test_a_client_that_goes_away_while_its_request_decodes(mesh: RunningMesh, neighbour: None) -> None:
    call = start(mesh, request_id="gone-decoding")
    assert mesh.lane.num_free_blocks < mesh.lane.num_blocks
    call.cancel()
    freed_at = wait_free(mesh)
    steps = mesh.steps_of("gone-decoding")
    assert 0 < len(steps) < 1500
    assert steps[-1] <= freed_at


def test_a_client_that_goes_away_while_its_prompt_is_computed(slow_mesh: RunningMesh) -> None:
    with alongside(slow_mesh):
        before = slow_mesh.step_log.stat().st_size
        call = slow_mesh.stub.Generate(
            make_request(make_prompt(1900), 10, request_id="gone-prefilling"), timeout=CALL_TIMEOUT_S
        )
        wait_for(lambda: b'"gone-prefilling"' in tail(slow_mesh.step_log, before), "its first chunk")
        call.cancel()
    wait_free(slow_mesh)
    rows = [row for step in slow_mesh.steps() for row in step["rows"] if row[0] == "gone-prefilling"]
    assert len(rows) > 0
    assert sum(count for _, count, _ in rows) < 1900, "its whole prompt was computed"
    assert not any(sampled for *_, sampled in rows)


def test_abort_frees_the_blocks_before_it_returns(mesh: RunningMesh) -> None:
    call = start(mesh, request_id="aborted")
    abort = inference_pb2.AbortRequest(request_id="aborted")
    assert mesh.stub.Abort(abort, timeout=CALL_TIMEOUT_S).aborted
    lane = mesh.lane
    assert lane.num_free_blocks == lane.num_blocks
    rest = list(call)
    assert rest[-1].finish_reason == inference_pb2.FINISH_REASON_ABORT
    last = mesh.steps_of("aborted")[-1]
    # Once free, no step has it: the log goes on with others only.
    generate(mesh, make_prompt(4), 4)
    assert last <= lane.num_steps
    assert mesh.steps_of("aborted")[-1] == last
    assert not mesh.stub.Abort(abort, timeout=CALL_TIMEOUT_S).aborted


def test_abort_while_preemption_goes_on_frees_the_blocks_before_it_returns(tight_mesh: RunningMesh) -> None:
    """Two that need 15 of 20 blocks each: the young one yields to the old one, again and again."""
    before = tight_mesh.lane.num_preemptions
    calls = [
        tight_mesh.stub.Generate(
            make_request(make_prompt(40, seed), 190, request_id=name), timeout=CALL_TIMEOUT_S
        )
        for seed, name in ((7, "old"), (8, "young"))
    ]
    wait_for(lambda: tight_mesh.lane.num_preemptions > before, "a preemption")
    for name in ("young", "old"):
        tight_mesh.stub.Abort(inference_pb2.AbortRequest(request_id=name), timeout=CALL_TIMEOUT_S)
    lane = tight_mesh.lane
    assert lane.num_free_blocks == lane.num_blocks
    assert lane.prefill_backlog == 0
    for call in calls:
        list(call)


def test_abort_of_what_never_was(mesh: RunningMesh) -> None:
    response = mesh.stub.Abort(inference_pb2.AbortRequest(request_id="never"), timeout=CALL_TIMEOUT_S)
    assert not response.aborted


def test_a_deadline_that_passes_ends_the_request_and_frees_it(mesh: RunningMesh, neighbour: None) -> None:
    call = mesh.stub.Generate(make_request(make_prompt(5), 1900, request_id="late"), timeout=0.3)
    refused = read_refusal(call)
    assert refused.code is grpc.StatusCode.DEADLINE_EXCEEDED
    wait_free(mesh)
    assert len(mesh.steps_of("late")) < 1900


def test_an_id_can_be_used_again_at_once(mesh: RunningMesh) -> None:
    """A call that is still closing must not abort the later request that has its id."""
    calls = []
    for _ in range(10):
        call = mesh.stub.Generate(make_request(make_prompt(4), 3, request_id="again"), timeout=CALL_TIMEOUT_S)
        last = next(response for response in call if response.finish_reason)
        assert last.finish_reason == inference_pb2.FINISH_REASON_LENGTH
        calls.append(call)
    assert all(call.code() is grpc.StatusCode.OK for call in calls)
