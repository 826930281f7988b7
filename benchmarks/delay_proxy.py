"""Stands before a server and holds back what it answers; what it is sent goes straight through.

    python benchmarks/delay_proxy.py HOST:PORT SECONDS

Before a lane's last stage that delays the result stream alone: activations come in undelayed, and of the ring only
the credit is late, which nobody waits for.
"""

from __future__ import annotations

import asyncio
import os
import sys

import uvloop

from stagemesh.wire.process import die_with_parent

READ_BYTES = 1 << 18


async def _pipe(reader: asyncio.StreamReader, writer: asyncio.StreamWriter, delay_s: float) -> None:
    loop = asyncio.get_running_loop()
    held: asyncio.Queue[tuple[float, bytes]] = asyncio.Queue()

    async def release() -> None:
        while True:
            due, data = await held.get()
            if (left := due - loop.time()) > 0:
                await asyncio.sleep(left)
            writer.write(data)
            if not data:
                writer.close()
                return

    releasing = asyncio.create_task(release())
    while data := await reader.read(READ_BYTES):
        held.put_nowait((loop.time() + delay_s, data))
    held.put_nowait((loop.time() + delay_s, b""))
    await releasing


async def _serve(target: str, delay_s: float) -> None:
    host, _, port = target.rpartition(":")

    async def connect(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        there, back = await asyncio.open_connection(host, int(port))
        await asyncio.gather(_pipe(reader, back, 0.0), _pipe(there, writer, delay_s), return_exceptions=True)

    server = await asyncio.start_server(connect, "127.0.0.1", 0)
    name, port_here = server.sockets[0].getsockname()[:2]
    print(f"listening on {name}:{port_here}", flush=True)
    await server.serve_forever()


if __name__ == "__main__":
    die_with_parent(os.getppid())
    uvloop.run(_serve(sys.argv[1], float(sys.argv[2])))
