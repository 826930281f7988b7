"""Addresses as HOST:PORT, and which of them may be listened on without protection."""

from __future__ import annotations

import ipaddress

from stagemesh.wire.errors import ConfigError


def split_address(address: str, *, key: str) -> tuple[str, int]:
    """HOST and PORT of "HOST:PORT" or "[IPV6]:PORT"; `key` names the setting in the error."""
    host, colon, port = address.rpartition(":")
    host = host.removeprefix("[").removesuffix("]")
    if not colon or not host or not port.isdigit() or int(port) > 65535:
        raise ConfigError(
            f"{key}: '{address}' is not an address; expected HOST:PORT, such as 127.0.0.1:50051"
        )
    return host, int(port)


def is_loopback(host: str) -> bool:
    """Whether only this machine can reach it."""
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def check_listen(address: str, *, insecure: bool, key: str) -> str:
    """The address, if it may be listened on: loopback, unless `insecure` says that open is meant."""
    host, _ = split_address(address, key=key)
    if not insecure and not is_loopback(host):
        raise ConfigError(
            f"{key}: {address} is reachable from other machines and nothing protects it; "
            "give --insecure if the network is trusted, or listen on 127.0.0.1"
        )
    return address
