"""The client's end of a gRPC stream: against a server of gRPC's, and against a peer that says what no such server would."""

from __future__ import annotations

import asyncio
import struct
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Any

import grpc
import grpc.aio
import hpack
import pytest

from stagemesh.router.lane import message_stream
from stagemesh.router.lane.message_stream import (
    ACK,
    CONTINUATION,
    DATA,
    END_HEADERS,
    END_STREAM,
    FRAME,
    GOAWAY,
    HEADERS,
    INITIAL_WINDOW_SIZE,
    PADDED,
    PING,
    PREFACE,
    RST_STREAM,
    SETTINGS,
    WINDOW_UPDATE,
    MessageStream,
)
from stagemesh.wire.errors import StageLostError
from stagemesh.wire.status import from_rpc_error, to_grpc

METHOD = "/test.Test/Talk"
MOST = 8 << 20

Behaviour = Callable[[AsyncIterator[bytes], Any], Awaitable[None]]


class Client:
    """What a stream told its owner."""

    def __init__(self) -> None:
        self.messages: asyncio.Queue[bytes] = asyncio.Queue()
        self.ended: asyncio.Queue[grpc.aio.AioRpcError] = asyncio.Queue()
        self.stream = MessageStream(
            METHOD, (("epoch", "7"),), self.messages.put_nowait, self.ended.put_nowait, max_message_bytes=MOST
        )

    async def end(self) -> tuple[grpc.StatusCode, str]:
        """How the call ended, and that it is told once."""
        error = await asyncio.wait_for(self.ended.get(), 10)
        await self.stream.close()
        assert self.ended.empty()
        return error.code(), error.details() or ""


@pytest.fixture
async def client() -> AsyncIterator[Client]:
    client = Client()
    yield client
    await client.stream.close()


@pytest.fixture
async def serve() -> AsyncIterator[Callable[[Behaviour], Awaitable[str]]]:
    """serve(behaviour): a server of gRPC's; returns its address."""
    servers = []

    async def start(behaviour: Behaviour) -> str:
        server = grpc.aio.server(options=(("grpc.max_receive_message_length", MOST),))
        handler = grpc.stream_stream_rpc_method_handler(behaviour)
        server.add_generic_rpc_handlers(
            (grpc.method_handlers_generic_handler("test.Test", {"Talk": handler}),)
        )
        port = server.add_insecure_port("127.0.0.1:0")
        await server.start()
        servers.append(server)
        return f"127.0.0.1:{port}"

    yield start
    for server in servers:
        await server.stop(0)


async def test_messages_go_and_come_in_order_whatever_their_size(client: Client, serve: Any) -> None:
    async def echo(requests: AsyncIterator[bytes], context: Any) -> None:
        assert ("epoch", "7") in tuple(context.invocation_metadata())
        async for request in requests:
            await context.write(request)

    client.stream.connect(await serve(echo), 5)
    # Larger than a frame, than a server's first window, and than what it makes of that.
    sizes = [0, 1, 2_000, 70_000, 16_379, 16_384, 3_000_000, 5]
    sent = [bytes([number]) * size for number, size in enumerate(sizes)]
    for message in sent:
        client.stream.send(message)
    received = b""
    while len(received) < sum(sizes):
        received += await asyncio.wait_for(client.messages.get(), 10)
    assert received == b"".join(sent), "those that waited came as one message, in order"
    for message in sent:
        client.stream.send(message)
        assert await asyncio.wait_for(client.messages.get(), 10) == message


async def test_a_status_comes_with_its_details(client: Client, serve: Any) -> None:
    async def refuse(requests: AsyncIterator[bytes], context: Any) -> None:
        await context.write(b"first")
        error = StageLostError(
            "stage 1 höhö: 100% lost", reason="STAGE_LOST", stage="stage 2", retry_after_s=1.0
        )
        await context.abort_with_status(to_grpc(error))

    client.stream.connect(await serve(refuse), 5)
    error = from_rpc_error(await asyncio.wait_for(client.ended.get(), 10))
    assert (type(error), error.message, error.stage) == (StageLostError, "stage 1 höhö: 100% lost", "stage 2")
    assert error.retry_after_s == 1.0
    assert client.messages.get_nowait() == b"first"


async def test_a_call_that_is_refused_without_a_word_ends_with_its_status(client: Client, serve: Any) -> None:
    async def never(requests: AsyncIterator[bytes], context: Any) -> None:
        raise AssertionError("it has another name")

    client.stream._method = "/test.Test/Other"
    client.stream.connect(await serve(never), 5)
    assert (await client.end())[0] is grpc.StatusCode.UNIMPLEMENTED


async def test_closing_cancels_the_call_and_tells_nobody(client: Client, serve: Any) -> None:
    begun, cancelled = asyncio.Event(), asyncio.Event()

    async def wait(requests: AsyncIterator[bytes], context: Any) -> None:
        begun.set()
        try:
            await asyncio.Event().wait()
        finally:
            cancelled.set()

    client.stream.connect(await serve(wait), 5)
    await asyncio.wait_for(begun.wait(), 10)
    await client.stream.close()
    await asyncio.wait_for(cancelled.wait(), 10)
    client.stream.send(b"nobody")
    assert client.ended.empty()


async def test_a_server_that_is_not_there(client: Client) -> None:
    client.stream.connect("127.0.0.1:1", 5)
    code, details = await client.end()
    assert code is grpc.StatusCode.UNAVAILABLE
    assert details.startswith("failed to connect to 127.0.0.1:1: ")


class Peer:
    """A server whose frames the test writes."""

    def __init__(self) -> None:
        self.reader: asyncio.StreamReader
        self.writer: asyncio.StreamWriter
        self.came = asyncio.Event()

    async def start(self) -> str:
        def accept(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            self.reader, self.writer = reader, writer
            self.came.set()

        self._server = await asyncio.start_server(accept, "127.0.0.1", 0)
        return f"127.0.0.1:{self._server.sockets[0].getsockname()[1]}"

    async def greet(self, **settings: int) -> None:
        """Take what a client begins with, and begin."""
        await self.came.wait()
        assert await self.reader.readexactly(len(PREFACE)) == PREFACE
        assert [(await self.read())[0] for _ in range(3)] == [SETTINGS, WINDOW_UPDATE, HEADERS]
        window = settings.get("window")
        self.write(SETTINGS, 0, 0, b"" if window is None else struct.pack(">HI", INITIAL_WINDOW_SIZE, window))

    def write(self, kind: int, flags: int, stream: int, payload: bytes) -> None:
        self.writer.write(FRAME.pack(len(payload) >> 8, len(payload) & 0xFF, kind, flags, stream) + payload)

    async def read(self) -> tuple[int, int, bytes]:
        async with asyncio.timeout(10):
            upper, lowest, kind, flags, _ = FRAME.unpack(await self.reader.readexactly(FRAME.size))
            return kind, flags, await self.reader.readexactly(upper << 8 | lowest)

    async def close(self) -> None:
        self._server.close()
        if self.came.is_set():
            self.writer.close()


@pytest.fixture
async def peer(client: Client) -> AsyncIterator[Peer]:
    peer = Peer()
    client.stream.connect(await peer.start(), 5)
    yield peer
    await client.stream.close()
    await peer.close()


BEGIN = hpack.Encoder().encode([(b":status", b"200"), (b"content-type", b"application/grpc")])


def message(data: bytes) -> bytes:
    return struct.pack(">BI", 0, len(data)) + data


async def test_no_more_is_sent_than_there_is_a_window_for(client: Client, peer: Peer) -> None:
    await peer.greet(window=10)
    assert await peer.read() == (SETTINGS, ACK, b"")
    for data in (b"0123456789", b"ab", b"cd"):
        client.stream.send(data)
    assert await peer.read() == (DATA, 0, message(b"0123456789")[:10])
    peer.write(WINDOW_UPDATE, 0, 1, struct.pack(">I", 3))
    assert await peer.read() == (DATA, 0, b"567")
    peer.write(WINDOW_UPDATE, 0, 1, struct.pack(">I", 100))
    assert await peer.read() == (DATA, 0, b"89")
    assert await peer.read() == (DATA, 0, message(b"abcd")), "what waited goes as one message"


@pytest.mark.parametrize("of_stream", [True, False])
async def test_messages_that_go_at_once_use_up_the_windows(
    client: Client, peer: Peer, of_stream: bool
) -> None:
    size = 11_995
    await peer.greet(window=5 * (size + 5) if of_stream else 1 << 20)
    assert await peer.read() == (SETTINGS, ACK, b"")
    for number in range(7):
        client.stream.send(bytes([number]) * size)
    for number in range(5):
        assert await peer.read() == (DATA, 0, message(bytes([number]) * size))
    if not of_stream:
        assert len((await peer.read())[2]) == 65_535 - 5 * (size + 5)
    peer.write(PING, 0, 0, b"12345678")
    assert (await peer.read())[0] == PING, "what is left waits for a window"


async def test_the_window_of_the_connection_counts_too(client: Client, peer: Peer) -> None:
    await peer.greet(window=1 << 20)
    assert await peer.read() == (SETTINGS, ACK, b"")
    client.stream.send(bytes(70_000))
    received = [len((await peer.read())[2]) for _ in range(4)]
    assert sum(received) == 65_535
    assert max(received) == 16_384, "the largest frame that a peer takes unless it says otherwise"
    peer.write(PING, 0, 0, b"12345678")
    assert await peer.read() == (PING, ACK, b"12345678"), (
        "nothing more of the message before the window opens"
    )
    peer.write(WINDOW_UPDATE, 0, 0, struct.pack(">I", 1 << 20))
    assert len((await peer.read())[2]) == 70_005 - 65_535


async def test_messages_may_come_in_any_pieces(client: Client, peer: Peer) -> None:
    await peer.greet()
    peer.write(HEADERS, 0, 1, BEGIN[:5])
    peer.write(CONTINUATION, END_HEADERS, 1, BEGIN[5:])
    three = message(b"one") + message(b"") + message(b"three")
    for begin in range(len(three)):
        peer.write(DATA, 0, 1, three[begin : begin + 1])
    peer.write(DATA, PADDED, 1, bytes([4]) + message(b"four") + bytes(4))
    peer.write(99, 0, 0, b"a kind of frame that nobody knows")
    peer.write(DATA, 0, 1, message(b"five") + message(b"six"))
    got = [await asyncio.wait_for(client.messages.get(), 10) for _ in range(6)]
    assert got == [b"one", b"", b"three", b"four", b"five", b"six"]


TRAILERS = hpack.Encoder().encode([(b"grpc-status", b"9"), (b"grpc-message", b"not%20now")])


@pytest.mark.parametrize(
    ("kind", "flags", "payload", "code", "says"),
    [
        (HEADERS, END_HEADERS | END_STREAM, TRAILERS, "FAILED_PRECONDITION", "not now"),
        (HEADERS, END_HEADERS | END_STREAM, BEGIN, "INTERNAL", "without a status"),
        (
            HEADERS,
            END_HEADERS,
            hpack.Encoder().encode([(b":status", b"502")]),
            "UNAVAILABLE",
            "HTTP status 502",
        ),
        (HEADERS, END_HEADERS, b"\xff", "INTERNAL", "not gRPC"),
        (RST_STREAM, 0, struct.pack(">I", 8), "CANCELLED", "error 8"),
        (RST_STREAM, 0, struct.pack(">I", 7), "UNAVAILABLE", "error 7"),
        (RST_STREAM, 0, struct.pack(">I", 2), "INTERNAL", "error 2"),
        (GOAWAY, 0, struct.pack(">II", 0, 0), "UNAVAILABLE", "hangs up"),
        (GOAWAY, 0, struct.pack(">II", 1, 11) + b"too_many_pings", "UNAVAILABLE", "too_many_pings"),
        (DATA, 0, struct.pack(">BI", 1, 1) + b"x", "INTERNAL", "compressed"),
        (DATA, 0, struct.pack(">BI", 0, MOST + 1), "RESOURCE_EXHAUSTED", f"{MOST} are the most"),
        (WINDOW_UPDATE, 0, b"", "INTERNAL", "not gRPC"),
    ],
)
async def test_how_a_peer_ends_it(
    client: Client, peer: Peer, kind: int, flags: int, payload: bytes, code: str, says: str
) -> None:
    await peer.greet()
    peer.write(kind, flags, 1, payload)
    peer.write(DATA, 0, 1, message(b"too late"))
    ended, details = await client.end()
    assert (ended.name, says in details) == (code, True), details
    assert client.messages.empty()


async def test_a_status_may_come_in_two_frames(client: Client, peer: Peer) -> None:
    await peer.greet()
    peer.write(HEADERS, END_STREAM, 1, TRAILERS[:7])
    peer.write(CONTINUATION, END_HEADERS, 1, TRAILERS[7:])
    assert await client.end() == (grpc.StatusCode.FAILED_PRECONDITION, "not now")


async def test_cancelling_resets_the_call_and_hangs_up(client: Client, peer: Peer) -> None:
    await peer.greet()
    assert await peer.read() == (SETTINGS, ACK, b"")
    client.stream.cancel()
    assert await peer.read() == (RST_STREAM, 0, struct.pack(">I", 8))
    assert await peer.reader.read() == b""
    assert client.ended.empty()


async def test_the_peer_gets_back_what_it_sent_of_its_window(
    client: Client, peer: Peer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(message_stream, "REPLENISH_BYTES", 20)
    await peer.greet()
    assert await peer.read() == (SETTINGS, ACK, b"")
    for _ in range(3):
        peer.write(DATA, 0, 1, message(b"12345"))
    assert [await peer.read() for _ in range(2)] == [(WINDOW_UPDATE, 0, struct.pack(">I", 20))] * 2
    peer.write(PING, 0, 0, b"12345678")
    assert (await peer.read())[0] == PING, "half of the next is not told yet"


async def test_a_server_of_something_else(client: Client, peer: Peer) -> None:
    await peer.came.wait()
    peer.writer.write(b"HTTP/1.1 400 Bad Request\r\nConnection: close\r\n\r\n")
    code, details = await client.end()
    assert (code.name, "not gRPC: a frame of" in details) == ("INTERNAL", True), details


async def test_a_connection_that_breaks(client: Client, peer: Peer) -> None:
    await peer.greet()
    peer.writer.transport.abort()
    code, details = await client.end()
    assert code is grpc.StatusCode.UNAVAILABLE
    assert details.startswith("the connection was lost")


async def test_a_server_that_leaves_in_good_order_finishes_the_call(client: Client, peer: Peer) -> None:
    await peer.greet()
    peer.write(GOAWAY, 0, 0, struct.pack(">II", 1, 0))
    peer.write(HEADERS, END_HEADERS, 1, BEGIN)
    peer.write(DATA, 0, 1, message(b"still here"))
    assert await asyncio.wait_for(client.messages.get(), 10) == b"still here"
    assert client.ended.empty()
