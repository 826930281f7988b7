"""A port that only the workers of one router can share."""

from __future__ import annotations

import socket

from stagemesh.wire.address import split_address
from stagemesh.wire.errors import ConfigError


class HeldPort:
    """The public address, proven free and held for this router's workers.

    SO_REUSEPORT lets several processes listen on one port, and the kernel deals connections to them; it also
    lets two routers share a port unawares, which is why every other server goes without it. So the router first
    binds the port *without* it, which fails if anybody has it; then it allows sharing on that very socket, and
    keeps it, bound and never listening, so that the port stays taken also while no worker lives.

    Args:
        address: HOST:PORT; port 0 takes a free one.
        key: The setting, for errors.
    """

    def __init__(self, address: str, *, key: str) -> None:
        host, port = split_address(address, key=key)
        try:
            family, kind, protocol, _, where = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
            self._socket = socket.socket(family, kind, protocol)
            # As listening servers do: connections of a router before this one may linger in TIME_WAIT.
            self._socket.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            self._socket.bind(where)
        except OSError as error:
            raise ConfigError(
                f"{key}: cannot listen on {address}: the port is in use or the address is not this machine's; "
                "choose another, or stop what listens there"
            ) from error
        # With it on, others could still bind the port while no worker listens.
        self._socket.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 0)
        self._socket.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
        port = self._socket.getsockname()[1]
        self.address = f"[{host}]:{port}" if ":" in host else f"{host}:{port}"

    def close(self) -> None:
        """Let go of the port."""
        self._socket.close()
