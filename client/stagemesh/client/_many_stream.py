"""The streams of many requests at once, blocking and for asyncio. Both drive a `Many`."""

from __future__ import annotations

import asyncio
import contextlib
import queue
import threading
from collections import deque
from collections.abc import AsyncIterator, Callable, Iterator
from types import TracebackType
from typing import Any, Self

import grpc

from stagemesh.client._async_stream import END
from stagemesh.client._channel import call_error
from stagemesh.client._many import Many, collect
from stagemesh.client._types import Chunk, Completion
from stagemesh.v1 import inference_pb2 as pb
from stagemesh.wire.errors import CancelledError, StagemeshError, UnavailableError

OpenSession = Callable[[Any], Any]
"""Makes a Session call of an iterator of SessionRequest."""


class ManyStream(Iterator[tuple[int, Chunk]]):
    """The (index, chunk) of many requests, as they come; index is the place of the prompt.

    The chunks of one request come in order; those of different requests as the mesh makes them. A request
    that fails ends with a chunk whose `error` is set, and the others go on. Reading slowly makes the
    router merge what waits: fewer, larger chunks.

    Closing it, leaving the with-block or dropping the last reference to it cancels what still runs. One
    thread reads; `close` and `cancel` may be called from another.
    """

    def __init__(self, many: Many, open_session: OpenSession, address: str) -> None:
        self._call: Any = None
        self._outgoing: queue.SimpleQueue[pb.SessionRequest | None] = queue.SimpleQueue()
        self._closed = threading.Event()
        self._many = many
        self._open = open_session
        self._address = address
        self._chunks: deque[tuple[int, Chunk]] = deque()
        self._send_due()

    @property
    def request_ids(self) -> list[str]:
        """By index: the ids to abort or trace the requests by."""
        return [exchange.request_id for exchange in self._many.exchanges]

    def __iter__(self) -> Self:
        return self

    def __next__(self) -> tuple[int, Chunk]:
        """The next chunk of any request; waits for it."""
        while not self._chunks:
            if self._closed.is_set() or self._many.done:
                self._hang_up()
                raise StopIteration
            self._send_due()
            if not self._many.num_live:
                self._closed.wait(self._many.pause_s())
                continue
            try:
                self._chunks += self._many.accept(next(self._call))
            except StopIteration:
                self._lose(ended_early(self._address))
            except grpc.RpcError as error:
                if not self._closed.is_set():
                    self._lose(call_error(error, address=self._address))
        return self._chunks.popleft()

    def completions(self) -> list[Completion | StagemeshError]:
        """The whole answers, in the order of the prompts; of a request that failed, its error."""
        return collect(self._many.exchanges, self)

    def cancel(self, index: int) -> None:
        """Want no more of one request; no further chunk of it comes."""
        if request_id := self._many.cancel(index):
            self._outgoing.put(pb.SessionRequest(cancel=[request_id]))

    def close(self) -> None:
        """Cancel every request that still runs. Idempotent, and safe from another thread."""
        self._closed.set()
        self._many.closed()
        if self._call is not None:
            self._call.cancel()
        self._hang_up()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()

    def __del__(self) -> None:
        self.close()

    def _send_due(self) -> None:
        starts = self._many.due()
        if starts:
            # First, so that the requests are on their way as soon as there is a call.
            self._outgoing.put(pb.SessionRequest(start=starts))
        if self._call is None and starts:
            self._call = self._open(iter(self._outgoing.get, None))

    def _lose(self, error: StagemeshError) -> None:
        self._chunks += self._many.lost(error)
        self._hang_up()
        self._call, self._outgoing = None, queue.SimpleQueue()

    def _hang_up(self) -> None:
        """Ends the thread of gRPC that waits for the next request to send."""
        self._outgoing.put(None)


class AsyncManyStream(AsyncIterator[tuple[int, Chunk]]):
    """`ManyStream` for asyncio; cancelling the task that reads it cancels the requests too."""

    def __init__(self, many: Many, open_session: OpenSession, address: str) -> None:
        self._call: Any = None
        self._outgoing: asyncio.Queue[pb.SessionRequest | None] = asyncio.Queue()
        self._closed = asyncio.Event()
        self._many = many
        self._open = open_session
        self._address = address
        self._chunks: deque[tuple[int, Chunk]] = deque()
        self._send_due()

    @property
    def request_ids(self) -> list[str]:
        """By index: the ids to abort or trace the requests by."""
        return [exchange.request_id for exchange in self._many.exchanges]

    def __aiter__(self) -> Self:
        return self

    async def __anext__(self) -> tuple[int, Chunk]:
        """The next chunk of any request."""
        while not self._chunks:
            if self._closed.is_set() or self._many.done:
                self._outgoing.put_nowait(None)
                raise StopAsyncIteration
            self._send_due()
            if not self._many.num_live:
                with contextlib.suppress(TimeoutError):
                    await asyncio.wait_for(self._closed.wait(), self._many.pause_s())
                continue
            try:
                response = await self._call.read()
            except grpc.RpcError as error:
                self._lose(call_error(error, address=self._address))
            except asyncio.CancelledError:
                # grpc.aio raises it for a cancelled call as well as for a cancelled task.
                task = asyncio.current_task()
                if task is not None and task.cancelling():
                    self.close_soon()
                    raise
                if not self._closed.is_set():
                    self._lose(CancelledError("the call was cancelled"))
            else:
                if response is END:
                    self._lose(ended_early(self._address))
                else:
                    self._chunks += self._many.accept(response)
        return self._chunks.popleft()

    async def completions(self) -> list[Completion | StagemeshError]:
        """The whole answers, in the order of the prompts; of a request that failed, its error."""
        return collect(self._many.exchanges, [chunk async for chunk in self])

    def cancel(self, index: int) -> None:
        """Want no more of one request; no further chunk of it comes."""
        if request_id := self._many.cancel(index):
            self._outgoing.put_nowait(pb.SessionRequest(cancel=[request_id]))

    def close_soon(self) -> None:
        """`close` for where nothing can be awaited."""
        self._closed.set()
        self._many.closed()
        if self._call is not None:
            self._call.cancel()

    async def close(self) -> None:
        """Cancel every request that still runs. Idempotent."""
        self.close_soon()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, value: BaseException | None, traceback: TracebackType | None
    ) -> None:
        await self.close()

    def __del__(self) -> None:
        # The event loop may be closed by now, and the call with it.
        with contextlib.suppress(RuntimeError):
            self.close_soon()

    def _send_due(self) -> None:
        if starts := self._many.due():
            self._outgoing.put_nowait(pb.SessionRequest(start=starts))
            if self._call is None:
                self._call = self._open(_until_none(self._outgoing))

    def _lose(self, error: StagemeshError) -> None:
        self._chunks += self._many.lost(error)
        self._call, self._outgoing = None, asyncio.Queue()


def ended_early(address: str) -> StagemeshError:
    """A session that the router ended with requests still running on it."""
    return UnavailableError(
        f"{address} ended the session with requests still running", reason="SESSION_ENDED"
    )


async def _until_none(outgoing: asyncio.Queue[pb.SessionRequest | None]) -> AsyncIterator[pb.SessionRequest]:
    while (request := await outgoing.get()) is not None:
        yield request
