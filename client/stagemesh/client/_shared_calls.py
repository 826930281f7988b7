"""A request on a shared session, with the face of a Generate call; blocking and for asyncio."""

from __future__ import annotations

import asyncio
import contextlib
import queue
import threading
from collections.abc import AsyncIterator, Callable
from typing import Any

import grpc

from stagemesh.client._async_stream import END
from stagemesh.client._channel import call_error
from stagemesh.client._many_stream import ended_early, not_understood
from stagemesh.client._shared import Deadline, Inbox, SharedSession
from stagemesh.v1 import inference_pb2 as pb
from stagemesh.wire.errors import CancelledError

OpenSession = Callable[[Any], Any]
"""Makes a Session call of an iterator of SessionRequest."""


class SharedCall:
    """Blocks its reader; another thread reads the session."""

    def __init__(self, session: SharedSession, request_id: str, timeout_s: float | None) -> None:
        self._session = session
        self._request_id = request_id
        self._deadline = Deadline(timeout_s, request_id)
        self._wake = threading.Event()
        self.inbox = Inbox(self._wake.set)

    def __next__(self) -> pb.GenerateResponse:
        while True:
            self._wake.clear()
            if (response := self.inbox.take()) is not None:
                return response
            if self.inbox.closed:
                raise StopIteration
            try:
                left_s = self._deadline.left_s()
            except BaseException:
                self.cancel()
                raise
            self._wake.wait(left_s)

    def initial_metadata(self) -> tuple[tuple[str, str], ...]:
        """None of its own: in a session the client's word on the id is the last."""
        return ()

    def cancel(self) -> None:
        """Want no more."""
        self._session.cancel(self._request_id, self.inbox)


class AsyncSharedCall:
    """The same for asyncio."""

    def __init__(self, session: SharedSession, request_id: str, timeout_s: float | None) -> None:
        self._session = session
        self._request_id = request_id
        self._deadline = Deadline(timeout_s, request_id)
        self._wake = asyncio.Event()
        self.inbox = Inbox(self._wake.set)

    async def read(self) -> Any:
        """The next message, or END."""
        while True:
            self._wake.clear()
            if (response := self.inbox.take()) is not None:
                return response
            if self.inbox.closed:
                return END
            try:
                left_s = self._deadline.left_s()
            except BaseException:
                self.cancel()
                raise
            # Not wait_for: that of Python 3.11 can lose a cancellation that comes with the message.
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(left_s):
                    await self._wake.wait()

    async def initial_metadata(self) -> tuple[tuple[str, str], ...]:
        """None of its own."""
        return ()

    def cancel(self) -> None:
        """Want no more."""
        self._session.cancel(self._request_id, self.inbox)


def open_shared(
    open_session: OpenSession, metadata: tuple[tuple[str, str], ...], address: str
) -> SharedSession:
    """Start a session, and a thread that reads it to its end."""
    outgoing: queue.SimpleQueue[pb.SessionRequest | None] = queue.SimpleQueue()
    session = SharedSession(outgoing.put, metadata)
    call = open_session(iter(outgoing.get, None))

    def read() -> None:
        try:
            for response in call:
                session.take(response)
            session.lost(ended_early(address))
        except grpc.RpcError as error:
            session.lost(call_error(error, address=address))
        except Exception as error:  # noqa: BLE001 - whatever it is, who waits must hear of it
            session.lost(not_understood(address, error))

    threading.Thread(target=read, name="stagemesh-session", daemon=True).start()
    return session


def open_shared_async(
    open_session: OpenSession, metadata: tuple[tuple[str, str], ...], address: str
) -> SharedSession:
    """Start a session, and a task that reads it to its end."""
    outgoing: asyncio.Queue[pb.SessionRequest | None] = asyncio.Queue()
    session = SharedSession(outgoing.put_nowait, metadata)

    async def requests() -> AsyncIterator[pb.SessionRequest]:
        while (request := await outgoing.get()) is not None:
            yield request

    call = open_session(requests())

    async def read() -> None:
        try:
            while (response := await call.read()) is not END:
                session.take(response)
            session.lost(ended_early(address))
        except grpc.RpcError as error:
            session.lost(call_error(error, address=address))
        except asyncio.CancelledError:
            # grpc.aio raises it for a cancelled call as well as for a cancelled task; both end the session.
            session.lost(CancelledError("the call was cancelled"))
        except Exception as error:  # noqa: BLE001 - whatever it is, who waits must hear of it
            session.lost(not_understood(address, error))

    task = asyncio.get_running_loop().create_task(read())
    _READERS.add(task)
    task.add_done_callback(_READERS.discard)
    return session


_READERS: set[asyncio.Task[None]] = set()
"""The event loop keeps only weak references to its tasks."""
