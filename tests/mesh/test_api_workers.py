"""API workers: everything the public service promises holds when processes beside the router serve it."""

from __future__ import annotations

import os
import signal
import socket
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import grpc
import pytest
from google.rpc import status_pb2
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection_pb2, reflection_pb2_grpc
from mesh_calls import Answer, generate, make_request, read_answer, read_refusal, start, to_refusal
from mesh_processes import START_TIMEOUT_S, is_alive, start_router, wait_for
from running_mesh import CALL_TIMEOUT_S, RunningMesh

from stagemesh.client import Client, Completion
from stagemesh.v1 import admin_pb2, inference_pb2, inference_pb2_grpc

NUM_WORKERS = 2
SERVICE = "stagemesh.v1.InferenceService"


@pytest.fixture(scope="module")
def mesh(demo_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[RunningMesh]:
    """One simulated stage behind a router with two API workers; overrides the shared mesh."""
    running = RunningMesh(
        tmp_path_factory.mktemp("workers"),
        demo_model,
        (1,),
        stage_flags=("--engine", "sim", "--cost", "1ms", "--kv-memory", "4GiB"),
        router_flags=("--api-workers", str(NUM_WORKERS)),
    )
    running.wait_ready()
    yield running
    running.close()


@pytest.fixture
def stubs(mesh: RunningMesh) -> Iterator[list[Any]]:
    """Over connections enough that each worker has some of them, almost surely."""
    options = (("grpc.use_local_subchannel_pool", 1),)
    channels = [grpc.insecure_channel(mesh.listen, options) for _ in range(12)]
    yield [inference_pb2_grpc.InferenceServiceStub(channel) for channel in channels]
    for channel in channels:
        channel.close()


def workers(mesh: RunningMesh) -> list[admin_pb2.ApiWorkerStatus]:
    found = list(mesh.status().api_workers)
    assert len(found) == NUM_WORKERS
    return found


def request(number: int, **fields: Any) -> Any:
    fields = {"temperature": 1.0, "seed": number, "text": f"Number {number}:", "request_id": ""} | fields
    return make_request(max_tokens=20 + number % 7, **fields)


def test_200_streams_at_once_are_what_each_is_alone(mesh: RunningMesh, stubs: list[Any]) -> None:
    alone = [read_answer(mesh.stub.Generate(request(number), timeout=CALL_TIMEOUT_S)) for number in range(20)]
    calls = [
        stubs[number % len(stubs)].Generate(request(number % 20), timeout=CALL_TIMEOUT_S)
        for number in range(100)
    ]
    prompts = [
        {"prompt": f"Number {number % 20}:", "seed": number % 20, "max_tokens": 20 + number % 20 % 7}
        for number in range(100)
    ]
    with Client(mesh.listen) as client:
        many = client.generate_many(prompts, temperature=1.0, ignore_eos=True).completions()  # type: ignore[arg-type]
    for number, call in enumerate(calls):
        answer, expected = read_answer(call), alone[number % 20]
        assert (answer.token_ids, answer.text) == (expected.token_ids, expected.text)
        assert answer.usage.completion_tokens == expected.usage.completion_tokens
    for number, completion in enumerate(many):
        assert isinstance(completion, Completion)
        expected = alone[number % 20]
        assert (list(completion.token_ids), completion.text) == (expected.token_ids, expected.text)
        assert completion.usage.prompt_tokens == expected.usage.prompt_tokens


def test_the_router_counts_and_traces_what_its_workers_serve(mesh: RunningMesh) -> None:
    before = mesh.status()
    answer = generate(mesh, [5, 6, 7], 9, request_id="traced")
    assert answer.request_id == "traced"
    refused = read_refusal(mesh.stub.Generate(make_request(temperature=-1.0), timeout=CALL_TIMEOUT_S))
    assert (refused.code, refused.field) == (grpc.StatusCode.INVALID_ARGUMENT, "temperature")
    status = mesh.status()
    assert status.num_finished - before.num_finished == 1
    wait_for(lambda: mesh.status().num_failed - before.num_failed == 1 or None, "the refusal's count")
    assert status.output_tokens - before.output_tokens == 9
    assert status.prompt_tokens - before.prompt_tokens == 3
    trace = mesh.admin.GetRequestTrace(
        admin_pb2.GetRequestTraceRequest(request_id="traced"), timeout=CALL_TIMEOUT_S
    )
    assert (trace.state, trace.prompt_tokens, trace.output_tokens) == ("length", 3, 9)
    assert 0 < trace.ttft_ms <= trace.total_ms


def test_what_the_scheduler_refuses_comes_back_with_its_details(mesh: RunningMesh) -> None:
    call = start(mesh, [1, 2, 3], 3000, request_id="twice")
    refused = read_refusal(
        mesh.stub.Generate(make_request([1], 3, request_id="twice"), timeout=CALL_TIMEOUT_S)
    )
    assert (refused.code, refused.reason) == (grpc.StatusCode.INVALID_ARGUMENT, "DUPLICATE_REQUEST_ID")
    assert refused.metadata["request_id"] == "twice"
    call.cancel()
    mesh.wait_idle()


def test_every_worker_answers_model_health_and_reflection_and_aborts_any_request(
    mesh: RunningMesh, stubs: list[Any]
) -> None:
    for number, stub in enumerate(stubs):
        assert stub.GetModel(inference_pb2.GetModelRequest(), timeout=CALL_TIMEOUT_S).has_tokenizer
        call = start(mesh, [1, 2, 3], 3000, request_id=f"abort-{number}")
        abort = inference_pb2.AbortRequest(request_id=f"abort-{number}")
        assert stub.Abort(abort, timeout=CALL_TIMEOUT_S).aborted
        assert list(call)[-1].finish_reason == inference_pb2.FINISH_REASON_ABORT
        assert not stub.Abort(abort, timeout=CALL_TIMEOUT_S).aborted
    for _ in range(8):
        with grpc.insecure_channel(mesh.listen, (("grpc.use_local_subchannel_pool", 1),)) as channel:
            health = health_pb2_grpc.HealthStub(channel)
            answer = health.Check(health_pb2.HealthCheckRequest(service=SERVICE), timeout=CALL_TIMEOUT_S)
            assert answer.status == health_pb2.HealthCheckResponse.SERVING
            reflection = reflection_pb2_grpc.ServerReflectionStub(channel).ServerReflectionInfo(
                iter([reflection_pb2.ServerReflectionRequest(list_services="")]), timeout=CALL_TIMEOUT_S
            )
            names = {service.name for service in next(reflection).list_services_response.service}
            assert SERVICE in names


def test_a_timeout_of_its_own_ends_one_request_of_a_session(mesh: RunningMesh) -> None:
    late = make_request([1, 2, 3], 4000, request_id="late", timeout_ms=200)
    soon = make_request([1, 2, 3], 5, request_id="soon")
    starts = iter([inference_pb2.SessionRequest(start=[late, soon])])
    ends = [end for response in mesh.stub.Session(starts, timeout=CALL_TIMEOUT_S) for end in response.ends]
    by_id = {end.request_id: end for end in ends}
    assert by_id["soon"].finish_reason == inference_pb2.FINISH_REASON_LENGTH
    refused = to_refusal(status_pb2.Status.FromString(by_id["late"].status))
    assert refused.code is grpc.StatusCode.DEADLINE_EXCEEDED
    assert refused.metadata["request_id"] == "late"


def test_a_worker_that_dies_takes_its_streams_along_and_comes_back(
    mesh: RunningMesh, stubs: list[Any]
) -> None:
    before = workers(mesh)
    calls = [
        stub.Generate(make_request([1, 2, 3], 4000, request_id=f"dies-{number}"), timeout=CALL_TIMEOUT_S)
        for number, stub in enumerate(stubs)
    ]
    for call in calls:
        next(call)
    victim = max(workers(mesh), key=lambda worker: worker.num_live)
    assert victim.num_live > 0
    os.kill(victim.process_id, signal.SIGKILL)
    ended = []
    for call in calls:
        call.add_done_callback(lambda done: ended.append(done.code()))
    wait_for(lambda: len(ended) >= victim.num_live or None, "the end of its streams")
    assert set(ended) == {grpc.StatusCode.UNAVAILABLE}
    assert len(ended) == victim.num_live, "streams of the other worker ended too"
    for call in calls:
        call.cancel()

    def successor() -> admin_pb2.ApiWorkerStatus | None:
        worker = workers(mesh)[victim.index]
        return worker if worker.ready and worker.process_id != victim.process_id else None

    back = wait_for(successor, "the new worker")
    assert back.num_restarts == before[victim.index].num_restarts + 1
    lane = mesh.wait_idle()
    assert lane.num_free_blocks == lane.num_blocks
    for stub in stubs:
        answer: Answer = read_answer(stub.Generate(request(1), timeout=CALL_TIMEOUT_S, wait_for_ready=True))
        assert answer.finish_reason == inference_pb2.FINISH_REASON_LENGTH


def test_nobody_else_gets_the_port(mesh: RunningMesh, demo_model: Path, tmp_path: Path) -> None:
    for flags in ((), ("--api-workers", "1")):
        other = start_router(tmp_path, demo_model, mesh.addresses, ("--listen", mesh.listen, *flags))
        assert other.process.wait(START_TIMEOUT_S) == 2
        assert f"cannot listen on {mesh.listen}" in other.log.read_text()
    host, _, port = mesh.listen.rpartition(":")
    with socket.socket() as taker, pytest.raises(OSError, match="in use"):
        taker.bind((host, int(port)))


def test_workers_die_with_their_router(mesh: RunningMesh, demo_model: Path, tmp_path: Path) -> None:
    """Even where it is killed; its lane never forms, for there is no such stage."""
    router = start_router(tmp_path, demo_model, ["127.0.0.1:9"], ("--api-workers", "2"))
    router.said("listening on")
    pids = router.children()
    assert len(pids) == 2
    router.kill()
    wait_for(lambda: not any(map(is_alive, pids)) or None, "the end of the workers")


def test_drain_lets_streams_end(mesh: RunningMesh) -> None:
    call = start(mesh, [1, 2, 3], 200)
    assert mesh.admin.Drain(admin_pb2.DrainRequest(), timeout=CALL_TIMEOUT_S).num_left == 0
    assert list(call)[-1].finish_reason == inference_pb2.FINISH_REASON_LENGTH
    refused = read_refusal(mesh.stub.Generate(make_request([1], 3), timeout=CALL_TIMEOUT_S))
    assert refused.reason == "DRAINING"
    assert mesh.router.stop() == 0
    mesh.start_router()
    mesh.wait_ready()
