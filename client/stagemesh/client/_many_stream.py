"""The streams of many requests at once, blocking and for asyncio. Both drive a `Many`."""

from __future__ import annotations

import asyncio
import contextlib
import queue
import threading
from abc import ABC, abstractmethod
from collections import deque
from collections.abc import AsyncIterator, Callable, Iterator
from typing import Any, Self

import grpc

from stagemesh.client._async_stream import END
from stagemesh.client._channel import call_error
from stagemesh.client._closing import AsyncClosingStream, ClosingStream
from stagemesh.client._many import Many, batches, collect
from stagemesh.client._types import Chunk, Completion
from stagemesh.v1 import inference_pb2 as pb
from stagemesh.wire.errors import CancelledError, InternalError, StagemeshError, UnavailableError

OpenSession = Callable[[Any], Any]
"""Makes a Session call of an iterator of SessionRequest."""


class _Session(ABC):
    """The Session calls of one `Many`, one after the other: a further one is opened where the last was lost.

    The lock is for `cancel` and `close`, which may come from another thread than the reader's.

    Args:
        many: The requests.
        open_session: Opens a call.
        address: Of the router, for errors.
        closed: Set when the application wants no more.
    """

    def __init__(
        self, many: Many, open_session: OpenSession, address: str, closed: threading.Event | asyncio.Event
    ) -> None:
        self._call: Any = None
        self._lock = threading.RLock()
        self._closed = closed
        self._many = many
        self._open = open_session
        self._address = address
        self._chunks: deque[tuple[int, Chunk]] = deque()
        self._outgoing, self._requests = self._make_queue()
        self._send_due()

    @property
    def request_ids(self) -> list[str]:
        """By index: the ids to abort or trace the requests by."""
        return [exchange.request_id for exchange in self._many.exchanges]

    def cancel(self, index: int) -> None:
        """Want no more of one request; no further chunk of it comes."""
        with self._lock:
            self._chunks = deque(found for found in self._chunks if found[0] != index)
            if request_id := self._many.cancel(index):
                self._outgoing.put_nowait(pb.SessionRequest(cancel=[request_id]))
            self._send_due()
            if not self._many.num_live:
                # A reader waits for a message, and nobody is left to cause one.
                self._drop_call()

    @abstractmethod
    def _make_queue(self) -> tuple[Any, Any]:
        """A queue of SessionRequest, and what iterates over it until it finds None."""

    def _take(self) -> tuple[int, Chunk] | None:
        with self._lock:
            return self._chunks.popleft() if self._chunks else None

    def _is_over(self) -> bool:
        """Whether nothing more comes; the client's side is closed then."""
        with self._lock:
            over = self._closed.is_set() or self._many.done
            if over:
                self._outgoing.put_nowait(None)
            return over

    def _send_due(self) -> Any:
        """Send what is due; the call to read, None where nothing is under way."""
        with self._lock:
            if starts := self._many.due():
                # First, so that the requests are on their way as soon as there is a call.
                for batch in batches(starts):
                    self._outgoing.put_nowait(pb.SessionRequest(start=batch))
                if self._call is None:
                    self._call = self._open(self._requests)
            return self._call if self._many.num_live else None

    def _pause_s(self) -> float:
        with self._lock:
            return self._many.pause_s()

    def _accept(self, call: Any, response: pb.SessionResponse) -> None:
        with self._lock:
            try:
                self._chunks += self._many.accept(response)
            except Exception as error:  # noqa: BLE001 - whatever it is, every request must have its end
                self._lose(call, not_understood(self._address, error))

    def _lose(self, call: Any, error: StagemeshError) -> None:
        """A call ended while it was read. One that was dropped has nothing to lose."""
        with self._lock:
            if call is self._call and not self._closed.is_set():
                self._chunks += self._many.lost(error)
                self._drop_call()

    def _drop_call(self) -> None:
        """The router aborts what runs on it; who waits in gRPC for the next request to send finds the end."""
        if self._call is not None:
            self._call.cancel()
        self._outgoing.put_nowait(None)
        self._call = None
        self._outgoing, self._requests = self._make_queue()

    def _close(self) -> None:
        with self._lock:
            self._closed.set()
            self._many.closed()
            self._drop_call()


class ManyStream(_Session, ClosingStream, Iterator[tuple[int, Chunk]]):
    """The (index, chunk) of many requests, as they come; index is the place of the prompt.

    The chunks of one request come in order; those of different requests as the mesh makes them. A request
    that fails ends with a chunk whose `error` is set, and the others go on. Reading slowly makes the
    router merge what waits: fewer, larger chunks.

    Closing it, leaving the with-block or dropping the last reference to it cancels what still runs. One
    thread reads; `close` and `cancel` may be called from another.
    """

    _closed: threading.Event

    def __init__(self, many: Many, open_session: OpenSession, address: str) -> None:
        super().__init__(many, open_session, address, threading.Event())

    def __iter__(self) -> Self:
        return self

    def __next__(self) -> tuple[int, Chunk]:
        """The next chunk of any request; waits for it."""
        while (found := self._take()) is None:
            if self._is_over():
                raise StopIteration
            call = self._send_due()
            if call is None:
                self._closed.wait(self._pause_s())
                continue
            try:
                response = next(call)
            except StopIteration:
                self._lose(call, ended_early(self._address))
            except grpc.RpcError as error:
                self._lose(call, call_error(error, address=self._address))
            else:
                self._accept(call, response)
        return found

    def completions(self) -> list[Completion | StagemeshError]:
        """The whole answers, in the order of the prompts; of a request that failed, its error."""
        return collect(self._many.exchanges, self)

    def close(self) -> None:
        """Cancel every request that still runs. Idempotent, and safe from another thread."""
        self._close()

    def _make_queue(self) -> tuple[Any, Any]:
        outgoing: queue.SimpleQueue[pb.SessionRequest | None] = queue.SimpleQueue()
        return outgoing, iter(outgoing.get, None)


class AsyncManyStream(_Session, AsyncClosingStream, AsyncIterator[tuple[int, Chunk]]):
    """`ManyStream` for asyncio; cancelling the task that reads it cancels the requests too."""

    _closed: asyncio.Event

    def __init__(self, many: Many, open_session: OpenSession, address: str) -> None:
        super().__init__(many, open_session, address, asyncio.Event())

    def __aiter__(self) -> Self:
        return self

    async def __anext__(self) -> tuple[int, Chunk]:
        """The next chunk of any request."""
        while (found := self._take()) is None:
            if self._is_over():
                raise StopAsyncIteration
            call = self._send_due()
            if call is None:
                with contextlib.suppress(TimeoutError):
                    async with asyncio.timeout(self._pause_s()):
                        await self._closed.wait()
                continue
            try:
                response = await call.read()
            except grpc.RpcError as error:
                self._lose(call, call_error(error, address=self._address))
            except asyncio.CancelledError:
                # grpc.aio raises it for a cancelled call as well as for a cancelled task.
                task = asyncio.current_task()
                if task is not None and task.cancelling():
                    self.close_soon()
                    raise
                self._lose(call, CancelledError("the call was cancelled"))
            else:
                if response is END:
                    self._lose(call, ended_early(self._address))
                else:
                    self._accept(call, response)
        return found

    async def completions(self) -> list[Completion | StagemeshError]:
        """The whole answers, in the order of the prompts; of a request that failed, its error."""
        return collect(self._many.exchanges, [chunk async for chunk in self])

    def close_soon(self) -> None:
        """`close` for where nothing can be awaited."""
        self._close()

    def _make_queue(self) -> tuple[Any, Any]:
        outgoing: asyncio.Queue[pb.SessionRequest | None] = asyncio.Queue()
        return outgoing, _until_none(outgoing)


def ended_early(address: str) -> StagemeshError:
    """A session that the router ended with requests still running on it."""
    return UnavailableError(
        f"{address} ended the session with requests still running", reason="SESSION_ENDED"
    )


def not_understood(address: str, error: Exception) -> StagemeshError:
    """A message that breaks the contract, and with it everything that was on its session."""
    return InternalError(f"what {address} sent cannot be taken: {error!r}", reason="BAD_RESPONSE")


async def _until_none(outgoing: asyncio.Queue[pb.SessionRequest | None]) -> AsyncIterator[pb.SessionRequest]:
    while (request := await outgoing.get()) is not None:
        yield request
