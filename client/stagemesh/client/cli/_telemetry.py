"""Traces of the command itself: its requests' client spans, exported as the OTEL_* variables say."""

from __future__ import annotations

import logging
import os
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.metadata import version

from stagemesh.wire.logs import StderrHandler
from stagemesh.wire.telemetry.settings import TraceSettings
from stagemesh.wire.telemetry.variables import GRPC

SERVICE_NAME = "stagemesh-client"
FLUSH_TIMEOUT_S = 2.0
"""What a receiver that does not answer may cost at the end of the command."""


@contextmanager
def client_tracing(*, always: bool = False) -> Iterator[None]:
    """Spans go to the receiver that the OTEL_* variables name, or nowhere.

    Args:
        always: Sample every request, whatever OTEL_TRACES_SAMPLER says.

    Raises:
        ConfigError: A variable that cannot be used.
    """
    settings = TraceSettings.read(os.environ)
    if settings is None:
        yield
        return
    try:
        from opentelemetry import trace
        from opentelemetry.sdk.trace import TracerProvider
        from opentelemetry.sdk.trace.export import BatchSpanProcessor
        from opentelemetry.sdk.trace.sampling import ALWAYS_ON

        from stagemesh.wire.telemetry.resource import make_resource, service_attributes

        if settings.protocol == GRPC:
            from opentelemetry.exporter.otlp.proto.grpc.trace_exporter import OTLPSpanExporter
        else:
            from opentelemetry.exporter.otlp.proto.http.trace_exporter import (  # type: ignore[assignment]
                OTLPSpanExporter,
            )
    except ModuleNotFoundError as error:
        print(
            f"no traces: OTEL_EXPORTER_OTLP_* is set, and '{error.name}' is not installed: "
            "pip install 'stagemesh[telemetry]'",
            file=sys.stderr,
        )
        yield
        return
    # The thread at the end may outlive the command.
    logging.lastResort = StderrHandler(logging.WARNING)
    attributes = service_attributes(SERVICE_NAME, version=version("stagemesh"), instance=str(os.getpid()))
    provider = TracerProvider(
        sampler=ALWAYS_ON if always else None,
        resource=make_resource(attributes),
        shutdown_on_exit=False,
    )
    provider.add_span_processor(BatchSpanProcessor(OTLPSpanExporter()))
    trace.set_tracer_provider(provider)
    try:
        yield
    finally:
        # The SDK's own shutdown retries for as long as the exporter's timeout, and a command must end.
        closing = threading.Thread(target=provider.shutdown, daemon=True)
        closing.start()
        closing.join(FLUSH_TIMEOUT_S)
