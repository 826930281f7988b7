"""The transport of the local queue: multipart messages over a pair of Unix sockets.

A message is one system call and one wake-up at each end; a queue with an I/O thread on both sides, such as
ZeroMQ's, has three. Nothing here limits how much may wait: a lane's depth does. A message to a worker may bring
the end of a link with it, from which the worker takes messages as it does from its leader.
"""

from __future__ import annotations

import array
import asyncio
import select
import socket
import struct
import threading
import time
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
_DESCRIPTOR_BYTES = array.array("i").itemsize


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
        descriptors: Keep descriptors that come along; otherwise the kernel closes them.
    """

    def __init__(self, end: socket.socket, *, descriptors: bool = False) -> None:
        self._socket = end
        self._takes_descriptors = descriptors
        self.descriptors: deque[int] = deque()
        """Those that came, in the order of the messages that brought them."""
        # Made once: memory of this size for each message would come from the kernel and go back to it.
        self._buffer = memoryview(bytearray(READ_BYTES))
        self._rest = b""
        self._large: memoryview | None = None
        """A message that is longer than what was read of it; filled in place."""
        self._filled = 0
        self._whole: deque[list[Part]] = deque()

    @property
    def within(self) -> bool:
        """Whether a message has come in part."""
        return bool(self._rest) or self._large is not None

    def pop(self) -> list[Part] | None:
        """The oldest whole message, if there is one."""
        return self._whole.popleft() if self._whole else None

    def read(self) -> int:
        """Receive once: bytes that came, 0 if the other end is gone. BlockingIOError says that nothing is there."""
        try:
            if self._large is not None:
                return self._fill(self._large)
            count = self._receive(self._buffer)
        except ConnectionResetError:
            return 0
        if count:
            self._split(self._rest + self._buffer[:count])
        return count

    def _fill(self, large: memoryview) -> int:
        count = self._receive(large[self._filled :])
        self._filled += count
        if self._filled == len(large):
            self._large = None
            self._split(large)
        return count

    def _receive(self, into: memoryview) -> int:
        if not self._takes_descriptors:
            return self._socket.recv_into(into)
        count, ancillary, _, _ = self._socket.recvmsg_into(
            [into], socket.CMSG_SPACE(_DESCRIPTOR_BYTES), socket.MSG_CMSG_CLOEXEC
        )
        for _, _, data in ancillary:
            self.descriptors.extend(array.array("i", data))
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


class Source(Protocol):
    """Something besides the leader that has messages for a worker."""

    def fileno(self) -> int:
        """Readable when `read` has something."""

    def read(self, since_ns: int) -> list[list[Part]]:
        """What has come, as messages of the local queue; the worker has been waiting since then."""


class Inbox(Protocol):
    """Where a worker's messages come from."""

    def recv_multipart(self, timeout_s: float | None = None) -> list[Part] | None:
        """The next message; None if none came in time."""

    def take_end(self) -> socket.socket:
        """The socket that came with the message that was received last."""

    def add(self, source: Source) -> None:
        """Take messages from there too."""

    def remove(self, source: Source) -> None:
        """Take no more of them."""


class Outbox(Protocol):
    """Where a worker's messages go."""

    def send_multipart(self, parts: Sequence[Buffer]) -> None:
        """Send a message; what is given may be written again when it returns."""


class WorkerSocket:
    """The worker's end: it blocks. Any thread may send; one receives."""

    def __init__(self, end: socket.socket) -> None:
        self._socket = end
        self._reader = MessageReader(end, descriptors=True)
        self._sending = threading.Lock()
        self._poll = select.poll()
        self._poll.register(end, select.POLLIN)
        self._sources: dict[int, Source] = {}
        self._came: deque[list[Part]] = deque()
        """From the sources."""

    def recv_multipart(self, timeout_s: float | None = None) -> list[Part] | None:
        """The next message; None if none came in time. EOFError when the leader is gone."""
        while (message := self._pop()) is None:
            if self._sources or timeout_s is not None:
                since_ns = time.monotonic_ns()
                ready = self._poll.poll(None if timeout_s is None else timeout_s * 1000)
                if not ready:
                    return None
                for descriptor, _ in ready:
                    if source := self._sources.get(descriptor):
                        self._came.extend(source.read(since_ns))
                    else:
                        self._read()
            else:
                self._read()
        return message

    def take_end(self) -> socket.socket:
        """The socket that came with the message that was received last."""
        return socket.socket(fileno=self._reader.descriptors.popleft())

    def add(self, source: Source) -> None:
        """Take messages from there too; what the leader sent before comes first."""
        self._sources[source.fileno()] = source
        self._poll.register(source.fileno(), select.POLLIN)

    def remove(self, source: Source) -> None:
        """Take no more of them. What came already is still received."""
        if self._sources.pop(source.fileno(), None):
            self._poll.unregister(source.fileno())

    def _pop(self) -> list[Part] | None:
        return self._reader.pop() or (self._came.popleft() if self._came else None)

    def _read(self) -> None:
        if not self._reader.read():
            raise EOFError("the leader has closed the local queue")

    def send_multipart(self, parts: Sequence[Buffer]) -> None:
        """Send a message; what is given may be written again when it returns."""
        with self._sending:
            left = encode(parts)
            while left:
                left = after(left, self._socket.sendmsg(left))

    def close(self) -> None:
        """Give the descriptor back."""
        self._socket.close()


class LeaderSocket:
    """The leader's end: it never blocks, and keeps what the socket does not take at once."""

    def __init__(self, end: socket.socket) -> None:
        end.setblocking(False)
        self._socket = end
        self._reader = MessageReader(end)
        self._left: deque[Buffer | socket.socket] = deque()
        """A socket goes along with the message that follows it."""
        self._loop = asyncio.get_running_loop()

    def fileno(self) -> int:
        """For the event loop: readable when `drain` has something."""
        return self._socket.fileno()

    def send_multipart(self, parts: Sequence[Buffer], end: socket.socket | None = None) -> None:
        """Send a message, now or when there is room; it is dropped if the worker is gone: its watcher says that.

        `end` goes with the message and is closed here.
        """
        waiting = bool(self._left)
        if end is not None:
            self._left.append(end)
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
        self._drop()
        self._socket.close()

    def _drop(self) -> None:
        """What waits is for nobody any more."""
        for thing in self._left:
            if isinstance(thing, socket.socket):
                thing.close()
        self._left.clear()

    def _flush(self) -> None:
        end: socket.socket | None = None
        try:
            while self._left:
                end, some = self._take_some()
                try:
                    sent = self._socket.sendmsg(some, _rights(end))
                except BlockingIOError:
                    sent = 0
                left = after(some, sent)
                self._left.extendleft(reversed(left))
                if end is not None and sent:
                    end.close()
                elif end is not None:
                    self._left.appendleft(end)
                if left:
                    self._loop.add_writer(self.fileno(), self._flush)
                    return
        except (BrokenPipeError, ConnectionResetError):
            if end is not None:
                end.close()
            self._drop()
        self._loop.remove_writer(self.fileno())

    def _take_some(self) -> tuple[socket.socket | None, list[Buffer]]:
        """What one call sends: a socket goes with the bytes of its own message, and at their head."""
        end: socket.socket | None = None
        some: list[Buffer] = []
        while self._left and len(some) < _MAX_BUFFERS:
            first = self._left[0]
            if not isinstance(first, socket.socket):
                some.append(first)
            elif some:
                break
            else:
                end = first
            self._left.popleft()
        return end, some


def _rights(end: socket.socket | None) -> list[tuple[int, int, bytes]]:
    if end is None:
        return []
    return [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", [end.fileno()]).tobytes())]


def after(buffers: Sequence[Buffer], sent: int) -> list[Buffer]:
    """What is left of buffers of which that many bytes were sent."""
    for index, buffer in enumerate(buffers):
        if sent < len(buffer):
            return [memoryview(buffer)[sent:], *buffers[index + 1 :]]
        sent -= len(buffer)
    return []
