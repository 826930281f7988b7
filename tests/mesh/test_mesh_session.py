"""Many requests over one stream."""

from __future__ import annotations

from collections.abc import Iterator

import grpc
import pytest
from mesh_calls import generate, make_prompt, make_request, read_answer
from mesh_processes import wait_for
from mesh_session import Session
from running_mesh import CALL_TIMEOUT_S, RunningMesh

from stagemesh.v1 import inference_pb2


@pytest.fixture
def session(mesh: RunningMesh) -> Iterator[Session]:
    with Session(mesh) as one:
        yield one


def test_deltas_equal_generates(mesh: RunningMesh, session: Session) -> None:
    requests = [
        make_request(make_prompt(5 + seed, seed), 12 + seed, request_id=f"s{seed}") for seed in range(8)
    ]
    session.send(*requests)
    session.half_close()
    session.read_all()
    calls = [mesh.stub.Generate(request, timeout=CALL_TIMEOUT_S) for request in requests]
    for request, call in zip(requests, calls, strict=True):
        expected, answer = read_answer(call), session.answers[request.request_id]
        assert answer.token_ids == expected.token_ids
        assert answer.finish_reason == expected.finish_reason == inference_pb2.FINISH_REASON_LENGTH
        assert answer.usage == expected.usage
    assert not session.refused


def test_a_refused_request_gets_its_status_and_leaves_the_others(mesh: RunningMesh, session: Session) -> None:
    good = make_request(make_prompt(6), 20, request_id="good")
    expected = generate(mesh, make_prompt(6), 20).token_ids
    session.send(make_request([], request_id="empty"), good, make_request(stop=["x"], request_id="stop"))
    session.read_until_ended("good", "empty", "stop")
    assert session.answers["good"].token_ids == expected
    assert session.refused["empty"].code is grpc.StatusCode.INVALID_ARGUMENT
    assert session.refused["empty"].reason == "EMPTY_PROMPT"
    assert session.refused["empty"].metadata["request_id"] == "empty"
    assert session.refused["stop"].code is grpc.StatusCode.UNIMPLEMENTED
    session.send(make_request(make_prompt(6), 20, request_id="after"))
    session.read_until_ended("after")
    assert session.answers["after"].token_ids == expected


def test_a_request_of_a_session_needs_an_id(session: Session) -> None:
    """Its deltas could not be told apart otherwise."""
    session.send(make_request(max_tokens=3))
    while not session.refused:
        assert session.read()
    (refused,) = session.refused.values()
    assert refused.code is grpc.StatusCode.INVALID_ARGUMENT
    assert refused.field == "request_id"


def test_a_live_id_is_refused_and_the_request_that_has_it_goes_on(
    mesh: RunningMesh, session: Session
) -> None:
    expected = generate(mesh, make_prompt(6), 30).token_ids
    # In one message: the second must not come when the first has ended.
    session.send(
        make_request(make_prompt(6), 30, request_id="twice"),
        make_request(make_prompt(6), 5, request_id="twice"),
    )
    session.half_close()
    session.read_all()
    assert session.refused["twice"].reason == "DUPLICATE_REQUEST_ID"
    assert session.answers["twice"].token_ids == expected


def test_cancel_ends_one_without_a_further_delta(mesh: RunningMesh, session: Session) -> None:
    session.send(
        make_request(make_prompt(5), 1900, request_id="long"),
        make_request(make_prompt(7), 10, request_id="short"),
    )
    while not session.answers["long"].token_ids:
        session.read()
    session.send(cancel=("long", "unknown"))
    wait_for(lambda: mesh.status().num_running <= 1 or None, "the cancel")
    session.read_until_ended("short")
    session.half_close()
    session.read_all()
    assert not session.answers["long"].finish_reason
    assert len(session.answers["long"].token_ids) < 1900
    lane = mesh.wait_idle()
    assert lane.num_free_blocks == lane.num_blocks


def test_closing_the_stream_cancels_all_of_it(mesh: RunningMesh) -> None:
    with Session(mesh) as session:
        session.send(*(make_request(make_prompt(5, seed), 1900, request_id=f"c{seed}") for seed in range(3)))
        while len(session.answers) < 3:
            session.read()
        session.call.cancel()
    lane = mesh.wait_idle()
    assert lane.num_free_blocks == lane.num_blocks
    assert all(len(mesh.steps_of(f"c{seed}")) < 1900 for seed in range(3))


def test_bytes_that_do_not_parse_end_the_session(mesh: RunningMesh) -> None:
    with grpc.insecure_channel(mesh.listen) as channel:
        call = channel.stream_stream("/stagemesh.v1.InferenceService/Session")(
            iter([b"\xff\xff\xff"]), timeout=CALL_TIMEOUT_S
        )
        with pytest.raises(grpc.RpcError) as raised:
            list(call)
    assert raised.value.code() is grpc.StatusCode.INVALID_ARGUMENT
    assert "stagemesh.v1.SessionRequest" in raised.value.details()
