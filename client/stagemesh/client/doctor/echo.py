"""Latency, clock offset and bandwidth to a peer that runs `stagemesh doctor --serve`; bounded in time and bytes."""

from __future__ import annotations

import statistics
import time
from collections import deque
from dataclasses import dataclass
from typing import Any

from stagemesh.client.doctor.echo_server import MAX_PAYLOAD_BYTES
from stagemesh.v1 import doctor_pb2 as pb

_ROUNDS = 32
_CALL_TIMEOUT_S = 5.0
_CHUNK_BYTES = 1 << 20
_MAX_CHUNKS = 256
_AT_ONCE = 4
assert _CHUNK_BYTES <= MAX_PAYLOAD_BYTES


@dataclass(frozen=True, slots=True, kw_only=True)
class Latency:
    """Of small messages there and back, over one connection."""

    median_ms: float
    p99_ms: float
    offset_ms: float
    """The peer's wall clock less ours."""
    offset_error_ms: float
    """At most so far off: half of the quickest round trip, less the peer's time in it."""


def measure_latency(stub: Any) -> Latency:
    """From 32 round trips; grpc.RpcError if one fails."""
    stub.Echo(pb.EchoRequest(), timeout=_CALL_TIMEOUT_S)  # connects
    trips_ns, samples = [], []
    for _ in range(_ROUNDS):
        begin_ns, begin_unix_ns = time.perf_counter_ns(), time.time_ns()
        response = stub.Echo(pb.EchoRequest(), timeout=_CALL_TIMEOUT_S)
        trip_ns = time.perf_counter_ns() - begin_ns
        trips_ns.append(trip_ns)
        samples.append(clock_sample(begin_unix_ns, trip_ns, response.received_unix_ns, response.sent_unix_ns))
    error_ns, offset_ns = min(samples)
    return Latency(
        median_ms=statistics.median(trips_ns) / 1e6,
        p99_ms=sorted(trips_ns)[round(0.99 * (len(trips_ns) - 1))] / 1e6,
        offset_ms=offset_ns / 1e6,
        offset_error_ms=error_ns / 1e6,
    )


def clock_sample(
    begin_unix_ns: int, trip_ns: int, received_unix_ns: int, sent_unix_ns: int
) -> tuple[float, float]:
    """(error, offset) of one round trip, as NTP has it: the peer's clock less ours, and how far off at most.

    Args:
        begin_unix_ns: Our wall clock when the request left.
        trip_ns: Until the answer was here.
        received_unix_ns: The peer's wall clock when the request was there.
        sent_unix_ns: The peer's wall clock when the answer left.
    """
    away_ns = max(0, trip_ns - (sent_unix_ns - received_unix_ns))
    middle_ns = begin_unix_ns + trip_ns / 2
    return away_ns / 2, (received_unix_ns + sent_unix_ns) / 2 - middle_ns


def measure_bandwidth(stub: Any, seconds: float) -> tuple[float, float]:
    """Megabytes a second to the peer and from it, each over so many seconds at most, 4 calls at once."""
    upload = pb.EchoRequest(payload=bytes(_CHUNK_BYTES))
    download = pb.EchoRequest(reply_bytes=_CHUNK_BYTES)
    return _rate(stub, upload, seconds), _rate(stub, download, seconds)


def _rate(stub: Any, request: pb.EchoRequest, seconds: float) -> float:
    begin = time.perf_counter()
    waiting: deque[Any] = deque()
    num_sent = num_done = 0
    while True:
        while len(waiting) < _AT_ONCE and num_sent < _MAX_CHUNKS and time.perf_counter() - begin < seconds:
            waiting.append(stub.Echo.future(request, timeout=seconds + _CALL_TIMEOUT_S))
            num_sent += 1
        if not waiting:
            return num_done * _CHUNK_BYTES / 1e6 / (time.perf_counter() - begin)
        waiting.popleft().result()
        num_done += 1
