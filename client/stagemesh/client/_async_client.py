"""The asyncio client."""

from __future__ import annotations

import asyncio
from collections.abc import Iterable
from typing import Any, Unpack

import grpc

from stagemesh.client._async_stream import AsyncTokenStream
from stagemesh.client._base_client import BaseClient
from stagemesh.client._channel import CHANNEL_OPTIONS, Metadata, call_error
from stagemesh.client._chunks import to_completion, to_model_info
from stagemesh.client._closing import AsyncClosing
from stagemesh.client._exchange import Exchange
from stagemesh.client._many import Many
from stagemesh.client._many_stream import AsyncManyStream
from stagemesh.client._readiness import (
    CHECK_TIMEOUT_S,
    HEALTH_REQUEST,
    ReadinessWait,
    is_serving,
    unready_error,
)
from stagemesh.client._request import Message, RequestOptions, build_request
from stagemesh.client._shared import SharedSession
from stagemesh.client._shared_calls import AsyncSharedCall, OpenSession, open_shared_async
from stagemesh.client._timeouts import CLIENT_DEFAULT, ClientDefault, call_timeout_s
from stagemesh.client._types import Completion, ModelInfo
from stagemesh.v1 import inference_pb2 as pb


class AsyncClient(AsyncClosing, BaseClient[AsyncTokenStream, AsyncManyStream]):
    """A connection to a mesh, for asyncio; tasks may share it. Close it, or use it in an async with-block.

    A request that is made while others run joins them in one session, which costs the router less.
    Nothing is connected before the first call, and a lost connection is made again by itself. It belongs to
    the event loop of its first call.
    """

    async def complete(
        self,
        prompt: str | None = None,
        *,
        token_ids: Iterable[int] | None = None,
        messages: Iterable[Message] | None = None,
        timeout: float | ClientDefault | None = CLIENT_DEFAULT,
        metadata: Metadata = (),
        **options: Unpack[RequestOptions],
    ) -> Completion:
        """The whole answer to a text, token ids or a conversation; raises any StagemeshError."""
        request = build_request(prompt=prompt, token_ids=token_ids, messages=messages, options=options)
        async with self._send(request, timeout, metadata) as stream:
            chunks = [chunk async for chunk in stream]
            return to_completion(stream.request_id, chunks)

    async def abort(self, request_id: str, *, timeout: float | ClientDefault | None = CLIENT_DEFAULT) -> bool:
        """End a request on whichever stream it runs; False: no such request was live."""
        response = await self._unary("Abort", pb.AbortRequest(request_id=request_id), timeout, request_id)
        return bool(response.aborted)

    async def model(self, *, timeout: float | ClientDefault | None = CLIENT_DEFAULT) -> ModelInfo:
        """The model the mesh serves, and its limits."""
        return to_model_info(await self._unary("GetModel", pb.GetModelRequest(), timeout))

    async def ready(self, *, timeout: float = CHECK_TIMEOUT_S) -> bool:
        """Whether the mesh takes requests now; no answer within `timeout` seconds is a no."""
        self._open()
        try:
            return is_serving(await self._health.Check(HEALTH_REQUEST, timeout=timeout))
        except grpc.RpcError as error:
            unready_error(error, self.address)
            return False

    async def wait_ready(self, timeout: float | None = 60.0) -> None:
        """Wait until the mesh takes requests.

        Raises:
            DeadlineExceededError: It did not within `timeout` seconds; says what the last answer was.
        """
        wait = ReadinessWait(self.address, timeout)
        while True:
            self._open()
            try:
                response = await self._health.Check(HEALTH_REQUEST, timeout=wait.check_timeout_s())
            except grpc.RpcError as error:
                wait.failed(error)
            else:
                if wait.answered(response):
                    return
            await asyncio.sleep(wait.pause_s())

    async def close(self) -> None:
        """Cancel what runs and close the connection. Idempotent."""
        with self._lock:
            self._closed = True
        if self._channel is not None:
            await self._channel.close()

    def _stream(self, exchange: Exchange, metadata: Metadata) -> AsyncTokenStream:
        return AsyncTokenStream(exchange, self._starter(metadata))

    def _send_many(self, many: Many, metadata: Metadata) -> AsyncManyStream:
        return AsyncManyStream(many, self._opener(many, metadata), self.address)

    def _is_over(self, call: Any) -> bool:
        return bool(call.done())

    def _open_shared(self, open_session: OpenSession, metadata: tuple[tuple[str, str], ...]) -> SharedSession:
        return open_shared_async(open_session, metadata, self.address)

    def _shared_call(
        self, session: SharedSession, request_id: str, timeout_s: float | None
    ) -> AsyncSharedCall:
        return AsyncSharedCall(session, request_id, timeout_s)

    def _make_channel(self) -> grpc.aio.Channel:
        if self._credentials is None:
            return grpc.aio.insecure_channel(self.address, CHANNEL_OPTIONS)
        return grpc.aio.secure_channel(self.address, self._credentials, CHANNEL_OPTIONS)

    async def _unary(
        self, method: str, request: Any, timeout: float | ClientDefault | None, request_id: str = ""
    ) -> Any:
        try:
            return await self._call(method, request, call_timeout_s(timeout, self._timeout_s))
        except grpc.RpcError as error:
            raise call_error(error, address=self.address, request_id=request_id) from error
