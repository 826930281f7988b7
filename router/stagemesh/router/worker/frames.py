"""One end of the socket pair between router and API worker."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import cast

from stagemesh.router.worker.messages import HEADER, Kind, frame


class FrameProtocol(asyncio.Protocol):
    """Cuts what comes into frames.

    Args:
        on_frame: Called for each.
        on_lost: Called when the other side is gone.
    """

    def __init__(self, on_frame: Callable[[Kind, bytes], None], on_lost: Callable[[], None]) -> None:
        self._on_frame = on_frame
        self._on_lost = on_lost
        self._buffer = bytearray()
        self._transport: asyncio.WriteTransport | None = None

    def send(self, kind: Kind, content: bytes = b"") -> None:
        """Queue a frame; nothing happens once the other side is gone."""
        if self._transport is not None and not self._transport.is_closing():
            self._transport.write(frame(kind, content))

    def close(self) -> None:
        """Hang up."""
        if self._transport is not None:
            self._transport.close()

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        # uvloop's transports are not asyncio's classes, only their likes.
        self._transport = cast(asyncio.WriteTransport, transport)

    def data_received(self, data: bytes) -> None:
        buffer = self._buffer
        buffer += data
        begin, end = 0, len(buffer)
        while end - begin >= HEADER.size:
            length, kind = HEADER.unpack_from(buffer, begin)
            if end - begin < 4 + length:
                break
            content = bytes(buffer[begin + HEADER.size : begin + 4 + length])
            begin += 4 + length
            self._on_frame(Kind(kind), content)
        del buffer[:begin]

    def connection_lost(self, error: Exception | None) -> None:
        self._on_lost()
