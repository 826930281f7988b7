"""The unix transport of a link: tensors over a Unix socket, from worker to worker of two stages on one host.

The leaders make the connection (leader/unix_link.py) and hand its ends to the workers; from then on no other process
is in a tensor's way. A tensor is one message: a TensorHeader and the bytes. What waits in the sender is bounded by the
lane's depth, since a stage gets no step beyond it. The receiver looks for the lane's messages and the link's at
once, so that a silent peer never keeps it from its leader.
"""

from __future__ import annotations

import contextlib
import select
import socket
import struct
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence

from stagemesh.stage.local_queue import TensorHeader, ToWorker
from stagemesh.stage.local_socket import Buffer, MessageReader, Part, after, encode

TRANSPORT = "unix"
_TIMES = struct.Struct("<QQ")


class UnixSender:
    """The sending end. What the socket does not take at once a thread sends on, behind which later tensors queue.

    Args:
        end: Connected; it is closed by `close`.
        epoch: Of the lane.
        kind: LinkKind.
        timeout_s: A receiver that takes nothing for so long is given up.
        on_broken: Called once with how, if the link ends before `close`; from any thread.
    """

    def __init__(
        self,
        end: socket.socket,
        epoch: int,
        kind: int,
        timeout_s: float,
        on_broken: Callable[[str], None],
    ) -> None:
        end.setblocking(False)
        self._socket = end
        self._epoch = epoch
        self._kind = kind
        self._timeout_s = timeout_s
        self._on_broken = on_broken
        self._lock = threading.Condition()
        self._left: deque[Sequence[Buffer]] = deque()
        """Messages, the first of them perhaps in part. While there are any, the thread alone sends."""
        self._thread: threading.Thread | None = None
        self._closed = False

    def send(self, step: int, data: memoryview) -> None:
        """Send a tensor's bytes, which must stay as they are; never blocks."""
        header = TensorHeader(self._epoch, self._kind, step, time.monotonic_ns())
        message: Sequence[Buffer] = encode([header.pack(), data])
        with self._lock:
            if self._closed:
                return
            if not self._left:
                try:
                    message = self._send_some(message)
                except OSError as error:
                    self._break(error.strerror or type(error).__name__)
                    return
            if message:
                self._left.append(message)
                self._start()
                self._lock.notify()

    def close(self) -> None:
        """Break off; the peer's end reads that it has ended."""
        with self._lock:
            if self._closed:
                return
            self._closed = True
            self._left.clear()
            with contextlib.suppress(OSError):  # the peer may have gone already
                self._socket.shutdown(socket.SHUT_RDWR)
            self._lock.notify()
            if self._thread is None:
                self._socket.close()

    def _send_some(self, message: Sequence[Buffer]) -> Sequence[Buffer]:
        """What is left of it."""
        try:
            while message:
                message = after(message, self._socket.sendmsg(message))
        except BlockingIOError:
            pass  # the rest when there is room
        return message

    def _start(self) -> None:
        if self._thread is None:
            self._thread = threading.Thread(target=self._run, name="link", daemon=True)
            self._thread.start()

    def _run(self) -> None:
        room = select.poll()
        room.register(self._socket, select.POLLOUT)
        while True:
            with self._lock:
                self._lock.wait_for(lambda: self._left or self._closed)
                if self._closed:
                    self._socket.close()
                    return
            ready = room.poll(self._timeout_s * 1000)
            with self._lock:
                if self._closed:
                    continue
                try:
                    if not ready:
                        raise TimeoutError(f"the receiver took nothing for {self._timeout_s:g} s")
                    if left := self._send_some(self._left.popleft()):
                        self._left.appendleft(left)
                except OSError as error:
                    self._break(error.strerror or str(error))

    def _break(self, how: str) -> None:
        self._closed = True
        self._left.clear()
        if self._thread is None:
            self._socket.close()
        self._on_broken(how)


class UnixReceiver:
    """The receiving end: a source of a worker's messages, or of a leader that hands them to all its ranks.

    Args:
        end: Connected; it is closed by `close`.
        epoch: Of the lane.
        kind: LinkKind.
    """

    def __init__(self, end: socket.socket, epoch: int, kind: int) -> None:
        end.setblocking(False)
        self.epoch = epoch
        self.kind = kind
        self._socket = end
        self._reader = MessageReader(end)
        self._first_ns = 0
        self._ended = False

    def fileno(self) -> int:
        """Readable when `read` has something."""
        return self._socket.fileno()

    def read(self, since_ns: int) -> list[list[Part]]:
        """Every tensor that is whole, as a TENSOR; ENDED once when the link has.

        `since_ns` is when the caller began to wait. What was sent before that was there and came when it was sent
        (one host has one monotonic clock); what was sent later came now.
        """
        messages: list[list[Part]] = []
        while not self._ended:
            within = self._reader.within
            try:
                count = self._reader.read()
            except BlockingIOError:
                break
            now_ns = time.monotonic_ns()
            if not count:
                self._ended = True
                messages.append(_parts(ToWorker.ENDED, struct.pack("<QQ", self.epoch, self.kind)))
                break
            while message := self._reader.pop():
                sent_ns = TensorHeader.unpack(message[0].buffer).sent_ns
                came_ns = sent_ns if sent_ns < since_ns else now_ns
                first_ns, last_ns = (self._first_ns, now_ns) if within else (came_ns, came_ns)
                within = False
                messages.append([*_parts(ToWorker.TENSOR, _TIMES.pack(first_ns, last_ns)), *message])
            if not self._reader.within:
                break
            if not within:
                self._first_ns = now_ns
        return messages

    def close(self) -> None:
        """Break off; the peer finds out when it sends."""
        self._ended = True
        self._socket.close()


def unpack_times(data: memoryview) -> tuple[int, int]:
    """When a tensor began to come and when it was whole, monotonic nanoseconds."""
    first_ns, last_ns = _TIMES.unpack(data)
    return first_ns, last_ns


def _parts(*parts: bytes) -> list[Part]:
    return [Part(memoryview(part)) for part in parts]
