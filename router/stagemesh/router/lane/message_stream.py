"""One bidirectional gRPC call on a connection of its own, for the client that sends a message at every step.

What goes over the wire is gRPC (HTTP/2, one stream), and the other end is any gRPC server. gRPC's own client costs a
step two wake-ups and a hand-over to its polling thread for each message that is written or read, and a router writes
one to each stage: docs/performance.md, "Scheduler CPU", has the figures. Here a message is one write to the socket, and
what comes is taken where the event loop reads it.

Plain text only, as all that goes between router and stages. Liveness is the caller's to watch: nothing is sent where
nothing is to say.
"""

from __future__ import annotations

import asyncio
import base64
import struct
from collections.abc import Callable, Sequence
from typing import cast
from urllib.parse import unquote

import grpc
import grpc.aio
import hpack

from stagemesh.wire.address import split_address

PREFACE = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"
DATA, HEADERS, RST_STREAM, SETTINGS, PING, GOAWAY, WINDOW_UPDATE, CONTINUATION = 0, 1, 3, 4, 6, 7, 8, 9
"""Types of frames."""
END_STREAM = ACK = 0x1
END_HEADERS, PADDED, PRIORITY = 0x4, 0x8, 0x20
"""Flags of frames."""
ENABLE_PUSH, INITIAL_WINDOW_SIZE, MAX_FRAME_SIZE = 2, 4, 5
"""Settings."""
CANCEL = 8
"""Error code: nobody wants the stream any more."""
STREAM = 1
"""The only one."""
DEFAULT_WINDOW, MAX_WINDOW = 65_535, (1 << 31) - 1
FRAME_BYTES = 16_384
"""Of the largest frame that one end takes unless it says otherwise; this one never does."""
REPLENISH_BYTES = 1 << 30
"""The peer may send so much again once it has sent that: its window never holds it up."""
FRAME = struct.Struct(">HBBBI")
"""Length (upper 16 bits, then the lowest 8), type, flags, stream."""
SETTING = struct.Struct(">HI")
NUMBER = struct.Struct(">I")
PREFIX = struct.Struct(">BI")
"""Of a gRPC message: whether it is compressed, and its length."""
CLOSE_TIMEOUT_S = 1.0
"""For the socket to take what is still to be sent; it has been told that nobody wants the call."""
Headers = list[tuple[bytes, bytes]]
_STATUS_OF_RESET = {
    7: grpc.StatusCode.UNAVAILABLE,
    8: grpc.StatusCode.CANCELLED,
    11: grpc.StatusCode.RESOURCE_EXHAUSTED,
    12: grpc.StatusCode.PERMISSION_DENIED,
}
"""By error code of RST_STREAM, as gRPC's specification maps them; INTERNAL for others."""


class _Ends(Exception):
    """What came ends the call."""

    def __init__(self, code: grpc.StatusCode, details: str, trailers: Headers | None = None) -> None:
        self.error = grpc.aio.AioRpcError(code, grpc.aio.Metadata(), _metadata(trailers or []), details)


class MessageStream(asyncio.Protocol):
    """The client's end of the call.

    Args:
        method: "/package.Service/Method".
        metadata: Of the call.
        on_message: Called with each message of the server's, serialized.
        on_end: Called once, when the call is over or could not be opened, with its status; not after `close`.
        max_message_bytes: A longer one ends the call.
    """

    def __init__(
        self,
        method: str,
        metadata: Sequence[tuple[str, str]],
        on_message: Callable[[bytes], None],
        on_end: Callable[[grpc.aio.AioRpcError], None],
        max_message_bytes: int,
    ) -> None:
        self._method = method
        self._metadata = metadata
        self._on_message = on_message
        self._on_end = on_end
        self._max_message_bytes = max_message_bytes
        self._transport: asyncio.Transport | None = None
        self._over = False
        self._closed: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._connecting: asyncio.Task[None] | None = None
        self._authority = ""
        # What came
        self._buffer = bytearray()
        self._message = bytearray()
        self._consumed = 0
        self._decoder = hpack.Decoder()
        self._headers: bytearray | None = None
        """A header block of which more is to come."""
        self._ends_stream = False
        """Whether it is the last."""
        # What goes
        self._waiting: list[bytes] = []
        """Messages that there is no window for, or no connection yet; they go as one."""
        self._rest = memoryview(b"")
        """Of the message that is being sent, framed as gRPC frames it."""
        self._window = DEFAULT_WINDOW
        """Bytes the server takes on the connection, and on the stream."""
        self._stream_window = self._initial_window = DEFAULT_WINDOW
        self._max_frame = FRAME_BYTES

    def connect(self, address: str, timeout_s: float) -> None:
        """Open it to HOST:PORT; messages may be sent meanwhile."""
        self._authority = address
        self._connecting = asyncio.create_task(self._connect(address, timeout_s))

    def send(self, message: bytes) -> None:
        """Send a serialized message. Those that must wait for the server's window go as one: messages of one type, whose
        repeated fields merge when they are put end to end. Nothing happens once the call is over."""
        if self._over:
            return
        size = PREFIX.size + len(message)
        room = min(self._window, self._stream_window, self._max_frame)
        if size <= room and self._transport:
            # As _flush does it, for what is usual. While something waits there is no room.
            self._window -= size
            self._stream_window -= size
            head = FRAME.pack(size >> 8, size & 0xFF, DATA, 0, STREAM) + PREFIX.pack(0, len(message))
            self._transport.write(head + message)
            return
        self._waiting.append(message)
        if not self._rest:
            self._flush()

    def cancel(self) -> None:
        """End the call, unless it is over; nothing is called from here on."""
        self._over = True
        if self._connecting:
            self._connecting.cancel()
        if self._transport and not self._transport.is_closing():
            self._transport.write(_frame(RST_STREAM, 0, STREAM, NUMBER.pack(CANCEL)))
            self._transport.close()

    async def close(self) -> None:
        """Cancel the call and wait until the connection is closed."""
        self.cancel()
        if self._connecting:
            await asyncio.gather(self._connecting, return_exceptions=True)
        if self._transport:
            await asyncio.wait({self._closed}, timeout=CLOSE_TIMEOUT_S)
            if not self._closed.done():  # it takes nothing any more
                self._transport.abort()

    async def _connect(self, address: str, timeout_s: float) -> None:
        host, port = split_address(address, key="address")
        loop = asyncio.get_running_loop()
        try:
            async with asyncio.timeout(timeout_s):
                await loop.create_connection(lambda: self, host, port)
        except (OSError, TimeoutError) as error:
            how = error.strerror or error if isinstance(error, OSError) else f"no answer in {timeout_s:g} s"
            self._end(_Ends(grpc.StatusCode.UNAVAILABLE, f"failed to connect to {address}: {how}"))

    # asyncio.Protocol

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        # uvloop's transports are not asyncio's classes, only their likes.
        self._transport = cast(asyncio.Transport, transport)
        settings = {ENABLE_PUSH: 0, INITIAL_WINDOW_SIZE: MAX_WINDOW}
        headers = [
            (b":method", b"POST"),
            (b":scheme", b"http"),
            (b":path", self._method.encode()),
            (b":authority", self._authority.encode()),
            (b"te", b"trailers"),
            (b"content-type", b"application/grpc"),
            *((key.encode(), value.encode()) for key, value in self._metadata),
        ]
        self._transport.write(
            PREFACE
            + _frame(SETTINGS, 0, 0, b"".join(SETTING.pack(key, value) for key, value in settings.items()))
            + _frame(WINDOW_UPDATE, 0, 0, NUMBER.pack(MAX_WINDOW - DEFAULT_WINDOW))
            + _frame(HEADERS, END_HEADERS, STREAM, hpack.Encoder().encode(headers))
        )
        self._flush()

    def data_received(self, data: bytes) -> None:
        buffer = self._buffer
        buffer += data
        begin, end = 0, len(buffer)
        try:
            while end - begin >= FRAME.size and not self._over:
                upper, lowest, kind, flags, stream = FRAME.unpack_from(buffer, begin)
                length = upper << 8 | lowest
                if length > FRAME_BYTES:
                    raise ValueError(f"a frame of {length} bytes")
                payload_begin = begin + FRAME.size
                payload_end = payload_begin + length
                if payload_end > end:
                    break
                begin = payload_end
                self._take_frame(kind, flags, stream & MAX_WINDOW, bytes(buffer[payload_begin:payload_end]))
        except _Ends as how:
            self._end(how)
        except (ValueError, IndexError, struct.error) as error:
            self._end(_Ends(grpc.StatusCode.INTERNAL, f"what the server sent is not gRPC: {error}"))
        del buffer[:begin]

    def connection_lost(self, error: Exception | None) -> None:
        if not self._closed.done():
            self._closed.set_result(None)
        how = f": {error}" if error else ""
        self._end(_Ends(grpc.StatusCode.UNAVAILABLE, f"the connection was lost{how}"))

    # What came

    def _take_frame(self, kind: int, flags: int, stream: int, payload: bytes) -> None:
        assert self._transport is not None
        if kind == DATA and stream == STREAM:
            self._take_data(_unpadded(payload, flags))
            self._consumed += len(payload)
            if self._consumed >= REPLENISH_BYTES and not self._over:
                for window in (0, STREAM):
                    self._transport.write(_frame(WINDOW_UPDATE, 0, window, NUMBER.pack(self._consumed)))
                self._consumed = 0
        elif kind == HEADERS and stream == STREAM:
            block = _unpadded(payload, flags)
            self._headers = bytearray(block[5:] if flags & PRIORITY else block)
            self._ends_stream = bool(flags & END_STREAM)
            if flags & END_HEADERS:
                self._take_headers()
        elif kind == CONTINUATION and stream == STREAM and self._headers is not None:
            self._headers += payload
            if flags & END_HEADERS:
                self._take_headers()
        elif kind == PING and not flags & ACK:
            self._transport.write(_frame(PING, ACK, 0, payload))
        elif kind == SETTINGS and not flags & ACK:
            self._take_settings(payload)
            self._transport.write(_frame(SETTINGS, ACK, 0, b""))
            self._flush()
        elif kind == WINDOW_UPDATE:
            more = NUMBER.unpack(payload)[0] & MAX_WINDOW
            if stream:
                self._stream_window += more
            else:
                self._window += more
            self._flush()
        elif kind == RST_STREAM and stream == STREAM:
            (error,) = NUMBER.unpack(payload)
            code = _STATUS_OF_RESET.get(error, grpc.StatusCode.INTERNAL)
            raise _Ends(code, f"the server reset the call with error {error}")
        elif kind == GOAWAY:
            last, error = struct.unpack_from(">II", payload)
            if last & MAX_WINDOW < STREAM or error:
                why = payload[8:].decode(errors="replace")
                raise _Ends(grpc.StatusCode.UNAVAILABLE, f"the server hangs up, error {error} {why}".rstrip())

    def _take_data(self, data: bytes) -> None:
        message = self._message
        if not message and len(data) >= PREFIX.size and len(data) == PREFIX.size + self._length_of(data):
            self._on_message(data[PREFIX.size :])
            return
        message += data
        while len(message) >= PREFIX.size and not self._over:
            end = PREFIX.size + self._length_of(message)
            if len(message) < end:
                return
            whole = bytes(message[PREFIX.size : end])
            del message[:end]
            self._on_message(whole)

    def _length_of(self, message: bytes | bytearray) -> int:
        compressed, length = PREFIX.unpack_from(message)
        if compressed:
            raise ValueError("a compressed message, where no compression was offered")
        if length > self._max_message_bytes:
            most = self._max_message_bytes
            raise _Ends(
                grpc.StatusCode.RESOURCE_EXHAUSTED, f"a message of {length} bytes came; {most} are the most"
            )
        return int(length)

    def _take_headers(self) -> None:
        assert self._headers is not None
        block, self._headers = bytes(self._headers), None
        try:
            headers = cast(Headers, self._decoder.decode(block, raw=True))
        except hpack.HPACKError as error:
            raise ValueError(f"a header block: {error}") from None
        fields = dict(headers)
        if (status := fields.get(b":status", b"200")) != b"200" and b"grpc-status" not in fields:
            raise _Ends(
                grpc.StatusCode.UNAVAILABLE, f"the server answered with HTTP status {status.decode()}"
            )
        if not self._ends_stream:
            return
        if b"grpc-status" not in fields:
            raise ValueError("the call ended without a status")
        number = int(fields[b"grpc-status"])
        code = next((one for one in grpc.StatusCode if one.value[0] == number), grpc.StatusCode.UNKNOWN)
        raise _Ends(code, unquote(fields.get(b"grpc-message", b"").decode()), headers)

    def _take_settings(self, payload: bytes) -> None:
        for key, value in SETTING.iter_unpack(payload):
            if key == INITIAL_WINDOW_SIZE:
                self._stream_window += value - self._initial_window
                self._initial_window = value
            elif key == MAX_FRAME_SIZE:
                self._max_frame = value

    def _end(self, how: _Ends) -> None:
        if self._over:
            return
        self._over = True
        if self._transport:
            self._transport.close()
        self._on_end(how.error)

    # What goes

    def _flush(self) -> None:
        """Send as much as the server takes now."""
        if self._transport is None or self._over:
            return
        frames: list[bytes | memoryview] = []
        while self._rest or self._waiting:
            if not self._rest:
                message = self._waiting[0] if len(self._waiting) == 1 else b"".join(self._waiting)
                self._waiting = []
                self._rest = memoryview(PREFIX.pack(0, len(message)) + message)
            count = min(len(self._rest), self._window, self._stream_window, self._max_frame)
            if count <= 0:
                break
            frames += (FRAME.pack(count >> 8, count & 0xFF, DATA, 0, STREAM), self._rest[:count])
            self._rest = self._rest[count:]
            self._window -= count
            self._stream_window -= count
        if frames:
            self._transport.write(b"".join(frames))


def _frame(kind: int, flags: int, stream: int, payload: bytes) -> bytes:
    length = len(payload)
    return FRAME.pack(length >> 8, length & 0xFF, kind, flags, stream) + payload


def _unpadded(payload: bytes, flags: int) -> bytes:
    return payload[1 : len(payload) - payload[0]] if flags & PADDED else payload


def _metadata(headers: Headers) -> grpc.aio.Metadata:
    """What is not HTTP/2's or gRPC's own."""
    pairs: list[tuple[str, str | bytes]] = []
    for key, value in headers:
        if key.endswith(b"-bin"):
            # Without its padding, on the wire; values of several headers may be joined by commas.
            for part in value.split(b","):
                pairs.append((key.decode(), base64.b64decode(part + b"=" * (-len(part) % 4))))
        elif not key.startswith((b":", b"grpc-status", b"grpc-message")):
            pairs.append((key.decode(), value.decode()))
    return grpc.aio.Metadata(*pairs)
