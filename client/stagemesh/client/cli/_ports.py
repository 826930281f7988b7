"""Ports of this machine."""

from __future__ import annotations

import errno
import socket

from stagemesh.client._closing import Closing
from stagemesh.wire.address import split_address
from stagemesh.wire.errors import ConfigError, StartupError


class Ports(Closing):
    """The ports of a mesh, found free and kept for its servers until `close`.

    Each is bound here and never listened on. The servers bind it too, as SO_REUSEADDR allows while nobody listens; but
    the kernel gives it to none that asks for any free port: no other mesh that starts now, no outgoing connection.
    """

    def __init__(self) -> None:
        self._held: list[socket.socket] = []
        self._taken: set[str] = set()

    def take(self, address: str, *, key: str) -> str:
        """The address, with a free port in place of port 0.

        Raises:
            StartupError: Something listens there; names port and flag.
            ConfigError: It is given twice, or is not this machine's.
        """
        host, port = split_address(address, key=key)
        try:
            listener = _bind(host, port)
        except OSError as error:
            if error.errno == errno.EADDRINUSE:
                raise StartupError(
                    f"{key}: port {port} on {host} is in use; stop what listens there or give another {key}"
                ) from error
            raise ConfigError(f"{key}: cannot listen on {address}: {error.strerror or error}") from error
        self._held.append(listener)
        port = listener.getsockname()[1]
        found = f"[{host}]:{port}" if ":" in host else f"{host}:{port}"
        if found in self._taken:
            raise ConfigError(f"{key}: {found} is given to two servers of this mesh")
        self._taken.add(found)
        return found

    def close(self) -> None:
        """Keep them no longer. Idempotent."""
        for listener in self._held:
            listener.close()
        self._held.clear()


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
