"""How leaders make a unix link: one listens on a path, the other opens it, both say what the link is.

That the path can be opened is the proof of one host: stages in containers may share a boot id and no file system.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import secrets
import socket
import time
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import TypeVar

from stagemesh.stage.link_name import link_name
from stagemesh.stage.local_queue import ToWorker
from stagemesh.stage.unix_link import UnixReceiver
from stagemesh.wire.columns import U64, pack
from stagemesh.wire.errors import FailedPreconditionError

Answer = TypeVar("Answer")


class UnixListener:
    """The receiving side of a link until it is connected.

    Args:
        folder: To listen in; nobody but this user can look into it.
        epoch: Of the lane.
        kind: LinkKind.
    """

    def __init__(self, folder: Path, epoch: int, kind: int) -> None:
        self.path = str(folder / f"link-{secrets.token_hex(8)}")
        self._hello = pack([epoch, kind], U64)
        self._kind = kind
        self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        self._socket.setblocking(False)
        try:
            self._socket.bind(self.path)
        except OSError as error:
            self._socket.close()
            raise _failed(f"cannot listen on {self.path}: {error.strerror or error}") from error
        self._socket.listen(1)

    async def accept(self, timeout_s: float) -> socket.socket:
        """The connected socket; FailedPreconditionError if the sender does not come or wants something else."""
        loop = asyncio.get_running_loop()
        what = f"nobody came for the {link_name(self._kind)} link"
        end, _ = await _in_time(loop.sock_accept(self._socket), timeout_s, what)
        try:
            await _shake(end, self._hello, timeout_s, answer=True)
        except OSError as error:
            end.close()
            raise _failed(f"the other end of the socket is gone: {error.strerror or error}") from error
        except BaseException:
            end.close()
            raise
        return end

    def close(self) -> None:
        """Listen no more."""
        self._socket.close()
        with contextlib.suppress(FileNotFoundError):
            os.unlink(self.path)


async def connect(path: str, epoch: int, kind: int, timeout_s: float) -> socket.socket:
    """The sending side of a link, connected; FailedPreconditionError says why it cannot be."""
    loop = asyncio.get_running_loop()
    end = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    end.setblocking(False)
    try:
        await _in_time(loop.sock_connect(end, path), timeout_s, f"{path} takes no connection")
        await _shake(end, pack([epoch, kind], U64), timeout_s, answer=False)
    except OSError as error:
        end.close()
        raise _failed(
            f"the receiver's socket {path} cannot be opened here: {error.strerror or error}"
        ) from error
    except BaseException:
        end.close()
        raise
    return end


class UnixReading:
    """Reads a link in the leader's loop, for all ranks.

    Args:
        receiver: Its end.
        hand: Called with each message for the ranks.
    """

    def __init__(self, receiver: UnixReceiver, hand: Callable[..., None]) -> None:
        self._receiver = receiver
        self._hand = hand
        self._loop = asyncio.get_running_loop()
        self._loop.add_reader(receiver.fileno(), self._read)

    def close(self) -> None:
        """Break off."""
        self._loop.remove_reader(self._receiver.fileno())
        self._receiver.close()

    def _read(self) -> None:
        for kind, *parts in self._receiver.read(time.monotonic_ns()):
            if kind.bytes == ToWorker.ENDED:
                self._loop.remove_reader(self._receiver.fileno())
            self._hand(ToWorker(kind.bytes), *(part.buffer for part in parts))


async def _shake(end: socket.socket, hello: bytes, timeout_s: float, *, answer: bool) -> None:
    """Both sides send what the link is: the sender first, the receiver when it has seen that it is the same."""
    loop = asyncio.get_running_loop()
    if not answer:
        await loop.sock_sendall(end, hello)
    said = b""
    while len(said) < len(hello):
        what = "the other end of the socket says nothing"
        some = await _in_time(loop.sock_recv(end, len(hello) - len(said)), timeout_s, what)
        if not some:
            raise _failed("the other end of the socket closed it")
        said += some
    if said != hello:
        raise _failed("the other end of the socket is of another lane")
    if answer:
        await loop.sock_sendall(end, hello)


async def _in_time(doing: Awaitable[Answer], timeout_s: float, what: str) -> Answer:
    try:
        return await asyncio.wait_for(doing, timeout_s)
    except TimeoutError:
        raise _failed(f"{what} within {timeout_s:g} s") from None


def _failed(what: str) -> FailedPreconditionError:
    return FailedPreconditionError(what, reason="TRANSPORT_FAILED")
