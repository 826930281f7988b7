"""The other end of the measurements: `stagemesh doctor --serve`."""

from __future__ import annotations

import socket
import time
from concurrent import futures
from importlib import metadata
from typing import Any

import grpc

from stagemesh.v1 import doctor_pb2 as pb
from stagemesh.v1 import doctor_pb2_grpc
from stagemesh.wire.address import check_listen, split_address
from stagemesh.wire.errors import ConfigError, InvalidArgumentError
from stagemesh.wire.protocol import MAJOR, MINOR
from stagemesh.wire.status import to_grpc

DEFAULT_PORT = 50060
MAX_PAYLOAD_BYTES = 4 << 20
_MAX_MESSAGE_BYTES = MAX_PAYLOAD_BYTES + 4096
OPTIONS = (
    ("grpc.so_reuseport", 0),
    ("grpc.max_receive_message_length", _MAX_MESSAGE_BYTES),
    ("grpc.max_send_message_length", _MAX_MESSAGE_BYTES),
)
_THREADS = 4
_GRACE_S = 1.0


class EchoServer:
    """Answers Echo until it is closed; use it in a with-block.

    Args:
        address: HOST:PORT; port 0 takes a free one.
        insecure: Whether an address beyond loopback is meant.
    """

    def __init__(self, address: str, *, insecure: bool = False) -> None:
        check_listen(address, insecure=insecure, key="--listen")
        host, _ = split_address(address, key="--listen")
        self._server = grpc.server(futures.ThreadPoolExecutor(_THREADS), options=OPTIONS)
        doctor_pb2_grpc.add_DoctorServiceServicer_to_server(_Doctor(), self._server)
        try:
            port = self._server.add_insecure_port(address)
        except RuntimeError as error:
            raise ConfigError(
                f"--listen: cannot listen on {address}: the port is in use or the address is not this machine's; "
                "choose another, or stop what listens there"
            ) from error
        self.address = f"[{host}]:{port}" if ":" in host else f"{host}:{port}"

    def wait(self, seconds: float) -> None:
        """Serve for so long; an interrupt ends it sooner."""
        self._server.wait_for_termination(seconds)

    def __enter__(self) -> EchoServer:
        self._server.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._server.stop(_GRACE_S).wait()


class _Doctor(doctor_pb2_grpc.DoctorServiceServicer):
    def Echo(self, request: pb.EchoRequest, context: Any) -> pb.EchoResponse:
        received_unix_ns = time.time_ns()
        if request.reply_bytes > MAX_PAYLOAD_BYTES:
            error = InvalidArgumentError(
                f"reply_bytes: {request.reply_bytes} is above {MAX_PAYLOAD_BYTES}",
                reason="BAD_FIELD",
                field="reply_bytes",
            )
            context.abort_with_status(to_grpc(error))
        response = pb.EchoResponse(
            received_unix_ns=received_unix_ns,
            host_name=socket.gethostname(),
            version=metadata.version("stagemesh"),
            protocol_major=MAJOR,
            protocol_minor=MINOR,
            payload=bytes(request.reply_bytes),
        )
        response.sent_unix_ns = time.time_ns()
        return response
