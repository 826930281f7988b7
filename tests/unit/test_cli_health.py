"""`stagemesh health`, as containers and scripts use it."""

from __future__ import annotations

from concurrent import futures

import grpc
import pytest
from grpc_health.v1 import health, health_pb2, health_pb2_grpc
from scripted_router import WAIT_S, ScriptedRouter

from stagemesh.client.cli import main


def run(*args: str, capsys: pytest.CaptureFixture[str]) -> tuple[int, str, str]:
    with pytest.raises(SystemExit) as caught:
        main(("health", *args, "--timeout", f"{WAIT_S:g}"))
    output = capsys.readouterr()
    return int(caught.value.code or 0), output.out, output.err


def test_a_ready_router_is_0_and_one_that_is_not_is_1(capsys: pytest.CaptureFixture[str]) -> None:
    with ScriptedRouter() as router:
        code, out, _ = run(router.address, capsys=capsys)
        assert (code, out) == (0, f"stagemesh.v1.InferenceService at {router.address} is SERVING\n")
        router.set_health(health_pb2.HealthCheckResponse.NOT_SERVING)
        code, _, err = run(router.address, capsys=capsys)
        assert code == 1
        assert err == f"error: stagemesh.v1.InferenceService at {router.address} is NOT_SERVING\n"
        assert run(router.address, "--service", "", capsys=capsys)[0] == 0, "it lives"


def test_a_stage_is_asked_for_its_own_service(capsys: pytest.CaptureFixture[str]) -> None:
    server = grpc.server(futures.ThreadPoolExecutor(1))
    servicer = health.HealthServicer()
    health_pb2_grpc.add_HealthServicer_to_server(servicer, server)
    servicer.set("stagemesh.v1.StageService", health_pb2.HealthCheckResponse.SERVING)
    address = f"127.0.0.1:{server.add_insecure_port('127.0.0.1:0')}"
    server.start()
    try:
        code, out, _ = run(address, capsys=capsys)
        assert (code, out) == (0, f"stagemesh.v1.StageService at {address} is SERVING\n")
        code, _, err = run(address, "--service", "other", capsys=capsys)
        assert code == 1
        assert "has no service 'other'" in err
    finally:
        server.stop(0).wait()


@pytest.mark.parametrize(
    ("address", "code", "words"),
    [("127.0.0.1:1", 1, "no connection to 127.0.0.1:1"), ("nowhere", 2, "ADDRESS: 'nowhere'")],
)
def test_no_answer_and_no_address_are_one_line(
    address: str, code: int, words: str, capsys: pytest.CaptureFixture[str]
) -> None:
    got, _, err = run(address, capsys=capsys)
    assert got == code
    assert words in err
    assert err.count("\n") == 1
