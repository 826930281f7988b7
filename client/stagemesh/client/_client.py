"""The blocking client."""

from __future__ import annotations

import time
from collections.abc import Iterable
from types import TracebackType
from typing import Any, Self, Unpack

import grpc
from grpc_health.v1 import health_pb2_grpc

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
from stagemesh.client._stream import TokenStream
from stagemesh.client._timeouts import CLIENT_DEFAULT, ClientDefault, call_timeout_s
from stagemesh.client._types import Completion, ModelInfo
from stagemesh.v1 import inference_pb2 as pb
from stagemesh.v1 import inference_pb2_grpc
from stagemesh.wire.address import split_address


class Client:
    """A connection to a mesh, for threads. It may be shared by them; close it, or use it in a with-block.

    Nothing is connected before the first call, and a lost connection is made again by itself.

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
        if credentials is None:
            self._channel = grpc.insecure_channel(address, CHANNEL_OPTIONS)
        else:
            self._channel = grpc.secure_channel(address, credentials, CHANNEL_OPTIONS)
        self._inference: Any = inference_pb2_grpc.InferenceServiceStub(self._channel)
        self._health: Any = health_pb2_grpc.HealthStub(self._channel)
        self._closed = False

    def generate(
        self,
        prompt: str | None = None,
        *,
        token_ids: Iterable[int] | None = None,
        timeout: float | ClientDefault | None = CLIENT_DEFAULT,
        metadata: Metadata = (),
        **options: Unpack[RequestOptions],
    ) -> TokenStream:
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
    ) -> TokenStream:
        """Stream the answer to a conversation; otherwise as `generate`."""
        return self._send(build_request(messages=messages, options=options), timeout, metadata)

    def complete(
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
        with self._send(request, timeout, metadata) as stream:
            chunks = list(stream)
            return to_completion(stream.request_id, chunks)

    def abort(self, request_id: str, *, timeout: float | ClientDefault | None = CLIENT_DEFAULT) -> bool:
        """End a request on whichever stream it runs; False: no such request was live."""
        response = self._unary("Abort", pb.AbortRequest(request_id=request_id), timeout, request_id)
        return bool(response.aborted)

    def model(self, *, timeout: float | ClientDefault | None = CLIENT_DEFAULT) -> ModelInfo:
        """The model the mesh serves, and its limits."""
        return to_model_info(self._unary("GetModel", pb.GetModelRequest(), timeout))

    def ready(self, *, timeout: float = CHECK_TIMEOUT_S) -> bool:
        """Whether the mesh takes requests now; no answer within `timeout` seconds is a no."""
        self._check_open()
        try:
            return is_serving(self._health.Check(HEALTH_REQUEST, timeout=timeout))
        except grpc.RpcError as error:
            unready_error(error, self.address)
            return False

    def wait_ready(self, timeout: float | None = 60.0) -> None:
        """Wait until the mesh takes requests.

        Raises:
            DeadlineExceededError: It did not within `timeout` seconds; says what the last answer was.
        """
        wait = ReadinessWait(self.address, timeout)
        while True:
            self._check_open()
            try:
                response = self._health.Check(HEALTH_REQUEST, timeout=wait.check_timeout_s())
            except grpc.RpcError as error:
                wait.failed(error)
            else:
                if wait.answered(response):
                    return
            time.sleep(wait.pause_s())

    def close(self) -> None:
        """Cancel what runs and close the connection. Idempotent."""
        self._closed = True
        self._channel.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()

    def _send(
        self, request: pb.GenerateRequest, timeout: float | ClientDefault | None, metadata: Metadata
    ) -> TokenStream:
        self._check_open()
        exchange = Exchange(
            request,
            timeout_s=call_timeout_s(timeout, self._timeout_s),
            retries=self._retries,
            address=self.address,
        )

        def start(exchange: Exchange) -> Any:
            self._check_open()
            return self._inference.Generate(
                exchange.request,
                timeout=exchange.remaining_s(),
                metadata=join_metadata(self._metadata, metadata),
            )

        return TokenStream(exchange, start)

    def _unary(
        self, method: str, request: Any, timeout: float | ClientDefault | None, request_id: str = ""
    ) -> Any:
        self._check_open()
        try:
            return getattr(self._inference, method)(
                request,
                timeout=call_timeout_s(timeout, self._timeout_s),
                metadata=join_metadata(self._metadata, ()),
            )
        except grpc.RpcError as error:
            raise call_error(error, address=self.address, request_id=request_id) from error

    def _check_open(self) -> None:
        if self._closed:
            raise closed_error()
