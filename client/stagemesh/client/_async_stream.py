"""The asyncio stream of one request."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from typing import Any, Self

import grpc

from stagemesh.client._channel import call_error
from stagemesh.client._closing import AsyncClosingStream
from stagemesh.client._exchange import Exchange
from stagemesh.client._types import Chunk
from stagemesh.wire.errors import CancelledError, StagemeshError

END: Any = vars(grpc.aio)["EOF"]  # missing from the stubs


class AsyncTokenStream(AsyncClosingStream, AsyncIterator[Chunk]):
    """The chunks of one request, as they come.

    Iterate over it; use it as an async context manager to be sure that it ends. Closing it, leaving the
    async with-block, dropping the last reference to it or cancelling the task that waits on it cancels the
    request, and the router frees what it held.

    Every error it raises is a StagemeshError with the request's id, or asyncio's own CancelledError when
    the waiting task was cancelled.
    """

    def __init__(self, exchange: Exchange, start: Callable[[Exchange], Any]) -> None:
        # First, for __del__ runs even if start fails.
        self._call: Any = None
        self._closed = asyncio.Event()
        self._exchange = exchange
        self._start = start
        self._call = start(exchange)

    @property
    def request_id(self) -> str:
        """The id to abort or trace the request by; the router's word replaces the client's when it comes."""
        return self._exchange.request_id

    def __aiter__(self) -> Self:
        return self

    async def __anext__(self) -> Chunk:
        """The next chunk. After `close` the stream is at its end."""
        while not self._closed.is_set():
            try:
                response = await self._call.read()
                if response is END:
                    self._closed.set()
                    break
                metadata = await self._call.initial_metadata()
            except (grpc.RpcError, StagemeshError) as error:
                if self._closed.is_set():
                    break
                await self._back_off(error)
            except asyncio.CancelledError as error:
                # grpc.aio raises it for a cancelled call as well as for a cancelled task.
                task = asyncio.current_task()
                if task is not None and task.cancelling():
                    self.cancel()
                    raise
                if self._closed.is_set():
                    break
                self._closed.set()
                message = (await self._call.details()) or "the call was cancelled"
                raise CancelledError(message, request_id=self.request_id) from error
            else:
                return self._exchange.accept(response, metadata)
        raise StopAsyncIteration

    async def _back_off(self, error: grpc.RpcError | StagemeshError) -> None:
        exchange = self._exchange
        mapped = call_error(error, address=exchange.address, request_id=exchange.request_id)
        delay_s = exchange.retry_delay_s(mapped)
        if delay_s is None:
            self._closed.set()
            raise mapped from error
        try:
            async with asyncio.timeout(delay_s):
                await self._closed.wait()
        except TimeoutError:
            self._call = self._start(self._exchange)

    def cancel(self) -> None:
        """`close_soon`, by the name that asyncio gives it."""
        self.close_soon()

    def close_soon(self) -> None:
        """`close` for where nothing can be awaited."""
        self._closed.set()
        self._exchange.closed()
        if self._call is not None:
            self._call.cancel()
