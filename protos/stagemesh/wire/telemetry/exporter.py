"""Spans on their way to the OTLP receiver: gathered and sent by a thread of its own.

Whatever the receiver does, the process that makes the spans does not wait: sources keep a bounded number, and what
does not fit is dropped and counted. So is what a bug in an export loses.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Mapping

from opentelemetry.proto.common.v1.common_pb2 import AnyValue, InstrumentationScope, KeyValue
from opentelemetry.proto.resource.v1.resource_pb2 import Resource as ResourceMessage
from opentelemetry.proto.trace.v1.trace_pb2 import ResourceSpans, ScopeSpans

from stagemesh.wire.telemetry.buffer import Chunk, merge
from stagemesh.wire.telemetry.names import SCOPE
from stagemesh.wire.telemetry.resource import make_resource
from stagemesh.wire.telemetry.senders import make_sender
from stagemesh.wire.telemetry.settings import TraceSettings
from stagemesh.wire.telemetry.span_columns import varint

log = logging.getLogger(__name__)

CLOSE_TIMEOUT_S = 2.0
"""What a receiver that does not answer may cost the end of a process."""

Source = Callable[[], list[Chunk]]
"""Gives away the spans it has gathered; called in the exporter's thread."""


class SpanExporter:
    """Sends what its sources have gathered: every `delay_s`, and when a buffer of theirs is half full.

    Args:
        settings: Where to, and how often.
        attributes: Of the resource, beside those of OTEL_RESOURCE_ATTRIBUTES, which win.
    """

    def __init__(self, settings: TraceSettings, attributes: Mapping[str, str]) -> None:
        self.settings = settings
        self.num_exported = 0
        self.num_dropped = 0
        self._sender = make_sender(settings.protocol)
        resource = ResourceMessage(
            attributes=[
                KeyValue(key=key, value=AnyValue(string_value=str(value)))
                for key, value in make_resource(attributes).attributes.items()
            ]
        )
        self._resource = ResourceSpans(resource=resource).SerializeToString()
        self._scope = ScopeSpans(scope=InstrumentationScope(name=SCOPE)).SerializeToString()
        self._sources: list[Source] = []
        self._wake = threading.Event()
        self._closing = False
        self._said_overtaken = False
        self._lock = threading.Lock()
        self._thread = threading.Thread(target=self._run, name="otlp", daemon=True)
        self._thread.start()

    def register(self, source: Source) -> None:
        """Ask `source` for spans at every export from now on."""
        self._sources.append(source)

    def announce(self) -> None:
        """Say where they go in the log."""
        log.info("traces to %s every %g s", self.settings.endpoint, self.settings.delay_s)

    def wake(self) -> None:
        """Send what there is soon: a buffer is half full."""
        self._wake.set()

    def overtaken(self) -> None:
        """A buffer drops spans: said once, however many they are."""
        if not self._said_overtaken:
            self._said_overtaken = True
            log.warning(
                "spans are dropped: they come faster than they are sent to %s; "
                "is it slow, or OTEL_BSP_MAX_QUEUE_SIZE=%d too small?",
                self.settings.endpoint,
                self.settings.max_queued,
            )

    def close(self) -> None:
        """Send what there is, for CLOSE_TIMEOUT_S at most."""
        self._closing = True
        self._wake.set()
        self._thread.join(CLOSE_TIMEOUT_S)
        if self._thread.is_alive():
            log.warning(
                "the OTLP receiver %s does not answer; its last spans are lost", self.settings.endpoint
            )
        self._sender.shutdown()

    def flush(self) -> None:
        """Send what there is now, in this thread."""
        with self._lock:
            chunks = [chunk for source in self._sources for chunk in self._gather(source)]
            # An export costs a millisecond of CPU however little is in it.
            for data, count in merge(chunks, self.settings.max_batch):
                self._send(data, count)

    def _run(self) -> None:
        while not self._closing:
            self._wake.wait(self.settings.delay_s)
            # Before the export: a buffer that becomes half full during it wants another one.
            self._wake.clear()
            try:
                self.flush()
            except Exception:
                # The thread must live: a bug between source and sender may not end tracing, let alone serving. As of a source.
                self.num_dropped += 1
                log.exception("spans could not be exported")

    def _gather(self, source: Source) -> list[Chunk]:
        try:
            return source()
        except Exception:
            # What it had taken is lost, and how many spans would have come of it is unknown: the counter must move, for
            # that is what alerts look at. The spans of other sources are sent.
            self.num_dropped += 1
            log.exception("spans could not be made")
            return []

    def _send(self, data: bytes, count: int) -> None:
        # Fields of a message may stand in any order and piece by piece, so the spans need no second encoding.
        scope_spans = _head(2, len(self._scope) + len(data))
        inner = len(self._resource) + len(scope_spans) + len(self._scope) + len(data)
        request = b"".join((_head(1, inner), self._resource, scope_spans, self._scope, data))
        taken = False
        try:
            taken = self._sender.send(request)
        except Exception:
            # A bug, not a refusal: those the sender answers for. The batches behind this one are sent all the same.
            log.exception("%d spans could not be exported", count)
        if taken:
            self.num_exported += count
        else:
            self.num_dropped += count


def _head(number: int, size: int) -> bytes:
    """What stands before a field that is a message of that size."""
    return bytes([number << 3 | 2]) + varint(size)
