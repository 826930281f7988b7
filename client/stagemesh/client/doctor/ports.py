"""Ports that a role will listen on: free, or in use by whom."""

from __future__ import annotations

import errno
import os
import socket
from pathlib import Path

from stagemesh.client.doctor.finding import Finding, Level
from stagemesh.wire.address import split_address
from stagemesh.wire.errors import ConfigError

_LISTEN = "0A"
"""State of a listening socket in /proc/net/tcp."""


def check_port(address: str) -> Finding:
    """Whether HOST:PORT can be listened on."""
    check = f"port {address.rpartition(':')[2]}"
    try:
        host, port = split_address(address, key="--listen")
        family, kind, protocol, _, target = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
    except (ConfigError, OSError) as error:
        todo = "give an address of this machine as HOST:PORT"
        return Finding(check=check, level=Level.FAIL, found=f"{address}: {error}", todo=todo)
    with socket.socket(family, kind, protocol) as listener:
        # Connections that just ended linger; they do not count, a listener does.
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            listener.bind(target)
        except OSError as error:
            return _taken(check, address, port, error)
    return Finding(check=check, level=Level.OK, found=f"{address} is free")


def _taken(check: str, address: str, port: int, error: OSError) -> Finding:
    if error.errno != errno.EADDRINUSE:
        return Finding(
            check=check,
            level=Level.FAIL,
            found=f"{address}: {error.strerror}",
            todo="listen on an address that this machine has (ip address)",
        )
    who = owner(port)
    found = f"{address} is in use by {who or 'a process that is not shown to this user'}"
    if "stagemesh" in who:
        todo = "stop it before another starts, or choose another port"
        return Finding(check=check, level=Level.WARN, found=found, todo=todo, values={"owner": who})
    todo = "stop it, or choose another port with --listen"
    return Finding(check=check, level=Level.FAIL, found=found, todo=todo, values={"owner": who})


def owner(port: int) -> str:
    """The process that listens on a port of this machine, as "PID COMMAND LINE"; "" if it cannot be seen."""
    inodes = {f"socket:[{inode}]" for inode in _listening_inodes(port)}
    if not inodes:
        return ""
    for process in Path("/proc").iterdir():
        if process.name.isdigit() and _holds(process, inodes):
            try:
                command = (process / "cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace")
            except OSError:  # it ended meanwhile
                continue
            return f"{process.name} {command.strip()[:120]}"
    return ""


def _listening_inodes(port: int) -> list[str]:
    wanted = f":{port:04X}"
    found = []
    for table in ("/proc/net/tcp", "/proc/net/tcp6"):
        try:
            lines = Path(table).read_text().splitlines()[1:]
        except OSError:
            continue
        for line in lines:
            cells = line.split()
            if cells[1].endswith(wanted) and cells[3] == _LISTEN:
                found.append(cells[9])
    return found


def _holds(process: Path, inodes: set[str]) -> bool:
    try:
        return any(os.readlink(file) in inodes for file in (process / "fd").iterdir())
    except OSError:  # another user's, or it ended
        return False
