"""The router's side of one stage: its channel, its Execute stream, what it reported."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable

import grpc
import grpc.aio

from stagemesh.router.lane.chain import Member
from stagemesh.router.lane.clock import ClockOffset
from stagemesh.router.lane.message_stream import MessageStream
from stagemesh.router.lane.timings import StageTimings
from stagemesh.v1 import stage_pb2, stage_pb2_grpc
from stagemesh.wire.errors import StageLostError, UnavailableError
from stagemesh.wire.protocol import EPOCH_KEY
from stagemesh.wire.service import MAX_MESSAGE_BYTES, MESH_CHANNEL_OPTIONS
from stagemesh.wire.status import from_rpc_error

log = logging.getLogger(__name__)

_EXECUTE = "/stagemesh.v1.StageService/Execute"
DESCRIBE_TIMEOUT_S = 3.0
CONNECT_TIMEOUT_S = 3.0
STALL_S = 1.0
"""A timer that is later than this shows that the router itself had no turn: what its stages sent is still in the sockets."""

OnResponse = Callable[["StageLink", stage_pb2.ExecuteResponse], None]
OnLost = Callable[["StageLink", str, str], None]
"""The stage whose stream ended, how, and the address of the neighbour it blames, if it does."""


class StageLink:
    """One stage as the router sees it.

    Args:
        index: Place in the lane, from 0.
        address: Of the stage.
    """

    def __init__(self, index: int, address: str) -> None:
        self.index = index
        self.address = address
        self.state = "absent"
        """absent, loading, refused, ready or lost."""
        self.detail = ""
        self.description = stage_pb2.DescribeResponse()
        self.link_transport = ""
        """Of the link it sends on."""
        self.link_reason = ""
        """Why that is no better one."""
        self.report = stage_pb2.StageReport()
        self.timings = StageTimings()
        self.clock = ClockOffset()
        self.heard_at = 0.0
        self._channel = grpc.aio.insecure_channel(address, options=MESH_CHANNEL_OPTIONS)
        self.stub = stage_pb2_grpc.StageServiceStub(self._channel)
        self._stream: MessageStream | None = None

    @property
    def name(self) -> str:
        """As errors call it."""
        return f"stage {self.index} ({self.address})"

    async def describe(self) -> Member | None:
        """The stage if it is there and ready; otherwise None, and `state` and `detail` say why."""
        asked_ns = time.monotonic_ns()
        try:
            self.description = await self.stub.Describe(
                stage_pb2.DescribeRequest(), timeout=DESCRIBE_TIMEOUT_S
            )
        except grpc.aio.AioRpcError as error:
            self.state, self.detail = "absent", error.details() or error.code().name
            return None
        if self.description.not_ready_reason:
            self.state, self.detail = "loading", self.description.not_ready_reason
            return None
        if self.description.monotonic_ns:
            self.clock.went(asked_ns, self.description.monotonic_ns)
            self.clock.came(self.description.monotonic_ns, time.monotonic_ns())
        self.state, self.detail = "ready", ""
        return Member(self.index, self.address, self.description)

    def execute(self, epoch: int, on_response: OnResponse, on_lost: OnLost) -> None:
        """Open the Execute stream; `on_lost` is called once if it ends before `close_stream`."""
        self.heard_at = time.monotonic()
        self._stream = MessageStream(
            _EXECUTE,
            ((EPOCH_KEY, str(epoch)),),
            on_message=lambda data: self._take(data, on_response, on_lost),
            on_end=lambda error: self._say_lost(error, on_lost),
            max_message_bytes=MAX_MESSAGE_BYTES,
        )
        self._stream.connect(self.address, CONNECT_TIMEOUT_S)

    def send(self, request: bytes) -> None:
        """Send a serialized ExecuteRequest; those that the stage has no room for yet go as one message."""
        if self._stream:
            self._stream.send(request)

    async def close_stream(self) -> None:
        """End the Execute stream, with it the lane on that stage."""
        stream, self._stream = self._stream, None
        if stream:
            await stream.close()

    async def aclose(self) -> None:
        """Close everything."""
        await self.close_stream()
        await self._channel.close()

    def lost(self, how: str) -> StageLostError:
        """The error that names this stage."""
        return StageLostError(
            f"{self.name} was lost: {how}", reason="STAGE_LOST", stage=self.name, retry_after_s=1.0
        )

    def _take(self, data: bytes, on_response: OnResponse, on_lost: OnLost) -> None:
        self.heard_at = time.monotonic()
        try:
            on_response(self, stage_pb2.ExecuteResponse.FromString(data))
        except Exception as error:
            # With a message left out nothing after it can be right.
            log.exception("%s: what it sent cannot be taken", self.name)
            if self._stream:
                self._stream.cancel()
            self.state, self.detail = "lost", f"what it sent cannot be taken: {error!r}"
            on_lost(self, self.detail, "")

    def _say_lost(self, error: grpc.aio.AioRpcError, on_lost: OnLost) -> None:
        status = from_rpc_error(error)
        self.state, self.detail = "lost", status.message
        how = status.message or "its stream ended"
        if not isinstance(status, StageLostError | UnavailableError) and status.message:
            log.error("%s ended the lane: %s", self.name, status)
            how = f"{status.code.name}: {status.message}"
        on_lost(self, how, status.stage)
