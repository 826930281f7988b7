"""Servers: options, registration with checked requests, and errors to statuses, once for every service."""

from __future__ import annotations

import logging
from collections.abc import AsyncIterator, Awaitable, Callable
from dataclasses import dataclass
from typing import Any

import grpc
import grpc.aio
from google.protobuf.descriptor import MethodDescriptor, ServiceDescriptor
from google.protobuf.message import DecodeError
from google.protobuf.message_factory import GetMessageClass
from grpc_health.v1 import health, health_pb2, health_pb2_grpc

from stagemesh.wire.address import split_address
from stagemesh.wire.errors import ConfigError, InternalError, InvalidArgumentError, StagemeshError
from stagemesh.wire.status import to_grpc

log = logging.getLogger(__name__)

MAX_MESSAGE_BYTES = 64 << 20

SERVER_OPTIONS: tuple[tuple[str, int], ...] = (
    # Otherwise two servers bind one port and neither hears of it.
    ("grpc.so_reuseport", 0),
    ("grpc.max_receive_message_length", MAX_MESSAGE_BYTES),
    ("grpc.max_send_message_length", MAX_MESSAGE_BYTES),
    # A client or router that vanished without a word is noticed in 30 s, while a call of its runs. The timeout of a
    # ping is a setting of its own, of 60 s; and after two pings with nothing sent in between there would be one in
    # five minutes.
    ("grpc.keepalive_time_ms", 20_000),
    ("grpc.keepalive_timeout_ms", 10_000),
    ("grpc.http2.ping_timeout_ms", 10_000),
    ("grpc.http2.max_pings_without_data", 0),
    ("grpc.http2.min_recv_ping_interval_without_data_ms", 5_000),
    ("grpc.http2.max_ping_strikes", 0),
)
MESH_CHANNEL_OPTIONS: tuple[tuple[str, int], ...] = (
    ("grpc.max_receive_message_length", MAX_MESSAGE_BYTES),
    ("grpc.max_send_message_length", MAX_MESSAGE_BYTES),
    ("grpc.keepalive_time_ms", 5_000),
    ("grpc.keepalive_timeout_ms", 5_000),
    ("grpc.keepalive_permit_without_calls", 1),
    ("grpc.initial_reconnect_backoff_ms", 100),
    ("grpc.min_reconnect_backoff_ms", 100),
    ("grpc.max_reconnect_backoff_ms", 1_000),
    # A channel of its own for each pair of processes: a stuck one must not be shared.
    ("grpc.use_local_subchannel_pool", 1),
)

Behaviour = Callable[..., Awaitable[Any]]


@dataclass(frozen=True, slots=True)
class _Unparsable:
    message: str


def make_server(*, share_port: bool = False) -> grpc.aio.Server:
    """An asyncio gRPC server with the options every stagemesh server has.

    Args:
        share_port: Others may listen on its port too: only for a router's own workers, on a port that
            the router holds.
    """
    return grpc.aio.server(options=(*SERVER_OPTIONS[1:], ("grpc.so_reuseport", int(share_port))))


def bind(server: grpc.aio.Server, address: str, *, key: str) -> str:
    """Listen on HOST:PORT; port 0 takes a free one. Returns the address with the port it has."""
    host, _ = split_address(address, key=key)
    try:
        port = server.add_insecure_port(address)
    except RuntimeError as error:
        raise ConfigError(
            f"{key}: cannot listen on {address}: the port is in use or the address is not this machine's; "
            "choose another, or stop what listens there"
        ) from error
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"


def add_service(
    server: grpc.aio.Server,
    service: ServiceDescriptor,
    servicer: object,
    *,
    raw: frozenset[str] = frozenset(),
) -> None:
    """Register `servicer`, whose methods are coroutines that return the response or write to the context.

    Requests that do not parse end with INVALID_ARGUMENT naming the message; a StagemeshError ends the
    call with its status; any other exception is logged and becomes INTERNAL. Methods in `raw` get and
    write serialized messages.
    """
    handlers = {
        method.name: _handler(method, getattr(servicer, method.name), method.name in raw)
        for method in service.methods
    }
    server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler(service.full_name, handlers),))


def add_health(server: grpc.aio.Server) -> health.aio.HealthServicer:
    """grpc.health.v1; liveness ("") is SERVING from the start."""
    servicer = health.aio.HealthServicer()
    health_pb2_grpc.add_HealthServicer_to_server(servicer, server)
    return servicer


def add_reflection(server: grpc.aio.Server, *services: ServiceDescriptor) -> None:
    """Server reflection for `services`, health and itself."""
    from grpc_reflection.v1alpha import reflection

    names = [service.full_name for service in services]
    health_name = health_pb2.DESCRIPTOR.services_by_name["Health"].full_name
    reflection.enable_server_reflection([*names, health_name, reflection.SERVICE_NAME], server)


def _handler(method: MethodDescriptor, behaviour: Behaviour, raw: bool) -> grpc.RpcMethodHandler:
    name = method.full_name
    deserializer = None if raw else _deserializer(method)
    serializer = None if raw else GetMessageClass(method.output_type).SerializeToString

    async def unary(request: Any, context: grpc.aio.ServicerContext) -> Any:
        try:
            return await behaviour(_parsed(request), context)
        except Exception as error:  # noqa: BLE001 - the boundary: every failure gets a status
            await _abort(context, error, name)

    async def streaming(requests: AsyncIterator[Any], context: grpc.aio.ServicerContext) -> Any:
        try:
            return await behaviour(requests if raw else _checked(requests), context)
        except Exception as error:  # noqa: BLE001 - the boundary: every failure gets a status
            await _abort(context, error, name)

    call = streaming if method.client_streaming else unary
    make = {
        (False, False): grpc.unary_unary_rpc_method_handler,
        (False, True): grpc.unary_stream_rpc_method_handler,
        (True, False): grpc.stream_unary_rpc_method_handler,
        (True, True): grpc.stream_stream_rpc_method_handler,
    }[method.client_streaming, method.server_streaming]
    return make(call, request_deserializer=deserializer, response_serializer=serializer)


def _deserializer(method: MethodDescriptor) -> Callable[[bytes], Any]:
    kind = GetMessageClass(method.input_type)
    name = method.input_type.full_name

    def deserialize(data: bytes) -> Any:
        try:
            return kind.FromString(data)
        except DecodeError:
            return _Unparsable(name)

    return deserialize


def _parsed(request: Any) -> Any:
    if isinstance(request, _Unparsable):
        raise InvalidArgumentError(
            f"the bytes sent do not parse as {request.message}; make the stub from protos/",
            reason="UNPARSABLE",
        )
    return request


async def _checked(requests: AsyncIterator[Any]) -> AsyncIterator[Any]:
    async for request in requests:
        yield _parsed(request)


async def _abort(context: grpc.aio.ServicerContext, error: Exception, method: str) -> None:
    if isinstance(error, grpc.aio.AbortError):
        raise error
    if not isinstance(error, StagemeshError):
        log.error("bug in %s", method, exc_info=error)
        error = InternalError(f"bug in {method}: {type(error).__name__}: {error}", reason="BUG")
    await context.abort_with_status(to_grpc(error))
