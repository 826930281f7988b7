"""Clients that vanish."""

from __future__ import annotations

import asyncio
import signal
import sys
from typing import Any

import grpc
import grpc.aio
import pytest

from stagemesh.wire import service
from stagemesh.wire.service import make_server

SILENT = """
import sys, time
import grpc
channel = grpc.insecure_channel(sys.argv[1])
call = channel.unary_stream("/a/Wait")(b"")
next(call)
print("answered", flush=True)
time.sleep(1000)
"""
SPEED_UP = 20


async def test_a_client_that_stops_without_a_word_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    """Also after pings that it answered, between which nothing was sent."""
    # The time an answer may take stays: a busy machine needs it.
    faster = tuple(
        (key, value // SPEED_UP if key == "grpc.keepalive_time_ms" else value)
        for key, value in service.SERVER_OPTIONS
    )
    monkeypatch.setattr(service, "SERVER_OPTIONS", faster)
    ended = asyncio.Event()

    async def wait(request: bytes, context: Any) -> None:
        await context.write(b"")
        try:
            await asyncio.Future()
        finally:
            ended.set()

    server = make_server()
    handler = grpc.unary_stream_rpc_method_handler(wait)
    server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler("a", {"Wait": handler}),))
    port = server.add_insecure_port("127.0.0.1:0")
    await server.start()
    client = await asyncio.create_subprocess_exec(
        sys.executable, "-c", SILENT, f"127.0.0.1:{port}", stdout=asyncio.subprocess.PIPE
    )
    try:
        assert client.stdout is not None
        assert await client.stdout.readline() == b"answered\n"
        await asyncio.sleep(4.5)  # four pings
        assert not ended.is_set()
        client.send_signal(signal.SIGSTOP)
        await asyncio.wait_for(ended.wait(), 50)
    finally:
        client.kill()
        await client.wait()
        await server.stop(None)
