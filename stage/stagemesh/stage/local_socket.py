"""The transport of the local queue: multipart messages over a pair of Unix sockets.

A message is one system call and one wake-up at each end; a queue with an I/O thread on both sides, such as
ZeroMQ's, has three. Nothing here limits how much may wait: a lane's depth does.
"""

from __future__ import annotations

import asyncio
import select
import socket
import struct
import threading
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol, TypeAlias

Buffer: TypeAlias = bytes | memoryview

_COUNT = struct.Struct("<Q")
READ_BYTES = 1 << 16
_SOCKET_BYTES = 1 << 20
_MAX_BUFFERS = 512
"""Of one sendmsg; the kernel takes 1,024."""


@dataclass(frozen=True, slots=True)
class Part:
    """A part of a message that was received; nobody writes its memory again."""

    buffer: memoryview

    @property
    def bytes(self) -> bytes:
        """A copy."""
        return bytes(self.buffer)


def socket_pair() -> tuple[socket.socket, socket.socket]:
    """Both ends of a queue."""
    ends = socket.socketpair(socket.AF_UNIX, socket.SOCK_STREAM)
    for end in ends:
        end.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, _SOCKET_BYTES)
    return ends


def encode(parts: Sequence[Buffer]) -> list[Buffer]:
    """The buffers of a message: how many parts, the length of each, the parts."""
    return [struct.pack(f"<{len(parts) + 1}Q", len(parts), *map(len, parts)), *parts]


class MessageReader:
    """Puts messages together from what comes out of a socket.

    Args:
        end: Blocking or not; `read` does as it does.
    """

    def __init__(self, end: socket.socket) -> None:
        self._socket = end
        # Made once: memory of this size for each message would come from the kernel and go back to it.
        self._buffer = memoryview(bytearray(READ_BYTES))
        self._rest = b""
        self._large: memoryview | None = None
        """A message that is longer than what was read of it; filled in place."""
        self._filled = 0
        self._whole: deque[list[Part]] = deque()

    def pop(self) -> list[Part] | None:
        """The oldest whole message, if there is one."""
        return self._whole.popleft() if self._whole else None

    def read(self) -> int:
        """Receive once: bytes that came, 0 if the other end is gone. BlockingIOError says that nothing is there."""
        try:
            if self._large is not None:
                return self._fill(self._large)
            count = self._socket.recv_into(self._buffer)
        except ConnectionResetError:
            return 0
        if count:
            self._split(self._rest + self._buffer[:count])
        return count

    def _fill(self, large: memoryview) -> int:
        count = self._socket.recv_into(large[self._filled :])
        self._filled += count
        if self._filled == len(large):
            self._large = None
            self._split(large)
        return count

    def _split(self, data: Buffer) -> None:
        view = memoryview(data)
        while True:
            length, lengths = _lengths(view)
            if not length or len(view) < length:
                break
            parts, begin = [], length - sum(lengths)
            for size in lengths:
                parts.append(Part(view[begin : begin + size]))
                begin += size
            self._whole.append(parts)
            view = view[length:]
        self._rest = b""
        if length > READ_BYTES:
            self._large, self._filled = memoryview(bytearray(length)), len(view)
            self._large[: len(view)] = view
        else:
            self._rest = bytes(view)


def _lengths(view: memoryview) -> tuple[int, tuple[int, ...]]:
    """Of the first message and of its parts; 0 where its header is not whole."""
    if len(view) < _COUNT.size:
        return 0, ()
    count = _COUNT.unpack_from(view)[0]
    header = _COUNT.size * (count + 1)
    if len(view) < header:
        return 0, ()
    lengths = struct.unpack_from(f"<{count}Q", view, _COUNT.size)
    return header + sum(lengths), lengths


class Inbox(Protocol):
    """Where a worker's messages come from."""

    def recv_multipart(self, timeout_s: float | None = None) -> list[Part] | None:
        """The next message; None if none came in time."""


class Outbox(Protocol):
    """Where a worker's messages go."""

    def send_multipart(self, parts: Sequence[Buffer]) -> None:
        """Send a message; what is given may be written again when it returns."""


class WorkerSocket:
    """The worker's end: it blocks. Any thread may send; one receives."""

    def __init__(self, end: socket.socket) -> None:
        self._socket = end
        self._reader = MessageReader(end)
        self._sending = threading.Lock()
        self._poll = select.poll()
        self._poll.register(end, select.POLLIN)

    def recv_multipart(self, timeout_s: float | None = None) -> list[Part] | None:
        """The next message; None if none came in time. EOFError when the leader is gone."""
        while (message := self._reader.pop()) is None:
            if timeout_s is not None and not self._poll.poll(timeout_s * 1000):
                return None
            if not self._reader.read():
                raise EOFError("the leader has closed the local queue")
        return message

    def send_multipart(self, parts: Sequence[Buffer]) -> None:
        """Send a message; what is given may be written again when it returns."""
        with self._sending:
            left = encode(parts)
            while left:
                left = _after(left, self._socket.sendmsg(left))

    def close(self) -> None:
        """Give the descriptor back."""
        self._socket.close()


class LeaderSocket:
    """The leader's end: it never blocks, and keeps what the socket does not take at once."""

    def __init__(self, end: socket.socket) -> None:
        end.setblocking(False)
        self._socket = end
        self._reader = MessageReader(end)
        self._left: deque[Buffer] = deque()
        self._loop = asyncio.get_running_loop()

    def fileno(self) -> int:
        """For the event loop: readable when `drain` has something."""
        return self._socket.fileno()

    def send_multipart(self, parts: Sequence[Buffer]) -> None:
        """Send a message, now or when there is room; it is dropped if the worker is gone: its watcher says that."""
        waiting = bool(self._left)
        self._left.extend(encode(parts))
        if not waiting:
            self._flush()

    def drain(self) -> list[list[Part]]:
        """Every message that has come. What is left after a full buffer makes the descriptor readable again."""
        try:
            if not self._reader.read():
                self._loop.remove_reader(self.fileno())
        except BlockingIOError:
            return []
        messages = []
        while message := self._reader.pop():
            messages.append(message)
        return messages

    def close(self) -> None:
        """Break off."""
        self._loop.remove_writer(self.fileno())
        self._loop.remove_reader(self.fileno())
        self._socket.close()

    def _flush(self) -> None:
        try:
            while self._left:
                some = [self._left.popleft() for _ in range(min(len(self._left), _MAX_BUFFERS))]
                try:
                    sent = self._socket.sendmsg(some)
                except BlockingIOError:
                    sent = 0
                left = _after(some, sent)
                self._left.extendleft(reversed(left))
                if left:
                    self._loop.add_writer(self.fileno(), self._flush)
                    return
        except (BrokenPipeError, ConnectionResetError):
            self._left.clear()
        self._loop.remove_writer(self.fileno())


def _after(buffers: Sequence[Buffer], sent: int) -> list[Buffer]:
    """What is left of them after that many bytes."""
    for index, buffer in enumerate(buffers):
        if sent < len(buffer):
            return [memoryview(buffer)[sent:], *buffers[index + 1 :]]
        sent -= len(buffer)
    return []
