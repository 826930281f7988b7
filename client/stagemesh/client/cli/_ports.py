"""Ports of this machine."""

from __future__ import annotations

import errno
import socket
from collections.abc import Collection

from stagemesh.wire.address import split_address
from stagemesh.wire.errors import ConfigError, StartupError


def check_free(address: str, *, key: str) -> None:
    """Raise a StartupError naming port and flag if something listens there already."""
    host, port = split_address(address, key=key)
    try:
        _bind(host, port).close()
    except OSError as error:
        if error.errno == errno.EADDRINUSE:
            raise StartupError(
                f"{key}: port {port} on {host} is in use; stop what listens there or give another {key}"
            ) from error
        raise ConfigError(f"{key}: cannot listen on {address}: {error.strerror or error}") from error


def resolve_port(address: str, *, key: str, taken: Collection[str] = ()) -> str:
    """The address with a free port in place of port 0; never one of those in `taken`."""
    host, port = split_address(address, key=key)
    if port != 0:
        return address
    while True:
        with _bind(host, 0) as listener:
            free = listener.getsockname()[1]
        found = f"[{host}]:{free}" if ":" in host else f"{host}:{free}"
        if found not in taken:
            return found


def _bind(host: str, port: int) -> socket.socket:
    family, kind, protocol, _, target = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
    listener = socket.socket(family, kind, protocol)
    try:
        # Connections of a mesh that just stopped linger for a minute; they do not count, a listener does.
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind(target)
    except BaseException:
        listener.close()
        raise
    return listener
