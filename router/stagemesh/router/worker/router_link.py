"""The scheduler's side as an API worker sees it: a socket to the router."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from itertools import count

from google.rpc import status_pb2

from stagemesh.router.api.streams import Streams
from stagemesh.router.scheduler import Request
from stagemesh.router.worker.frames import FrameProtocol
from stagemesh.router.worker.messages import NUMBER, Kind, pack_submit, unpack_deltas
from stagemesh.wire.status import from_proto


class RouterLink:
    """The Backend of the worker's streams.

    Args:
        streams: Get what comes for them.
        on_serving: Called with whether the mesh takes requests.
        on_stop: Called when the router wants the worker to leave.
        on_lost: Called when the router is gone.
    """

    def __init__(
        self,
        streams: Streams,
        on_serving: Callable[[bool], None],
        on_stop: Callable[[], None],
        on_lost: Callable[[], None],
    ) -> None:
        self.protocol = FrameProtocol(self._take, on_lost)
        self._streams = streams
        self._on_serving = on_serving
        self._on_stop = on_stop
        self._numbers = count(1)
        self._aborting: dict[int, asyncio.Future[bool]] = {}

    def submit(self, handle: int, request: Request, arrived: float) -> None:
        """Start a request."""
        self.protocol.send(Kind.SUBMIT, pack_submit(handle, request, arrived))

    def abandon(self, handle: int) -> None:
        """Nobody reads it any more."""
        self.protocol.send(Kind.ABANDON, NUMBER.pack(handle))

    def refused(self, code: str) -> None:
        """A request was refused here."""
        self.protocol.send(Kind.REFUSED, code.encode())

    async def abort(self, request_id: str) -> bool:
        """End a request, whichever worker has it."""
        number = next(self._numbers)
        answer: asyncio.Future[bool] = asyncio.get_running_loop().create_future()
        self._aborting[number] = answer
        self.protocol.send(Kind.ABORT, NUMBER.pack(number) + request_id.encode())
        try:
            return await answer
        finally:
            del self._aborting[number]

    def _take(self, kind: Kind, content: bytes) -> None:
        if kind is Kind.DELTAS:
            self._streams.take(*unpack_deltas(content))
        elif kind is Kind.FAILED:
            status = status_pb2.Status.FromString(content[NUMBER.size :])
            self._streams.fail(NUMBER.unpack_from(content)[0], from_proto(status))
        elif kind is Kind.SERVING:
            self._on_serving(bool(content[0]))
        elif kind is Kind.ABORTED:
            answer = self._aborting.get(NUMBER.unpack_from(content)[0])
            if answer and not answer.done():
                answer.set_result(bool(content[NUMBER.size]))
        elif kind is Kind.PING:
            self.protocol.send(Kind.PONG, content)
        elif kind is Kind.STOP:
            self._on_stop()
