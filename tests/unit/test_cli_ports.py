"""Ports that `up` finds for its servers: theirs until they listen, and nobody else's."""

from __future__ import annotations

import socket
from collections.abc import Iterator

import pytest

from stagemesh.client.cli._ports import Ports
from stagemesh.router.worker.held_port import HeldPort
from stagemesh.wire.errors import ConfigError, StartupError
from stagemesh.wire.service import bind, make_server

ANY = "127.0.0.1:0"


@pytest.fixture
def ports() -> Iterator[Ports]:
    with Ports() as one:
        yield one


def test_two_meshes_that_start_at_once_get_different_ports(ports: Ports) -> None:
    """Many, for a port that nobody holds is dealt again now and then alone."""
    with Ports() as others:
        found = [held.take(ANY, key="--listen") for _ in range(500) for held in (ports, others)]
    assert len(set(found)) == len(found)


async def test_a_server_listens_on_a_port_that_is_kept_for_it(ports: Ports) -> None:
    address = ports.take(ANY, key="--listen")
    server = make_server()
    assert bind(server, address, key="--listen") == address
    await server.start()
    with Ports() as others, pytest.raises(StartupError, match="--stage-port: port"):
        others.take(address, key="--stage-port")
    await server.stop(None)
    again = make_server()
    assert bind(again, address, key="--listen") == address, "also when it is started again"
    await again.stop(None)


async def test_workers_share_a_port_that_is_kept_for_their_router(ports: Ports) -> None:
    address = ports.take(ANY, key="--listen")
    held = HeldPort(address, key="--listen")
    servers = [make_server(share_port=True) for _ in range(2)]
    for server in servers:
        assert bind(server, address, key="--listen") == address
        await server.start()
    for server in servers:
        await server.stop(None)
    held.close()


def test_a_port_is_kept_for_one_server(ports: Ports) -> None:
    address = ports.take(ANY, key="--listen")
    with pytest.raises(ConfigError, match=f"--admin: {address} is given to two servers"):
        ports.take(address, key="--admin")


def test_closed_ports_are_anybodys(ports: Ports) -> None:
    address = ports.take(ANY, key="--listen")
    ports.close()
    host, port = address.split(":")
    with socket.create_server((host, int(port)), reuse_port=False):
        pass
