"""An API worker: `python -m stagemesh.router.worker SPEC`, started by a router and by nothing else."""

from __future__ import annotations

import asyncio
import os
import signal
import socket
import sys

import uvloop

from stagemesh.router.api.public_server import PublicServer
from stagemesh.router.api.served_model import load_served_model
from stagemesh.router.api.streams import Streams
from stagemesh.router.tracing.tracing import RouterTracing
from stagemesh.router.worker.messages import Kind
from stagemesh.router.worker.router_link import RouterLink
from stagemesh.router.worker.spec import WorkerSpec
from stagemesh.wire.errors import StartupError
from stagemesh.wire.logs import setup_logging
from stagemesh.wire.process import die_with_parent

GRACE_S = 1.5
"""For streams that are at their end when the router stops."""


async def _serve(spec: WorkerSpec) -> None:
    loop = asyncio.get_running_loop()
    # The router decides when its workers leave: a Ctrl-C, or a stop of the whole group, reaches them too.
    for number in (signal.SIGINT, signal.SIGTERM):
        loop.add_signal_handler(number, lambda: None)
    model = load_served_model(spec.config)
    tracing = RouterTracing.start(
        listen=f"{spec.listen}/{spec.index}", model_name=model.name, every_step=spec.config.trace == "full"
    )
    streams = Streams(model, tracing.server if tracing else None)
    server = PublicServer(streams, share_port=True)
    stopped = asyncio.Event()
    # Without its router it can finish nothing, and the next router wants the port.
    link = RouterLink(streams, server.set_serving, on_stop=stopped.set, on_lost=lambda: os._exit(1))
    streams.backend = link
    await loop.connect_accepted_socket(lambda: link.protocol, socket.socket(fileno=spec.socket_fd))
    try:
        await server.start(spec.listen)
    except StartupError as error:
        link.protocol.send(Kind.CANNOT_START, str(error).encode())
    else:
        link.protocol.send(Kind.READY)
    await stopped.wait()
    await server.stop(GRACE_S)
    if tracing:
        await asyncio.to_thread(tracing.close)


def main() -> None:
    """Serve until the router says stop, or is gone."""
    spec = WorkerSpec.model_validate_json(sys.argv[1])
    die_with_parent(spec.router_pid)
    setup_logging(spec.config.log_level, spec.config.log_json, f"api worker {spec.index}")
    uvloop.run(_serve(spec))


if __name__ == "__main__":
    main()
