"""Traces and metrics of router, stages and client, through OpenTelemetry.

Nothing here runs unless it is configured: without an OTLP endpoint there are no spans, without `--metrics`
there is no endpoint, and nobody holds an object of the SDK. Names are in `names`, all of them.
"""
