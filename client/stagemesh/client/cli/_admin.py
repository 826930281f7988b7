"""The admin side of a router, for `status`, `top`, `trace`, `timeline` and `up`."""

from __future__ import annotations

from collections.abc import Iterator
from types import TracebackType
from typing import Any, Self

import grpc

from stagemesh.client._channel import CHANNEL_OPTIONS, call_error
from stagemesh.client.cli._interrupt import ctrl_c_calls
from stagemesh.v1 import admin_pb2 as pb
from stagemesh.v1 import admin_pb2_grpc
from stagemesh.wire.address import split_address

_TIMEOUT_S = 10.0


class Admin:
    """A connection to a router's AdminService; use it in a with-block.

    Args:
        address: HOST:PORT.
        key: The option that it came by, which errors name.
    """

    def __init__(self, address: str, *, key: str = "--admin") -> None:
        split_address(address, key=key)
        self._address = f"{address} ({key})"
        self._channel = grpc.insecure_channel(address, CHANNEL_OPTIONS)
        self._stub: Any = admin_pb2_grpc.AdminServiceStub(self._channel)

    def status(self, timeout_s: float = _TIMEOUT_S) -> pb.MeshStatus:
        """The mesh now."""
        try:
            response: pb.GetStatusResponse = self._stub.GetStatus(pb.GetStatusRequest(), timeout=timeout_s)
        except grpc.RpcError as error:
            raise call_error(error, address=self._address) from error
        return response.status

    def watch(self, interval_ms: int) -> Iterator[pb.MeshStatus]:
        """The mesh now and after each interval, until Ctrl-C."""
        call = self._stub.WatchStatus(pb.WatchStatusRequest(interval_ms=interval_ms))
        with ctrl_c_calls(call.cancel) as stopped:
            try:
                for response in call:
                    yield response.status
            except grpc.RpcError as error:
                if not stopped.is_set():
                    raise call_error(error, address=self._address) from error

    def trace(self, request_id: str) -> pb.GetRequestTraceResponse:
        """Where the time of a request went; NotFoundError if it is not among the last ones."""
        request = pb.GetRequestTraceRequest(request_id=request_id)
        try:
            trace: pb.GetRequestTraceResponse = self._stub.GetRequestTrace(request, timeout=_TIMEOUT_S)
        except grpc.RpcError as error:
            raise call_error(error, address=self._address, request_id=request_id) from error
        return trace

    def timeline(self, seconds: float) -> pb.GetTimelineResponse:
        """Every step of that many seconds from now."""
        request = pb.GetTimelineRequest(seconds=seconds)
        try:
            timeline: pb.GetTimelineResponse = self._stub.GetTimeline(request, timeout=seconds + _TIMEOUT_S)
        except grpc.RpcError as error:
            raise call_error(error, address=self._address) from error
        return timeline

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._channel.close()
