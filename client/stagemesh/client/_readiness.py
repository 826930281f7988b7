"""Whether a mesh takes requests: the parts of the health check that need no I/O."""

from __future__ import annotations

import time
from collections.abc import Callable

import grpc
from grpc_health.v1 import health_pb2

from stagemesh.client._channel import INFERENCE_SERVICE, call_error
from stagemesh.wire.errors import (
    DeadlineExceededError,
    NotFoundError,
    StagemeshError,
    UnavailableError,
    UnimplementedError,
)

HEALTH_REQUEST = health_pb2.HealthCheckRequest(service=INFERENCE_SERVICE)
CHECK_TIMEOUT_S = 5.0
_FIRST_PAUSE_S = 0.05
_MAX_PAUSE_S = 0.5


class ReadinessWait:
    """One wait until a mesh is ready: when to ask again, and what to say when it takes too long.

    Args:
        address: Of the router.
        timeout_s: Seconds to wait; None is for ever.
        clock: Seconds, monotonic.
    """

    def __init__(
        self, address: str, timeout_s: float | None, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._address = address
        self._timeout_s = timeout_s
        self._clock = clock
        self._begin = clock()
        self._pause_s = _FIRST_PAUSE_S
        self._reason = "never answered"
        self._answered = False

    def check_timeout_s(self) -> float:
        """Seconds the next check may take."""
        return min(CHECK_TIMEOUT_S, max(0.05, self._left_s()))

    def answered(self, response: health_pb2.HealthCheckResponse) -> bool:
        """Whether that answer ends the wait."""
        status = health_pb2.HealthCheckResponse.ServingStatus.Name(response.status)
        self._reason = f"its health is {status}"
        self._answered = True
        return is_serving(response)

    def failed(self, error: grpc.RpcError) -> None:
        """A check failed; raises if waiting cannot help. One that ran out of time says less than the one before."""
        mapped = unready_error(error, self._address)
        if not (isinstance(mapped, DeadlineExceededError) and self._answered):
            self._reason = str(mapped)

    def pause_s(self) -> float:
        """Seconds until the next check; raises DeadlineExceededError when there is no time for one."""
        pause_s, self._pause_s = self._pause_s, min(_MAX_PAUSE_S, self._pause_s * 1.5)
        if self._left_s() <= pause_s:
            waited_s = self._clock() - self._begin
            raise DeadlineExceededError(
                f"{self._address} was not ready within {waited_s:.1f} s: {self._reason}", reason="NOT_READY"
            )
        return pause_s

    def _left_s(self) -> float:
        if self._timeout_s is None:
            return float("inf")
        return self._timeout_s - (self._clock() - self._begin)


def is_serving(response: health_pb2.HealthCheckResponse) -> bool:
    """Whether the mesh takes requests now."""
    return bool(response.status == health_pb2.HealthCheckResponse.SERVING)


def unready_error(error: grpc.RpcError, address: str) -> StagemeshError:
    """The error that says "not now"; raises the others, which no waiting mends."""
    mapped = call_error(error, address=address)
    if isinstance(mapped, UnavailableError | NotFoundError | DeadlineExceededError):
        return mapped
    if isinstance(mapped, UnimplementedError):
        raise UnimplementedError(f"{address} is a gRPC server, but not a stagemesh router") from error
    raise mapped from error
