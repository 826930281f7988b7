"""The blocking client."""

from __future__ import annotations

import time
from collections.abc import Iterable
from typing import Any, Unpack

import grpc

from stagemesh.client._base_client import BaseClient
from stagemesh.client._channel import CHANNEL_OPTIONS, Metadata, call_error
from stagemesh.client._chunks import to_completion, to_model_info
from stagemesh.client._closing import Closing
from stagemesh.client._exchange import Exchange
from stagemesh.client._many import Many
from stagemesh.client._many_stream import ManyStream
from stagemesh.client._readiness import (
    CHECK_TIMEOUT_S,
    HEALTH_REQUEST,
    ReadinessWait,
    is_serving,
    unready_error,
)
from stagemesh.client._request import Message, RequestOptions, build_request
from stagemesh.client._shared import SharedSession
from stagemesh.client._shared_calls import OpenSession, SharedCall, open_shared
from stagemesh.client._stream import TokenStream
from stagemesh.client._timeouts import CLIENT_DEFAULT, ClientDefault, call_timeout_s
from stagemesh.client._types import Completion, ModelInfo
from stagemesh.v1 import inference_pb2 as pb


class Client(Closing, BaseClient[TokenStream, ManyStream]):
    """A connection to a mesh, for threads. It may be shared by them; close it, or use it in a with-block.

    A request that is made while others run joins them in one session, which costs the router less.
    Nothing is connected before the first call, and a lost connection is made again by itself.
    """

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
        self._open()
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
            self._open()
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
        with self._lock:
            self._closed = True
        if self._channel is not None:
            self._channel.close()

    def _stream(self, exchange: Exchange, metadata: Metadata) -> TokenStream:
        return TokenStream(exchange, self._starter(metadata))

    def _send_many(self, many: Many, metadata: Metadata) -> ManyStream:
        return ManyStream(many, self._opener(many, metadata), self.address)

    def _is_over(self, call: Any) -> bool:
        return not call.is_active()

    def _open_shared(self, open_session: OpenSession, metadata: tuple[tuple[str, str], ...]) -> SharedSession:
        return open_shared(open_session, metadata, self.address)

    def _shared_call(self, session: SharedSession, request_id: str, timeout_s: float | None) -> SharedCall:
        return SharedCall(session, request_id, timeout_s)

    def _make_channel(self) -> grpc.Channel:
        if self._credentials is None:
            return grpc.insecure_channel(self.address, CHANNEL_OPTIONS)
        return grpc.secure_channel(self.address, self._credentials, CHANNEL_OPTIONS)

    def _unary(
        self, method: str, request: Any, timeout: float | ClientDefault | None, request_id: str = ""
    ) -> Any:
        try:
            return self._call(method, request, call_timeout_s(timeout, self._timeout_s))
        except grpc.RpcError as error:
            raise call_error(error, address=self.address, request_id=request_id) from error
