"""The queue between a leader and a worker: whole messages, in order, whatever the socket takes at once."""

from __future__ import annotations

import asyncio
import random
import socket

import pytest

from stagemesh.stage.local_socket import LeaderSocket, WorkerSocket, encode, socket_pair

SIZES = (0, 1, 9, 1000, 300_000, 3_000_000)


def messages(count: int) -> list[list[bytes]]:
    draw = random.Random(7)
    return [[draw.randbytes(draw.choice(SIZES)) for _ in range(draw.randrange(1, 4))] for _ in range(count)]


async def test_both_directions_keep_messages_whole_and_in_order() -> None:
    ours, theirs = socket_pair()
    leader, worker = LeaderSocket(ours), WorkerSocket(theirs)
    sent = messages(60)

    def echo() -> None:
        for _ in sent:
            message = worker.recv_multipart()
            assert message is not None
            worker.send_multipart([part.buffer for part in message])

    came: list[list[bytes]] = []
    everything = asyncio.Event()

    def drain() -> None:
        came.extend([part.bytes for part in message] for message in leader.drain())
        if len(came) == len(sent):
            everything.set()

    asyncio.get_running_loop().add_reader(leader.fileno(), drain)
    echoing = asyncio.create_task(asyncio.to_thread(echo))
    for message in sent:  # far more than the socket holds: the leader must not block
        leader.send_multipart(message)
    await asyncio.wait_for(asyncio.gather(everything.wait(), echoing), 60)
    assert came == sent
    leader.close()
    worker.close()


async def test_a_message_that_comes_byte_by_byte() -> None:
    ours, theirs = socket_pair()
    worker = WorkerSocket(theirs)

    def trickle() -> None:
        for byte in b"".join(encode([b"S", b"", b"abc"])):
            ours.send(bytes([byte]))

    sending = asyncio.create_task(asyncio.to_thread(trickle))
    message = await asyncio.to_thread(worker.recv_multipart)
    assert message is not None
    assert [part.bytes for part in message] == [b"S", b"", b"abc"]
    await sending
    ours.close()
    worker.close()


def test_the_worker_waits_as_long_as_it_is_told() -> None:
    ours, theirs = socket_pair()
    worker = WorkerSocket(theirs)
    assert worker.recv_multipart(0.01) is None
    ours.close()
    with pytest.raises(EOFError, match="closed the local queue"):
        worker.recv_multipart()
    worker.close()


async def test_a_worker_that_is_gone_breaks_nothing_and_its_last_words_are_heard() -> None:
    ours, theirs = socket_pair()
    leader, worker = LeaderSocket(ours), WorkerSocket(theirs)
    worker.send_multipart([b"!", b"last words"])
    theirs.shutdown(socket.SHUT_RDWR)
    worker.close()
    leader.send_multipart([b"S", bytes(100)])
    leader.send_multipart([b"S", bytes(100)])
    assert [[part.bytes for part in message] for message in leader.drain()] == [[b"!", b"last words"]]
    leader.close()
