"""Everything about one peer: its route, what answers there, its clock, and how fast the way is."""

from __future__ import annotations

from typing import Any

import grpc
from grpc_health.v1 import health_pb2, health_pb2_grpc

from stagemesh.client._channel import CHANNEL_OPTIONS, call_error
from stagemesh.client.doctor.echo import Latency, measure_bandwidth, measure_latency
from stagemesh.client.doctor.echo_server import DEFAULT_PORT
from stagemesh.client.doctor.finding import Finding, Level
from stagemesh.client.doctor.route import check_route, find_route
from stagemesh.v1 import doctor_pb2 as pb
from stagemesh.v1 import doctor_pb2_grpc
from stagemesh.wire.address import split_address
from stagemesh.wire.errors import ConfigError, StagemeshError, UnimplementedError
from stagemesh.wire.protocol import MAJOR, MINOR, compatible

_TIMEOUT_S = 5.0
_SLOW_TRIP_MS = 2.0
_SLOW_MB_PER_S = 100.0
_LARGE_OFFSET_MS = 50.0


def check_peer(peer: str, *, seconds: float) -> list[Finding]:
    """What there is to say of HOST or HOST:PORT; bandwidth takes `seconds` each way at most."""
    try:
        address = peer_address(peer)
        host, port = split_address(address, key="--peers")
        route = find_route(host, port)
    except (ConfigError, OSError) as error:
        todo = "check the name and this node's resolver and routes"
        return [Finding(check=f"{peer} route", level=Level.FAIL, found=str(error), todo=todo)]
    findings = [check_route(peer, route)]
    with grpc.insecure_channel(address, CHANNEL_OPTIONS) as channel:
        try:
            findings += _echoes(peer, doctor_pb2_grpc.DoctorServiceStub(channel), seconds)
        except grpc.RpcError as error:
            findings.append(_no_echo(peer, address, channel, call_error(error, address=address)))
    return findings


def peer_address(peer: str) -> str:
    """HOST:PORT of a peer that may be a host alone."""
    if ":" not in peer or peer.endswith("]"):
        peer = f"{peer}:{DEFAULT_PORT}"
    split_address(peer, key="--peers")
    return peer


def _echoes(peer: str, stub: Any, seconds: float) -> list[Finding]:
    about: pb.EchoResponse = stub.Echo(pb.EchoRequest(), timeout=_TIMEOUT_S)
    findings = [_version(peer, about)]
    latency = measure_latency(stub)
    findings += [_latency(peer, latency), _clock(peer, latency)]
    if seconds > 0:
        findings.append(_bandwidth(peer, *measure_bandwidth(stub, seconds)))
    return findings


def _version(peer: str, about: pb.EchoResponse) -> Finding:
    protocol = f"{about.protocol_major}.{about.protocol_minor}"
    found = f"{about.host_name}, stagemesh {about.version}, protocol {protocol} (here {MAJOR}.{MINOR})"
    values = {"host": about.host_name, "version": about.version, "protocol": protocol}
    if compatible(about.protocol_major, about.protocol_minor):
        return Finding(check=f"{peer} version", level=Level.OK, found=found, values=values)
    todo = "install versions of stagemesh on both whose protocols are one minor version apart at most"
    return Finding(check=f"{peer} version", level=Level.FAIL, found=found, todo=todo, values=values)


def _latency(peer: str, latency: Latency) -> Finding:
    found = f"round trip {latency.median_ms:.2f} ms median, {latency.p99_ms:.2f} ms p99 (gRPC, small message)"
    values = {"median_ms": round(latency.median_ms, 4), "p99_ms": round(latency.p99_ms, 4)}
    if latency.median_ms <= _SLOW_TRIP_MS:
        return Finding(check=f"{peer} latency", level=Level.OK, found=found, values=values)
    todo = "every token takes this way once a stage: put neighbouring stages nearer to each other"
    return Finding(check=f"{peer} latency", level=Level.WARN, found=found, todo=todo, values=values)


def _clock(peer: str, latency: Latency) -> Finding:
    offset, error = latency.offset_ms, latency.offset_error_ms
    found = f"{offset:+.2f} ms from ours, ± {error:.2f} ms"
    values = {"offset_ms": round(offset, 4), "error_ms": round(error, 4)}
    if abs(offset) - error <= _LARGE_OFFSET_MS:
        return Finding(check=f"{peer} clock", level=Level.OK, found=found, values=values)
    todo = "run chrony or systemd-timesyncd on both: traces and logs of the nodes do not line up"
    return Finding(check=f"{peer} clock", level=Level.WARN, found=found, todo=todo, values=values)


def _bandwidth(peer: str, there: float, back: float) -> Finding:
    found = f"{there:.0f} MB/s there, {back:.0f} MB/s back (gRPC, 1 MiB messages, 4 at once)"
    values = {"there_mb_per_s": round(there, 1), "back_mb_per_s": round(back, 1)}
    if min(there, back) >= _SLOW_MB_PER_S:
        return Finding(check=f"{peer} bandwidth", level=Level.OK, found=found, values=values)
    todo = "a prompt's activations take this way: check the interface above, its speed and its MTU"
    return Finding(check=f"{peer} bandwidth", level=Level.WARN, found=found, todo=todo, values=values)


def _no_echo(peer: str, address: str, channel: grpc.Channel, error: StagemeshError) -> Finding:
    """Nothing answers, or something that is no doctor: then the way is at least open."""
    port = address.rpartition(":")[2]
    serve = f"run `stagemesh doctor --serve --listen 0.0.0.0:{port} --insecure` there"
    if not isinstance(error, UnimplementedError):
        todo = f"{serve}; if it runs, open port {port} in the firewalls between"
        return Finding(check=f"{peer} answer", level=Level.FAIL, found=str(error), todo=todo)
    try:
        health_pb2_grpc.HealthStub(channel).Check(health_pb2.HealthCheckRequest(), timeout=_TIMEOUT_S)
        what = "a router or a stage answers"
    except grpc.RpcError:
        what = "a gRPC server answers that has no health service"
    todo = f"{serve.replace(port, str(DEFAULT_PORT))} for its clock and bandwidth"
    return Finding(check=f"{peer} answer", level=Level.WARN, found=f"{address}: {what}, no doctor", todo=todo)
