"""The RPCs of StageService. Execute and Transfer carry serialized messages, which go on as they came."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import AsyncIterator, Callable
from typing import TypeAlias

import grpc.aio
from google.protobuf.message import DecodeError

from stagemesh.stage.leader.lane import REPORT_INTERVAL_S, LeaderLane
from stagemesh.stage.leader.leader import StageLeader
from stagemesh.stage.leader.link import LinkSender
from stagemesh.v1 import stage_pb2
from stagemesh.wire import frame
from stagemesh.wire.errors import FailedPreconditionError, InvalidArgumentError, StageLostError
from stagemesh.wire.protocol import EPOCH_KEY

log = logging.getLogger(__name__)

PREPARE_TIMEOUT_S = 5.0
RAW_METHODS = frozenset({"Execute", "Transfer"})
CREDIT_BYTES = 4 << 20
"""A receiver acknowledges at least every so many bytes."""

Context: TypeAlias = grpc.aio.ServicerContext


class StageService:
    """Serves one leader."""

    def __init__(self, leader: StageLeader) -> None:
        self._leader = leader

    async def Describe(
        self, request: stage_pb2.DescribeRequest, context: Context
    ) -> stage_pb2.DescribeResponse:
        return self._leader.describe()

    async def OpenLane(
        self, request: stage_pb2.OpenLaneRequest, context: Context
    ) -> stage_pb2.OpenLaneResponse:
        return stage_pb2.OpenLaneResponse(incarnation=await self._leader.open_lane(request))

    async def PrepareLink(
        self, request: stage_pb2.PrepareLinkRequest, context: Context
    ) -> stage_pb2.PrepareLinkResponse:
        lane = self._leader.lane(request.epoch)
        self._check_transport(request.transport)
        if request.transport == "nccl":
            ids = await self._leader.prepare_nccl(lane, request.kind, PREPARE_TIMEOUT_S)
            return stage_pb2.PrepareLinkResponse(nccl_unique_ids=ids)
        if request.transport == "unix":
            return stage_pb2.PrepareLinkResponse(unix_path=self._leader.prepare_unix(lane, request.kind))
        lane.expected[request.kind] = asyncio.Event()
        return stage_pb2.PrepareLinkResponse()

    async def ConnectLink(
        self, request: stage_pb2.ConnectLinkRequest, context: Context
    ) -> stage_pb2.ConnectLinkResponse:
        lane = self._leader.lane(request.epoch)
        self._check_transport(request.transport)
        timeout_s = request.timeout_ms / 1000
        if request.transport == "nccl":
            await self._leader.connect_nccl(lane, request, timeout_s)
            if lane.stats and request.sender:
                lane.stats.send_from_worker(request.kind, request.transport)
        elif request.transport == "unix":
            await self._leader.connect_unix(lane, request, timeout_s)
        elif request.sender:
            on_sent = lane.stats.sent if lane.stats else None
            sender = LinkSender(lane.epoch, request.kind, request.peer_address, lane.fail, on_sent)
            lane.senders[request.kind] = sender
            await sender.opened(timeout_s)
        else:
            expected = lane.expected.get(request.kind)
            if expected is None:
                raise FailedPreconditionError(
                    "ConnectLink came before PrepareLink", reason="LINK_NOT_PREPARED"
                )
            try:
                await asyncio.wait_for(expected.wait(), timeout_s)
            except TimeoutError:
                raise StageLostError(
                    f"nothing came over the link within {timeout_s:g} s", reason="STAGE_LOST"
                ) from None
        return stage_pb2.ConnectLinkResponse()

    async def Execute(self, requests: AsyncIterator[bytes], context: Context) -> None:
        lane = self._leader.lane(_epoch_of(context))
        if lane.executing:
            raise FailedPreconditionError(
                f"epoch {lane.epoch} already has an Execute stream", reason="LANE_TAKEN"
            )
        lane.executing = True
        reader = asyncio.create_task(self._read_steps(lane, requests))
        reader.add_done_callback(lambda _: lane.wake.set())
        look = _Ticker(REPORT_INTERVAL_S, lane.wake.set)
        try:
            while not reader.done():
                await lane.wake.wait()
                lane.wake.clear()
                if results := lane.take_results():
                    await context.write(results)
                if lane.error:
                    raise lane.error
                if lane.report_due():
                    await context.write(lane.report(self._leader.take_timings(lane)))
            await reader
        finally:
            look.cancel()
            reader.cancel()
            self._leader.take_timings(lane)
            # Without its router the lane is over; its links close so that the neighbours see it too.
            lane.fail(StageLostError("the router closed the lane", reason="STAGE_LOST"))
            await self._leader.close_lane(lane)

    async def Transfer(self, requests: AsyncIterator[bytes], context: Context) -> None:
        received = acknowledged = 0
        async for message in requests:
            arrival_ns = time.monotonic_ns()
            part = frame.decode(message)
            lane = self._leader.lane(part.epoch)
            expected = lane.expected.get(part.kind)
            if expected is None:
                raise FailedPreconditionError(
                    "a frame came for a link that was not prepared", reason="LINK_NOT_PREPARED"
                )
            received += len(part.data)
            if part.step == 0:
                expected.set()
            else:
                self._leader.hand_frame(message, arrival_ns)
            if part.step == 0 or received - acknowledged >= CREDIT_BYTES:
                acknowledged = received
                await context.write(stage_pb2.TransferResponse(received_bytes=received).SerializeToString())

    def _check_transport(self, transport: str) -> None:
        offered = self._leader.transports()
        if transport not in offered:
            raise FailedPreconditionError(
                f"transport '{transport}' is not one of this stage's: {', '.join(offered)}",
                reason="TRANSPORT_UNKNOWN",
            )

    async def _read_steps(self, lane: LeaderLane, requests: AsyncIterator[bytes]) -> None:
        async for message in requests:
            arrival_ns = time.monotonic_ns()
            try:
                request = stage_pb2.ExecuteRequest.FromString(message)
            except DecodeError as error:
                raise InvalidArgumentError(
                    "the bytes sent do not parse as stagemesh.v1.ExecuteRequest", reason="UNPARSABLE"
                ) from error
            self._leader.hand_steps(lane, request, message, arrival_ns)


class _Ticker:
    """Calls `tick` every `interval_s`, at the price of one timer each and not of one for every wait."""

    def __init__(self, interval_s: float, tick: Callable[[], object]) -> None:
        self._interval_s = interval_s
        self._tick = tick
        self._timer = asyncio.get_running_loop().call_later(interval_s, self._fire)

    def cancel(self) -> None:
        self._timer.cancel()

    def _fire(self) -> None:
        self._timer = asyncio.get_running_loop().call_later(self._interval_s, self._fire)
        self._tick()


def _epoch_of(context: Context) -> int:
    value = dict(context.invocation_metadata() or ()).get(EPOCH_KEY)
    if not isinstance(value, str) or not value.isdigit():
        raise InvalidArgumentError(
            f"metadata {EPOCH_KEY} is {value!r}; expected the lane's epoch", reason="NO_EPOCH"
        )
    return int(value)
