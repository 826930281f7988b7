"""The connection: channel options, call metadata, and failed calls as errors of the tree."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from typing import Any

import grpc

from stagemesh.wire.errors import (
    FailedPreconditionError,
    InvalidArgumentError,
    StagemeshError,
    UnavailableError,
    UnimplementedError,
)
from stagemesh.wire.status import from_rpc_error

INFERENCE_SERVICE = "stagemesh.v1.InferenceService"
REQUEST_ID_KEY = "stagemesh-request-id"
_DETAILS_KEY = "grpc-status-details-bin"
_KEY = re.compile(r"[0-9a-z_.-]+")
_TEXT = re.compile(r"[ -~]*")

Metadata = Sequence[tuple[str, str]]
"""Keys (lower case) and values sent with a call, such as ("traceparent", "00-...")."""
MetadataSource = Metadata | Callable[[], Metadata]
"""Metadata of every call, or a function that makes it for each; the place where a tracer comes in."""

CHANNEL_OPTIONS: tuple[tuple[str, int], ...] = (
    # A router that vanished without a word (power, network) is noticed in 40 s, while calls run. The server
    # must allow such pings: grpc.http2.min_recv_ping_interval_without_data_ms of at most 20,000.
    ("grpc.keepalive_time_ms", 30_000),
    ("grpc.keepalive_timeout_ms", 10_000),
    # The timeout of a ping is another one, of 60 s; and after two pings with nothing sent in between, as of a
    # stream that only receives, there would be one a minute.
    ("grpc.http2.ping_timeout_ms", 10_000),
    ("grpc.http2.max_pings_without_data", 0),
    ("grpc.keepalive_permit_without_calls", 0),
    # gRPC's own back-off goes up to two minutes: too long for a router that restarts in seconds.
    ("grpc.initial_reconnect_backoff_ms", 100),
    ("grpc.min_reconnect_backoff_ms", 2_000),
    ("grpc.max_reconnect_backoff_ms", 2_000),
    # A client is one connection; without this, clients of one process share it, and its back-off.
    ("grpc.use_local_subchannel_pool", 1),
    ("grpc.max_receive_message_length", -1),
    ("grpc.max_send_message_length", -1),
    # grpc.enable_retries stays on: with no service config it repeats only calls that no server has seen.
)


def join_metadata(source: MetadataSource, extra: Metadata) -> Metadata:
    """The client's metadata, then the call's. InvalidArgumentError names a pair that gRPC cannot send."""
    joined = (*(source() if callable(source) else source), *extra)
    for key, value in joined:
        if not (_KEY.fullmatch(key) and _can_be_sent(key, value)):
            raise InvalidArgumentError(
                f"metadata: {key!r:.80} with {value!r:.80} does not fit: expected a key of lower-case letters, "
                "digits, '-', '_' and '.', and printable ASCII, or bytes where the key ends with -bin",
                reason="INVALID_VALUE",
                field="metadata",
            )
    return joined


def call_error(
    error: grpc.RpcError | StagemeshError, *, address: str, request_id: str = ""
) -> StagemeshError:
    """The error behind a failed call. Where nothing answered, it names the address."""
    if isinstance(error, StagemeshError):
        return error
    mapped = from_rpc_error(error, request_id)
    # Without details no router said it: the words are gRPC's own, long, and the cause comes last.
    trailers: Any = error.trailing_metadata() or ()
    said = any(key == _DETAILS_KEY for key, _ in trailers)
    if isinstance(mapped, UnavailableError) and not said:
        cause = mapped.message.rpartition(": ")[2] or "no answer"
        return UnavailableError(f"no connection to {address}: {cause}", request_id=request_id)
    if isinstance(mapped, UnimplementedError) and not said:
        return UnimplementedError(
            f"the gRPC server at {address} does not have this call; is it the right address?",
            request_id=request_id,
        )
    return mapped


def _can_be_sent(key: str, value: Any) -> bool:
    if key.endswith("-bin"):
        return isinstance(value, bytes)
    return isinstance(value, str) and _TEXT.fullmatch(value) is not None


def closed_error() -> StagemeshError:
    """A call on a client that was closed."""
    return FailedPreconditionError("the client is closed; make a new one", reason="CLIENT_CLOSED")
