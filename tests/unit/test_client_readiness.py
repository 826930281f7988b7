"""Waiting for a mesh, in virtual time."""

from __future__ import annotations

from typing import Any

import grpc
import pytest
from grpc_health.v1 import health_pb2

from stagemesh.client import DeadlineExceededError
from stagemesh.client._readiness import ReadinessWait

NOT_SERVING = health_pb2.HealthCheckResponse(status=health_pb2.HealthCheckResponse.NOT_SERVING)


class Failure(grpc.RpcError):
    """A check that failed."""

    def __init__(self, code: grpc.StatusCode, details: str) -> None:
        self.code, self.details, self.trailing_metadata = (lambda: code), (lambda: details), (lambda: ())


LATE = Failure(grpc.StatusCode.DEADLINE_EXCEEDED, "Deadline Exceeded")
REFUSED = Failure(grpc.StatusCode.UNAVAILABLE, "failed to connect: Connection refused")


@pytest.mark.parametrize(
    ("checks", "said"),
    [
        ([NOT_SERVING], "its health is NOT_SERVING"),
        ([NOT_SERVING, LATE], "its health is NOT_SERVING"),
        ([NOT_SERVING, REFUSED], "no connection to mesh:1: Connection refused"),
        ([LATE], "Deadline Exceeded"),
    ],
)
def test_it_says_what_the_last_answer_was(checks: list[Any], said: str) -> None:
    now = 0.0
    wait = ReadinessWait("mesh:1", 1.0, clock=lambda: now)
    for check in checks:
        wait.failed(check) if isinstance(check, Failure) else wait.answered(check)
    now = 0.99
    with pytest.raises(DeadlineExceededError, match=rf"mesh:1 was not ready within 1\.0 s: {said}") as caught:
        wait.pause_s()
    assert caught.value.reason == "NOT_READY"
