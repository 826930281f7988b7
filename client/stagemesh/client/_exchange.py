"""What is known of one request, without I/O: its id, deadline and retries. Every stream drives one, or many."""

from __future__ import annotations

import random
import time
import uuid
from collections.abc import Callable, Iterable

from stagemesh.client._channel import REQUEST_ID_KEY, Metadata
from stagemesh.client._chunks import to_chunk
from stagemesh.client._tracing import start_span
from stagemesh.client._types import Chunk
from stagemesh.v1 import inference_pb2 as pb
from stagemesh.wire.errors import ResourceExhaustedError, StagemeshError, UnavailableError
from stagemesh.wire.telemetry.context import TRACEPARENT_KEY

_FIRST_DELAY_S = 0.2
_MAX_DELAY_S = 5.0


class Exchange:
    """One request through its attempts.

    Args:
        request: What to send. Without an id it gets one here and not from the router, so that even a request
            the router never saw has a name; a new one each attempt, for the router may still hold the last.
        timeout_s: Seconds for all attempts together; None is for ever.
        retries: Attempts after the first, made only while no message has come.
        address: Of the router, for errors.
        clock: Seconds, monotonic.
    """

    def __init__(
        self,
        request: pb.GenerateRequest,
        *,
        timeout_s: float | None,
        retries: int,
        address: str,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.request = request
        self.address = address
        self._own_id = not request.request_id
        self._name()
        self._clock = clock
        self._deadline = None if timeout_s is None else clock() + timeout_s
        self._retries = retries
        self._attempt = 0
        self._started = False
        self._span = start_span(request, address)

    def remaining_s(self) -> float | None:
        """Seconds to the deadline, for the next attempt."""
        return None if self._deadline is None else max(0.0, self._deadline - self._clock())

    def accept(
        self, response: pb.GenerateResponse, initial_metadata: Iterable[tuple[str, str]] | None
    ) -> Chunk:
        """A message came. The router's word on the id is the last: initial metadata, then the message."""
        if not self._started:
            self._started = True
            for key, value in initial_metadata or ():
                if key == REQUEST_ID_KEY and value:
                    self.request_id = value
        if response.request_id:
            self.request_id = response.request_id
        chunk = to_chunk(response, self.request_id)
        self.took(chunk)
        return chunk

    def took(self, chunk: Chunk) -> None:
        """A chunk goes to the application; one with a finish reason is the last."""
        if self._span:
            self._span.took(chunk)
            if chunk.finish_reason is not None:
                self._span.end(self.request_id, chunk.error)

    def closed(self) -> None:
        """The application wants no more of it."""
        if self._span:
            self._span.end(self.request_id)

    @property
    def trace_metadata(self) -> Metadata:
        """The trace context of the request's own call, if it has one."""
        traceparent = self.request.traceparent
        return ((TRACEPARENT_KEY, traceparent),) if traceparent else ()

    def started(self) -> None:
        """Something of its answer came: from here on, nothing is repeated."""
        self._started = True

    def retry_delay_s(self, error: StagemeshError) -> float | None:
        """The attempt failed; the seconds to wait before the next one, None: that error is final."""
        delay_s = self._delay_s(error)
        if delay_s is not None:
            self._attempt += 1
            self._name()
        elif self._span:
            self._span.end(self.request_id, error)
        return delay_s

    def _name(self) -> None:
        if self._own_id:
            self.request.request_id = uuid.uuid4().hex
        self.request_id = self.request.request_id

    def _delay_s(self, error: StagemeshError) -> float | None:
        if self._started or self._attempt >= self._retries:
            return None
        # RESOURCE_EXHAUSTED without a hint is also gRPC's word for a message too large: that stays too large.
        hinted = isinstance(error, ResourceExhaustedError) and error.retry_after_s is not None
        if not hinted and not isinstance(error, UnavailableError):
            return None
        delay_s = error.retry_after_s
        if delay_s is None:
            delay_s = min(_MAX_DELAY_S, _FIRST_DELAY_S * 2**self._attempt) * random.uniform(0.5, 1.0)
        remaining_s = self.remaining_s()
        return delay_s if remaining_s is None or delay_s < remaining_s else None
