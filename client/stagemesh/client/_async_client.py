"""The asyncio client."""

from __future__ import annotations

import asyncio
from collections.abc import Iterable
from types import TracebackType
from typing import Any, Self, Unpack

import grpc
from grpc_health.v1 import health_pb2_grpc

from stagemesh.client._async_stream import AsyncTokenStream
from stagemesh.client._channel import (
    CHANNEL_OPTIONS,
    Metadata,
    MetadataSource,
    call_error,
    closed_error,
    join_metadata,
)
from stagemesh.client._chunks import to_completion, to_model_info
from stagemesh.client._defaults import DEFAULT_ADDRESS, DEFAULT_TIMEOUT_S
from stagemesh.client._exchange import Exchange
from stagemesh.client._readiness import (
    CHECK_TIMEOUT_S,
    HEALTH_REQUEST,
    ReadinessWait,
    is_serving,
    unready_error,
)
from stagemesh.client._request import Message, RequestOptions, build_request
from stagemesh.client._timeouts import CLIENT_DEFAULT, ClientDefault, call_timeout_s
from stagemesh.client._types import Completion, ModelInfo
from stagemesh.v1 import inference_pb2 as pb
from stagemesh.v1 import inference_pb2_grpc
from stagemesh.wire.address import split_address


class AsyncClient:
    """A connection to a mesh, for asyncio; tasks may share it. Close it, or use it in an async with-block.

    Nothing is connected before the first call, and a lost connection is made again by itself. It belongs to
    the event loop of its first call.

    Args:
        address: HOST:PORT of the router.
        timeout: Seconds a call may take, unless the call says otherwise; None is for ever.
        retries: How often a request that was refused as "not now" before its first token is sent again;
            the router's RetryInfo says when, else the pause doubles from 0.2 to 5 s.
        metadata: Sent with every call; a function is asked for each (W3C trace context comes in here).
        credentials: For TLS; None is plain text.

    Raises:
        ConfigError: The address is not HOST:PORT.
    """

    def __init__(
        self,
        address: str = DEFAULT_ADDRESS,
        *,
        timeout: float | None = DEFAULT_TIMEOUT_S,
        retries: int = 0,
        metadata: MetadataSource = (),
        credentials: grpc.ChannelCredentials | None = None,
    ) -> None:
        split_address(address, key="address")
        self.address = address
        self._timeout_s = timeout
        self._retries = retries
        self._metadata = metadata
        self._credentials = credentials
        self._channel: Any = None
        self._inference: Any = None
        self._health: Any = None
        self._closed = False

    def generate(
        self,
        prompt: str | None = None,
        *,
        token_ids: Iterable[int] | None = None,
        timeout: float | ClientDefault | None = CLIENT_DEFAULT,
        metadata: Metadata = (),
        **options: Unpack[RequestOptions],
    ) -> AsyncTokenStream:
        """Stream the continuation of a text, or of token ids. The request is on its way when this returns.

        Raises:
            InvalidArgumentError: A value that no request can hold. What the router refuses is raised by
                the stream.
        """
        return self._send(
            build_request(prompt=prompt, token_ids=token_ids, options=options), timeout, metadata
        )

    def chat(
        self,
        messages: Iterable[Message],
        *,
        timeout: float | ClientDefault | None = CLIENT_DEFAULT,
        metadata: Metadata = (),
        **options: Unpack[RequestOptions],
    ) -> AsyncTokenStream:
        """Stream the answer to a conversation; otherwise as `generate`."""
        return self._send(build_request(messages=messages, options=options), timeout, metadata)

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
        self._closed = True
        if self._channel is not None:
            await self._channel.close()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, value: BaseException | None, traceback: TracebackType | None
    ) -> None:
        await self.close()

    def _send(
        self, request: pb.GenerateRequest, timeout: float | ClientDefault | None, metadata: Metadata
    ) -> AsyncTokenStream:
        self._open()
        exchange = Exchange(
            request,
            timeout_s=call_timeout_s(timeout, self._timeout_s),
            retries=self._retries,
            address=self.address,
        )

        def start(exchange: Exchange) -> Any:
            self._open()
            return self._inference.Generate(
                exchange.request,
                timeout=exchange.remaining_s(),
                metadata=join_metadata(self._metadata, metadata),
            )

        return AsyncTokenStream(exchange, start)

    async def _unary(
        self, method: str, request: Any, timeout: float | ClientDefault | None, request_id: str = ""
    ) -> Any:
        self._open()
        try:
            return await getattr(self._inference, method)(
                request,
                timeout=call_timeout_s(timeout, self._timeout_s),
                metadata=join_metadata(self._metadata, ()),
            )
        except grpc.RpcError as error:
            raise call_error(error, address=self.address, request_id=request_id) from error

    def _open(self) -> None:
        """Made on first use, for a channel belongs to the loop that runs then."""
        if self._closed:
            raise closed_error()
        if self._channel is not None:
            return
        if self._credentials is None:
            self._channel = grpc.aio.insecure_channel(self.address, CHANNEL_OPTIONS)
        else:
            self._channel = grpc.aio.secure_channel(self.address, self._credentials, CHANNEL_OPTIONS)
        self._inference = inference_pb2_grpc.InferenceServiceStub(self._channel)
        self._health = health_pb2_grpc.HealthStub(self._channel)
