"""The public side of the router: requests checked and tokenized, and their streams."""

from __future__ import annotations

import logging
import math
import time
from dataclasses import replace

from stagemesh.router.api.backend import Backend, Column, End
from stagemesh.router.api.checking import check
from stagemesh.router.api.served_model import ServedModel
from stagemesh.router.api.stream import Reader, RequestStream
from stagemesh.router.scheduler import Finish, Request
from stagemesh.router.tracing.server_spans import ServerSpans
from stagemesh.v1 import inference_pb2
from stagemesh.wire.errors import InternalError, StagemeshError

log = logging.getLogger(__name__)


class Streams:
    """Every stream of one public side; an Outlet for what the scheduler's side has for them.

    Args:
        model: That is served.
        spans: Of the sampled requests; None where tracing is off.
    """

    def __init__(self, model: ServedModel, spans: ServerSpans | None = None) -> None:
        self.model = model
        self.spans = spans
        self.backend: Backend
        """Set before the first request."""
        self._last_handle = 0
        self._live: dict[int, RequestStream] = {}

    def __len__(self) -> int:
        """Streams that have not ended."""
        return len(self._live)

    def start(self, message: inference_pb2.GenerateRequest, deadline: float, reader: Reader) -> RequestStream:
        """Check a request and submit it. What the scheduler's side refuses ends the stream.

        Args:
            message: The request.
            deadline: Of its call, monotonic seconds; its own timeout may be shorter.
            reader: Told when the stream has something.

        Raises:
            StagemeshError: It is refused; the error has its id.
        """
        arrived = time.monotonic()
        if message.timeout_ms:
            deadline = min(deadline, arrived + message.timeout_ms / 1e3)
        trace = self.spans.begin(message) if self.spans else None
        try:
            request = _checked(message, self.model)
        except StagemeshError as error:
            error.request_id = error.request_id or message.request_id
            self.backend.refused(error.code.name)
            if trace and self.spans:
                self.spans.refuse(trace, error)
            raise
        if trace or deadline < math.inf:
            request = replace(request, deadline=deadline, trace=trace.context if trace else b"")
        stream = RequestStream(self._new_handle(), request, self.model.tokenizer, reader, arrived)
        stream.trace = trace
        self._live[stream.handle] = stream
        self.backend.submit(stream.handle, request, arrived)
        return stream

    def abandon(self, stream: RequestStream) -> None:
        """Its reader went away."""
        if self._live.pop(stream.handle, None):
            self.backend.abandon(stream.handle)
            stream.end(Finish.ABORT, 0)
            self._end_span(stream)

    def take(self, handles: Column, token_ids: Column, ends: list[End]) -> None:
        """New tokens for some streams, and the end of some. This is the per-token path: one turn of this loop
        and one of the reader's is all that a token costs here."""
        live = self._live
        for handle, token_id in zip(handles.tolist(), token_ids.tolist(), strict=True):
            stream = live.get(handle)
            if stream is None:  # abandoned; this was on its way
                continue
            pending = stream.pending
            pending.append(token_id)
            if len(pending) == 1:
                stream.reader.note(stream)
        for end in ends:
            if stream := live.pop(end.handle, None):
                stream.end(end.finish, end.num_cached)
                self._end_span(stream)

    def fail(self, handle: int, error: StagemeshError) -> None:
        """A stream ends with an error."""
        if stream := self._live.pop(handle, None):
            stream.fail(error)
            self._end_span(stream)

    def _new_handle(self) -> int:
        """They are 32 bits on the way to the scheduler's side."""
        while True:
            self._last_handle = (self._last_handle + 1) & 0xFFFFFFFF
            if self._last_handle not in self._live:
                return self._last_handle

    def _end_span(self, stream: RequestStream) -> None:
        if stream.trace and self.spans:
            self.spans.end(stream.trace, stream)


def _checked(message: inference_pb2.GenerateRequest, model: ServedModel) -> Request:
    """`check`, where a bug is the end of this request and of no other of its session."""
    try:
        return check(message, model)
    except StagemeshError:
        raise
    except Exception as error:
        log.exception("bug in the check of request %r", message.request_id)
        raise InternalError(
            f"bug in the check of the request: {type(error).__name__}: {error}", reason="BUG"
        ) from error
