"""The grpc transport of a link: frames of a tensor, straight from stage to stage.

The sender keeps at most WINDOW_BYTES unacknowledged, so that a slow receiver holds it back rather than
filling memory; HTTP/2 flow control holds back what is smaller than that.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections import deque
from collections.abc import Callable

import grpc
import grpc.aio

from stagemesh.stage.link_name import link_name
from stagemesh.v1 import stage_pb2
from stagemesh.wire import frame
from stagemesh.wire.errors import StageLostError
from stagemesh.wire.service import MESH_CHANNEL_OPTIONS

log = logging.getLogger(__name__)

WINDOW_BYTES = 64 << 20
TRANSPORT = "grpc"
OnSent = Callable[[int, str, int, float], None]
"""Kind of the link, transport, bytes, and seconds from `send` until the transport had it."""
_TRANSFER = "/stagemesh.v1.StageService/Transfer"


class LinkSender:
    """The sending end of one link of one epoch.

    Args:
        epoch: Of the lane.
        kind: LinkKind.
        address: The receiving stage's.
        on_broken: Called once, with the error, if the link ends before `close`.
        on_sent: Called for each tensor that the transport took; None where nobody counts.
    """

    def __init__(
        self,
        epoch: int,
        kind: int,
        address: str,
        on_broken: Callable[[StageLostError], None],
        on_sent: OnSent | None = None,
    ) -> None:
        self._epoch = epoch
        self._kind = kind
        self._address = address
        self._on_broken = on_broken
        self._on_sent = on_sent
        self._queue: deque[tuple[int, memoryview, float]] = deque()
        self._wake = asyncio.Event()
        self._sent_bytes = 0
        self._received_bytes = 0
        self._credit = asyncio.Event()
        self._opened: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._channel = grpc.aio.insecure_channel(address, options=MESH_CHANNEL_OPTIONS)
        self._task = asyncio.create_task(self._run())

    async def opened(self, timeout_s: float) -> None:
        """Return when the receiver has acknowledged the dummy; StageLostError names it if it does not."""
        try:
            await asyncio.wait_for(asyncio.shield(self._opened), timeout_s)
        except TimeoutError:
            raise self._lost(f"did not acknowledge within {timeout_s:g} s") from None

    def send(self, step: int, data: memoryview) -> None:
        """Queue a tensor's bytes; they must stay as they are until sent."""
        self._queue.append((step, data, time.monotonic()))
        self._wake.set()

    async def close(self) -> None:
        """Break off whatever is under way."""
        self._task.cancel()
        await asyncio.gather(self._task, return_exceptions=True)
        if not self._opened.done():
            self._opened.cancel()
        await self._channel.close()

    async def _run(self) -> None:
        try:
            call = self._channel.stream_stream(_TRANSFER)()
            credits = asyncio.create_task(self._take_credits(call))
            try:
                await self._write(call)
            finally:
                credits.cancel()
                call.cancel()
        except grpc.aio.AioRpcError as error:
            self._break(error.details() or error.code().name)
        except asyncio.InvalidStateError:
            self._break("the call ended")

    async def _write(self, call: grpc.aio.StreamStreamCall) -> None:
        self._queue.appendleft((0, memoryview(b"\0"), 0.0))
        while True:
            while self._queue:
                step, data, queued_at = self._queue.popleft()
                for message in frame.encode(epoch=self._epoch, kind=self._kind, step=step, tensor=data):
                    await self._wait_for_credit()
                    self._sent_bytes += min(frame.MAX_FRAME_BYTES, len(data))
                    await call.write(message)
                if self._on_sent and step:
                    self._on_sent(self._kind, TRANSPORT, len(data), time.monotonic() - queued_at)
            self._wake.clear()
            if not self._queue:
                await self._wake.wait()

    async def _wait_for_credit(self) -> None:
        while self._sent_bytes - self._received_bytes >= WINDOW_BYTES:
            self._credit.clear()
            await self._credit.wait()

    async def _take_credits(self, call: grpc.aio.StreamStreamCall) -> None:
        try:
            while (message := await call.read()) is not grpc.aio.EOF:
                self._received_bytes = stage_pb2.TransferResponse.FromString(message).received_bytes
                self._credit.set()
                if not self._opened.done():
                    self._opened.set_result(None)
            self._break(f"the receiver ended the call: {await call.details() or await call.code()}")
        except grpc.aio.AioRpcError as error:
            self._break(error.details() or error.code().name)

    def _break(self, how: str) -> None:
        error = self._lost(how)
        if not self._opened.done():
            self._opened.set_exception(error)
            self._opened.exception()  # it may have no waiter; on_broken tells
        self._on_broken(error)

    def _lost(self, how: str) -> StageLostError:
        return StageLostError(
            f"the {link_name(self._kind)} link to {self._address} broke: {how}",
            reason="STAGE_LOST",
            stage=self._address,
        )
