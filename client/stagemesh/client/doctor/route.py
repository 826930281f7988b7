"""Which interface reaches a peer. Nothing is sent: the kernel is asked for its route."""

from __future__ import annotations

import fcntl
import ipaddress
import os
import socket
import struct
from dataclasses import dataclass
from pathlib import Path

from stagemesh.client.doctor.finding import Finding, Level

_SIOCGIFADDR = 0x8915


@dataclass(frozen=True, slots=True, kw_only=True)
class Route:
    """The way to an address."""

    address: str
    """Of the peer, resolved."""
    source: str
    """Ours, as the peer sees it."""
    interface: str
    """"" if none has that address."""


def find_route(host: str, port: int) -> Route:
    """The way to a peer; OSError if its name has no address, or there is no way."""
    family, _, _, _, target = socket.getaddrinfo(host, port, type=socket.SOCK_DGRAM)[0]
    with socket.socket(family, socket.SOCK_DGRAM) as probe:
        probe.connect(target)  # of a datagram socket: only the route is chosen
        source = str(probe.getsockname()[0]).partition("%")[0]
    return Route(address=str(target[0]), source=source, interface=interface_of(source))


def check_route(peer: str, route: Route) -> Finding:
    """The interface by which it is reached, with what the kernel knows of it."""
    check = f"{peer} route"
    mtu, speed = _fact(route.interface, "mtu"), _fact(route.interface, "speed")
    about = "".join(
        [f", MTU {mtu}" if mtu else "", f", {speed} Mbit/s" if speed.isdigit() and int(speed) > 0 else ""]
    )
    found = f"{route.address} by {route.interface or 'an unknown interface'} from {route.source}{about}"
    values = {"interface": route.interface, "source": route.source, "address": route.address}
    wanted = os.environ.get("NCCL_SOCKET_IFNAME", "").removeprefix("=")
    names = [name for name in wanted.split(",") if name and not name.startswith("^")]
    if names and not any(route.interface.startswith(name) for name in names):
        return Finding(
            check=check,
            level=Level.WARN,
            found=f"{found}; NCCL_SOCKET_IFNAME={wanted} is another",
            todo=f"NCCL_SOCKET_IFNAME={route.interface}, unless the other one reaches it too",
            values=values,
        )
    return Finding(check=check, level=Level.OK, found=found, values=values)


def interface_of(address: str) -> str:
    """The interface that has an address of this machine; "" if none has."""
    wanted = ipaddress.ip_address(address)
    if wanted.version == 6:
        return _interface_v6(wanted.exploded.replace(":", ""))
    if wanted.is_loopback:  # all of 127.0.0.0/8, of which the interface itself names one
        return "lo"
    for _, name in socket.if_nameindex():
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
            request = struct.pack("256s", name.encode()[:15])
            try:
                answer = fcntl.ioctl(probe.fileno(), _SIOCGIFADDR, request)
            except OSError:  # it has no IPv4 address
                continue
        if ipaddress.ip_address(answer[20:24]) == wanted:
            return name
    return ""


def _interface_v6(digits: str) -> str:
    try:
        lines = Path("/proc/net/if_inet6").read_text().splitlines()
    except OSError:
        return ""
    return next((line.split()[5] for line in lines if line.startswith(digits)), "")


def _fact(interface: str, name: str) -> str:
    try:
        return Path("/sys/class/net", interface, name).read_text().strip() if interface else ""
    except OSError:  # a virtual interface has no speed
        return ""
