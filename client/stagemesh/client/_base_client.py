"""What both clients are: settings, and requests on their way. Subclasses do the I/O."""

from __future__ import annotations

import threading
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable
from typing import Any, Generic, TypeVar, Unpack

import grpc
from grpc_health.v1 import health_pb2_grpc

from stagemesh.client._channel import Metadata, MetadataSource, closed_error, join_metadata
from stagemesh.client._defaults import DEFAULT_ADDRESS, DEFAULT_TIMEOUT_S
from stagemesh.client._exchange import Exchange
from stagemesh.client._many import DEFAULT_MAX_LIVE, Many
from stagemesh.client._request import Message, Prompt, RequestOptions, build_request, build_requests
from stagemesh.client._shared import SharedSession
from stagemesh.client._timeouts import CLIENT_DEFAULT, ClientDefault, call_timeout_s
from stagemesh.v1 import inference_pb2 as pb
from stagemesh.v1 import inference_pb2_grpc
from stagemesh.wire.address import split_address
from stagemesh.wire.telemetry.context import TRACEPARENT_KEY

MAX_TIMEOUT_MS = (1 << 32) - 1
StreamT = TypeVar("StreamT")
ManyT = TypeVar("ManyT")


class BaseClient(ABC, Generic[StreamT, ManyT]):
    """See Client and AsyncClient."""

    def __init__(
        self,
        address: str = DEFAULT_ADDRESS,
        *,
        timeout: float | None = DEFAULT_TIMEOUT_S,
        retries: int = 0,
        metadata: MetadataSource = (),
        credentials: grpc.ChannelCredentials | None = None,
    ) -> None:
        """Settings only; nothing is connected before the first call.

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
        split_address(address, key="address")
        self.address = address
        self._timeout_s = timeout
        self._retries = retries
        self._metadata = metadata
        self._credentials = credentials
        self._closed = False
        self._lock = threading.RLock()
        self._channel: Any = None
        self._inference: Any = None
        self._health: Any = None
        self._calls: list[Any] = []
        """Generate calls that were not over at the last look."""
        self._shared: SharedSession | None = None
        """Carries calls that are made while others run."""

    def generate(
        self,
        prompt: str | None = None,
        *,
        token_ids: Iterable[int] | None = None,
        timeout: float | ClientDefault | None = CLIENT_DEFAULT,
        metadata: Metadata = (),
        **options: Unpack[RequestOptions],
    ) -> StreamT:
        """Stream the continuation of a text, or of token ids. The request is on its way when this returns.

        Raises:
            InvalidArgumentError: A value that no request can hold. What the router refuses is raised by
                the stream.
        """
        request = build_request(prompt=prompt, token_ids=token_ids, options=options)
        return self._send(request, timeout, metadata)

    def chat(
        self,
        messages: Iterable[Message],
        *,
        timeout: float | ClientDefault | None = CLIENT_DEFAULT,
        metadata: Metadata = (),
        **options: Unpack[RequestOptions],
    ) -> StreamT:
        """Stream the answer to a conversation; otherwise as `generate`."""
        return self._send(build_request(messages=messages, options=options), timeout, metadata)

    def generate_many(
        self,
        prompts: Iterable[Prompt],
        *,
        max_live: int = DEFAULT_MAX_LIVE,
        timeout: float | ClientDefault | None = CLIENT_DEFAULT,
        metadata: Metadata = (),
        **options: Unpack[RequestOptions],
    ) -> ManyT:
        """Stream the answers to many prompts over one connection, as (index of the prompt, chunk).

        A request that fails ends with a chunk whose `error` is set; the others go on. Far cheaper than a
        call for each: the router sends one message a step with what every request gained.

        Args:
            prompts: Each a text, token ids, messages, or a dict of `prompt`, `token_ids` or `messages` and
                options of its own, which win over `options`.
            max_live: Requests under way at once; the others start as these end.
            timeout: Seconds for all of them together.
            metadata: Sent with the call.
            options: Of every request.

        Raises:
            InvalidArgumentError: A value that no request can hold.
        """
        requests = build_requests(prompts, options)
        self._open()
        timeout_s = call_timeout_s(timeout, self._timeout_s)
        many = Many([self._exchange(request, timeout_s) for request in requests], max_live=max_live)
        return self._send_many(many, metadata)

    def _send(
        self, request: pb.GenerateRequest, timeout: float | ClientDefault | None, metadata: Metadata
    ) -> StreamT:
        self._open()
        return self._stream(self._exchange(request, call_timeout_s(timeout, self._timeout_s)), metadata)

    def _exchange(self, request: pb.GenerateRequest, timeout_s: float | None) -> Exchange:
        return Exchange(request, timeout_s=timeout_s, retries=self._retries, address=self.address)

    def _open(self) -> None:
        """Made on first use, for an asyncio channel belongs to the loop that runs then."""
        with self._lock:
            if self._closed:
                raise closed_error()
            if self._channel is None:
                self._channel = self._make_channel()
                self._inference = inference_pb2_grpc.InferenceServiceStub(self._channel)
                self._health = health_pb2_grpc.HealthStub(self._channel)

    def _call(self, method: str, request: Any, timeout_s: float | None, metadata: Metadata = ()) -> Any:
        """Start an RPC; `request` is a message or, for Session, what iterates over messages."""
        self._open()
        return getattr(self._inference, method)(
            request, timeout=timeout_s, metadata=join_metadata(self._metadata, metadata)
        )

    def _starter(self, metadata: Metadata) -> Callable[[Exchange], Any]:
        """Starts an attempt of one request: a call of its own, or, beside others, a part of a session."""

        def start(exchange: Exchange) -> Any:
            sent = tuple(join_metadata(self._metadata, (*metadata, *exchange.trace_metadata)))
            with self._lock:
                self._open()
                self._calls = [call for call in self._calls if not self._is_over(call)]
                if self._calls or (self._shared and self._shared.num_live):
                    call = self._share(exchange, sent)
                    if call is not None:
                        return call
                exchange.request.ClearField("timeout_ms")
                call = self._inference.Generate(
                    exchange.request, timeout=exchange.remaining_s(), metadata=sent
                )
                self._calls.append(call)
                return call

        return start

    def _share(self, exchange: Exchange, metadata: tuple[tuple[str, str], ...]) -> Any:
        """Start a request on the shared session; None if it needs a call of its own: its metadata is another, or a
        session is lost as soon as it is opened, and the call will say why."""
        traces = [value for key, value in metadata if key == TRACEPARENT_KEY]
        rest = tuple(pair for pair in metadata if pair[0] != TRACEPARENT_KEY)
        request, timeout_s = exchange.request, exchange.remaining_s()
        if traces:
            request.traceparent = traces[-1]
        request.timeout_ms = 0 if timeout_s is None else min(MAX_TIMEOUT_MS, 1 + int(timeout_s * 1e3))
        for _ in range(2):  # one that has hung up, and a new one
            if self._shared is None:
                self._shared = self._open_shared(
                    lambda requests: self._inference.Session(requests, metadata=rest), rest
                )
            if self._shared.num_live and self._shared.metadata != rest:
                return None
            call = self._shared_call(self._shared, exchange.request_id, timeout_s)
            if self._shared.metadata == rest and self._shared.start(request, call.inbox):
                return call
            self._shared = None
        return None

    def _opener(self, many: Many, metadata: Metadata) -> Callable[[Any], Any]:
        """Starts a session for many."""
        return lambda requests: self._call("Session", requests, many.remaining_s(), metadata)

    @abstractmethod
    def _is_over(self, call: Any) -> bool:
        """Whether a Generate call has its status."""

    @abstractmethod
    def _open_shared(
        self, open_session: Callable[[Any], Any], metadata: tuple[tuple[str, str], ...]
    ) -> SharedSession:
        """Start the session of concurrent calls, and what reads it."""

    @abstractmethod
    def _shared_call(self, session: SharedSession, request_id: str, timeout_s: float | None) -> Any:
        """A request on it, with the face of a Generate call."""

    @abstractmethod
    def _make_channel(self) -> Any:
        """A channel to the address."""

    @abstractmethod
    def _stream(self, exchange: Exchange, metadata: Metadata) -> StreamT:
        """Send one request."""

    @abstractmethod
    def _send_many(self, many: Many, metadata: Metadata) -> ManyT:
        """Send many requests over one session."""
