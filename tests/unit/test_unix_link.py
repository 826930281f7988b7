"""The unix transport: tensors whole and in order, its ends seen, and nothing that waits for a silent peer."""

from __future__ import annotations

import asyncio
import random
import socket
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from stagemesh.stage.leader.unix_link import UnixListener, UnixReading, connect
from stagemesh.stage.local_queue import TensorHeader, ToWorker
from stagemesh.stage.local_socket import LeaderSocket, Part, WorkerSocket, socket_pair
from stagemesh.stage.unix_link import UnixReceiver, UnixSender, unpack_times
from stagemesh.stage.worker.links import LinkEnds
from stagemesh.v1 import stage_pb2
from stagemesh.wire.columns import U64, pack
from stagemesh.wire.errors import FailedPreconditionError

KIND = stage_pb2.LINK_KIND_ACTIVATIONS
RING = stage_pb2.LINK_KIND_RING
EPOCH = 7
WAIT_S = 60.0
SIZES = (0, 1, 3000, 70_000, 3_000_000)
"""Of tensors: within one read, beyond it, and beyond what a socket holds."""


class Ends:
    """Both ends of a link, and what became of it."""

    def __init__(self, timeout_s: float = WAIT_S) -> None:
        ours, theirs = socket_pair()
        self.broken: list[str] = []
        self.told = threading.Event()
        self.sender = UnixSender(ours, EPOCH, KIND, timeout_s, self._note)
        self.receiver = UnixReceiver(theirs, EPOCH, KIND)

    def _note(self, how: str) -> None:
        self.broken.append(how)
        self.told.set()

    def read_until(self, count: int) -> list[list[Part]]:
        messages: list[list[Part]] = []
        deadline = time.monotonic() + WAIT_S
        while len(messages) < count:
            messages += self.receiver.read(time.monotonic_ns())
            assert time.monotonic() < deadline
        return messages


@pytest.fixture
def ends() -> Iterator[Ends]:
    both = Ends()
    yield both
    both.sender.close()
    both.receiver.close()


def test_tensors_of_every_size_come_whole_and_in_order(ends: Ends) -> None:
    draw = random.Random(3)
    sent = [draw.randbytes(draw.choice(SIZES)) for _ in range(40)]
    for step, data in enumerate(sent, 1):
        ends.sender.send(step, memoryview(data))  # 30 MB that nobody reads yet: it must not block
    came = ends.read_until(len(sent))
    assert [message[0].bytes for message in came] == [ToWorker.TENSOR] * len(sent)
    headers = [TensorHeader.unpack(message[2].buffer) for message in came]
    assert [(one.epoch, one.kind, one.step) for one in headers] == [
        (EPOCH, KIND, step) for step in range(1, len(sent) + 1)
    ]
    assert [message[3].bytes for message in came] == sent
    for header, message in zip(headers, came, strict=True):
        first_ns, last_ns = unpack_times(message[1].buffer)
        assert header.sent_ns <= first_ns <= last_ns <= time.monotonic_ns()


def test_what_was_there_before_the_wait_came_when_it_was_sent(ends: Ends) -> None:
    ends.sender.send(1, memoryview(b"early"))
    (early,) = ends.receiver.read(time.monotonic_ns())
    since_ns = time.monotonic_ns()
    ends.sender.send(2, memoryview(b"late"))
    (late,) = ends.receiver.read(since_ns)
    sent_ns = [TensorHeader.unpack(message[2].buffer).sent_ns for message in (early, late)]
    came_ns = [unpack_times(message[1].buffer)[0] for message in (early, late)]
    assert came_ns[0] == sent_ns[0]
    assert came_ns[1] > sent_ns[1]


def test_a_receiver_that_takes_nothing_is_given_up_and_said_to_be() -> None:
    both = Ends(timeout_s=0.2)
    both.sender.send(1, memoryview(bytes(8_000_000)))
    assert both.told.wait(WAIT_S), "the sender waits for ever"
    assert both.broken == ["the receiver took nothing for 0.2 s"]
    both.sender.send(2, memoryview(b"x"))  # of a broken link: dropped
    both.receiver.close()


@pytest.mark.parametrize("num_bytes", [5, 8_000_000])
def test_a_receiver_that_is_gone(num_bytes: int) -> None:
    """Found in the call, or by the thread that has the rest."""
    both = Ends()
    if num_bytes > 5:
        both.sender.send(1, memoryview(bytes(num_bytes)))
    both.receiver.close()
    both.sender.send(2, memoryview(bytes(5)))
    assert both.told.wait(WAIT_S)
    assert len(both.broken) == 1


def test_the_end_of_a_link_comes_after_what_was_sent(ends: Ends) -> None:
    ends.sender.send(1, memoryview(b"last words"))
    ends.sender.close()
    tensor, ended = ends.read_until(2)
    assert tensor[3].bytes == b"last words"
    assert [part.bytes for part in ended] == [ToWorker.ENDED, pack([EPOCH, KIND], U64)]
    assert ends.receiver.read(0) == []
    assert ends.broken == [], "who closes a link is not told that it broke"


async def test_a_worker_gets_its_ends_from_the_leader_and_drops_them_with_the_epoch() -> None:
    """A sending and a receiving end, among messages that fill the queue; then a new epoch closes both."""
    ours, theirs = socket_pair()
    leader, worker = LeaderSocket(ours), WorkerSocket(theirs)
    in_here, in_there = socket_pair()
    out_here, out_there = socket_pair()
    lost: list[tuple[int, str, str]] = []
    links = LinkEnds(worker, WAIT_S, lambda *what: lost.append(what))
    filler = bytes(600_000)
    leader.send_multipart([ToWorker.STEPS, filler])
    leader.send_multipart([ToWorker.LINK, pack([EPOCH, KIND, 0], U64), b"host:1"], in_here)
    leader.send_multipart([ToWorker.LINK, pack([EPOCH, RING, 1], U64), b"host:2"], out_here)
    leader.send_multipart([ToWorker.STEPS, filler])
    kinds = []
    for _ in range(4):
        message = await asyncio.to_thread(worker.recv_multipart, WAIT_S)
        assert message is not None
        kinds.append(message[0].bytes)
        if kinds[-1] == ToWorker.LINK:
            links.take(worker.take_end(), message[1:])
    assert kinds == [ToWorker.STEPS, ToWorker.LINK, ToWorker.LINK, ToWorker.STEPS]

    neighbour = UnixSender(in_there, EPOCH, KIND, WAIT_S, lambda _: None)
    neighbour.send(3, memoryview(b"hidden"))
    message = worker.recv_multipart(WAIT_S)
    assert message is not None
    assert (message[0].bytes, message[3].bytes) == (ToWorker.TENSOR, b"hidden")
    assert worker.recv_multipart(0.01) is None, "it waits no longer than it is told to"

    other = UnixReceiver(out_there, EPOCH, RING)
    assert not links.send(EPOCH - 1, RING, 1, memoryview(b"old")), "of an older epoch"
    assert not links.send(EPOCH, KIND, 1, memoryview(b"other")), "of a link that does not go out from here"
    assert links.send(EPOCH, RING, 9, memoryview(b"tokens"))
    (ring,) = other.read(time.monotonic_ns())
    assert ring[3].bytes == b"tokens"

    links.close_senders(EPOCH - 1)
    assert other.read(time.monotonic_ns()) == []
    links.close()
    assert [message[0].bytes for message in other.read(time.monotonic_ns())] == [ToWorker.ENDED]
    neighbour.send(4, memoryview(b"nobody is there"))
    assert worker.recv_multipart(0.01) is None
    assert lost == []
    leader.close()
    worker.close()


def test_a_worker_is_told_when_its_neighbour_is_gone_and_goes_on() -> None:
    ours, theirs = socket_pair()
    worker = WorkerSocket(theirs)
    end, there = socket_pair()
    out, away = socket_pair()
    lost: list[tuple[int, str, str]] = []
    links = LinkEnds(worker, WAIT_S, lambda *what: lost.append(what))
    links.take(end, [Part(memoryview(pack([EPOCH, KIND, 0], U64))), Part(memoryview(b"host:1"))])
    links.take(out, [Part(memoryview(pack([EPOCH, RING, 1], U64))), Part(memoryview(b"host:2"))])
    there.close()
    message = worker.recv_multipart(WAIT_S)
    assert message is not None
    assert message[0].bytes == ToWorker.ENDED
    links.ended(EPOCH, KIND)
    assert worker.recv_multipart(0.01) is None
    assert lost == [], "the stage that went says why"
    away.close()
    assert links.send(EPOCH, RING, 1, memoryview(b"tokens"))
    ((epoch, what, peer),) = lost
    assert (epoch, peer) == (EPOCH, "host:2")
    assert "ring link to host:2" in what
    ours.close()
    worker.close()


async def open_link(folder: Path, epoch: int = EPOCH) -> tuple[socket.socket, socket.socket]:
    listener = UnixListener(folder, EPOCH, KIND)
    try:
        one, other = await asyncio.gather(
            connect(listener.path, epoch, KIND, WAIT_S), listener.accept(WAIT_S), return_exceptions=True
        )
    finally:
        listener.close()
    assert not Path(listener.path).exists()
    for end in (one, other):
        if isinstance(end, BaseException):
            raise end
    assert isinstance(one, socket.socket)
    assert isinstance(other, socket.socket)
    return one, other


async def test_leaders_connect_over_a_path(tmp_path: Path) -> None:
    one, other = await open_link(tmp_path)
    for end in (one, other):
        end.setblocking(True)
    one.sendall(b"x")
    assert other.recv(10) == b"x", "nothing of the greeting is left in the link"
    one.close()
    other.close()


async def test_a_link_of_another_epoch_is_not_made(tmp_path: Path) -> None:
    with pytest.raises(FailedPreconditionError) as raised:
        await open_link(tmp_path, EPOCH - 1)
    assert raised.value.reason == "TRANSPORT_FAILED"


async def test_a_path_that_is_not_here_and_one_that_is_too_long(tmp_path: Path) -> None:
    with pytest.raises(FailedPreconditionError, match="cannot be opened here: No such file"):
        await connect(str(tmp_path / "elsewhere"), EPOCH, KIND, WAIT_S)
    with pytest.raises(FailedPreconditionError, match="too long"):
        UnixListener(tmp_path / ("x" * 120), EPOCH, KIND)


async def test_a_sender_that_does_not_come_or_says_nothing(tmp_path: Path) -> None:
    listener = UnixListener(tmp_path, EPOCH, KIND)
    with pytest.raises(FailedPreconditionError, match="nobody came for the activations link"):
        await listener.accept(0.05)
    with socket.socket(socket.AF_UNIX) as silent:
        silent.connect(listener.path)
        with pytest.raises(FailedPreconditionError, match="says nothing within"):
            await listener.accept(0.05)
    listener.close()


async def test_a_sender_that_resets_its_connection(tmp_path: Path) -> None:
    """What it did not read goes with it, which makes of its end a reset."""
    listener = UnixListener(tmp_path, EPOCH, KIND)
    with socket.socket(socket.AF_UNIX) as gone:
        gone.connect(listener.path)
        gone.sendall(pack([EPOCH, KIND], U64))
    with pytest.raises(FailedPreconditionError, match="the other end of the socket is gone") as raised:
        await listener.accept(WAIT_S)
    assert raised.value.reason == "TRANSPORT_FAILED"
    listener.close()


async def test_a_socket_that_waits_for_a_worker_is_closed_with_the_queue() -> None:
    ours, theirs = socket_pair()
    leader = LeaderSocket(ours)
    here, there = socket_pair()
    leader.send_multipart([ToWorker.STEPS, bytes(8_000_000)])  # nobody reads it
    leader.send_multipart([ToWorker.LINK, pack([EPOCH, KIND, 0], U64), b"host:1"], here)
    leader.close()
    assert here.fileno() == -1
    there.close()
    theirs.close()


@pytest.mark.parametrize("waits", [False, True])
async def test_a_socket_for_a_worker_that_is_gone_is_closed(waits: bool) -> None:
    ours, theirs = socket_pair()
    leader = LeaderSocket(ours)
    here, there = socket_pair()
    if waits:
        leader.send_multipart([ToWorker.STEPS, bytes(8_000_000)])
    else:
        theirs.close()
    leader.send_multipart([ToWorker.LINK, pack([EPOCH, KIND, 0], U64), b"host:1"], here)
    theirs.close()
    while here.fileno() != -1:
        await asyncio.sleep(0.01)
    there.close()
    leader.close()


async def test_a_leader_reads_for_several_ranks() -> None:
    ours, theirs = socket_pair()
    sender = UnixSender(ours, EPOCH, KIND, WAIT_S, lambda _: None)
    came: list[list[bytes]] = []
    done = asyncio.Event()

    def hand(kind: ToWorker, *parts: memoryview) -> None:
        came.append([kind, *map(bytes, parts)])
        if kind is ToWorker.ENDED:
            done.set()

    reading = UnixReading(UnixReceiver(theirs, EPOCH, KIND), hand)
    sender.send(1, memoryview(b"a"))
    sender.send(2, memoryview(bytes(2_000_000)))
    while len(came) < 2:
        await asyncio.sleep(0.01)
    sender.close()
    await asyncio.wait_for(done.wait(), WAIT_S)
    assert [message[0] for message in came] == [ToWorker.TENSOR, ToWorker.TENSOR, ToWorker.ENDED]
    assert [len(message[3]) for message in came[:2]] == [1, 2_000_000]
    reading.close()
