"""The blocking stream of one request."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from typing import Any, Self

import grpc

from stagemesh.client._channel import call_error
from stagemesh.client._closing import ClosingStream
from stagemesh.client._exchange import Exchange
from stagemesh.client._types import Chunk
from stagemesh.wire.errors import StagemeshError


class TokenStream(ClosingStream, Iterator[Chunk]):
    """The chunks of one request, as they come.

    Iterate over it; use it as a context manager to be sure that it ends. Closing it, leaving the with-block
    or dropping the last reference to it cancels the request, and the router frees what it held.

    Every error it raises is a StagemeshError with the request's id.
    """

    def __init__(self, exchange: Exchange, start: Callable[[Exchange], Any]) -> None:
        # First, for __del__ runs even if start fails.
        self._call: Any = None
        self._closed = threading.Event()
        self._exchange = exchange
        self._start = start
        self._call = start(exchange)

    @property
    def request_id(self) -> str:
        """The id to abort or trace the request by; the router's word replaces the client's when it comes."""
        return self._exchange.request_id

    def __iter__(self) -> Self:
        return self

    def __next__(self) -> Chunk:
        """The next chunk; waits for it. After `close`, also from another thread, the stream is at its end."""
        while not self._closed.is_set():
            try:
                response = next(self._call)
            except StopIteration:
                self._closed.set()
                raise
            except (grpc.RpcError, StagemeshError) as error:
                if self._closed.is_set():
                    break
                exchange = self._exchange
                mapped = call_error(error, address=exchange.address, request_id=exchange.request_id)
                delay_s = exchange.retry_delay_s(mapped)
                if delay_s is None:
                    self._closed.set()
                    raise mapped from error
                if not self._closed.wait(delay_s):
                    self._call = self._start(exchange)
                    if self._closed.is_set():  # meanwhile, and so its `close` found the call before
                        self._call.cancel()
            else:
                return self._exchange.accept(response, self._call.initial_metadata())
        raise StopIteration

    def close(self) -> None:
        """Cancel the request if it still runs. Idempotent, and safe from another thread."""
        self._closed.set()
        self._exchange.closed()
        if self._call is not None:
            self._call.cancel()
