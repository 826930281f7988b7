"""The public side alone: a real gRPC server in this process, and a scheduler's side that does as a test says."""

from __future__ import annotations

import asyncio
import gc
import time
import tracemalloc
from collections.abc import AsyncIterator, Iterable
from dataclasses import dataclass, replace
from typing import Any

import grpc
import numpy as np
import pytest
from google.rpc import status_pb2
from served_models import IDS

from stagemesh.router.api import session
from stagemesh.router.api.backend import End
from stagemesh.router.api.checking import check
from stagemesh.router.api.public_server import PublicServer
from stagemesh.router.api.served_model import ServedModel
from stagemesh.router.api.session import MAX_UNTOLD, MESSAGE_TOKENS, Session
from stagemesh.router.api.stream import RequestStream
from stagemesh.router.api.streams import Streams
from stagemesh.router.scheduler import Finish, Request
from stagemesh.router.worker.messages import pack_deltas, pack_submit, unpack_deltas, unpack_submit
from stagemesh.v1 import inference_pb2 as pb
from stagemesh.v1 import inference_pb2_grpc
from stagemesh.wire.errors import InternalError, ResourceExhaustedError, UnavailableError
from stagemesh.wire.status import from_proto, from_rpc_error

NO_ROWS = np.zeros(0, np.uint32)


class Scripted:
    """A Backend that keeps what it is asked, and gives what a test says."""

    def __init__(self, streams: Streams) -> None:
        self.streams = streams
        self.submitted: dict[str, tuple[int, Request]] = {}
        self.abandoned: list[int] = []
        self.refusals: list[str] = []
        self.refuse_all = False
        self.answer_all = False

    def submit(self, handle: int, request: Request, arrived: float) -> None:
        self.submitted[request.request_id] = (handle, request)
        if self.refuse_all:
            error = ResourceExhaustedError("full", reason="QUEUE_FULL", retry_after_s=0.5)
            self.streams.fail(handle, error.of_request(request.request_id))
        if self.answer_all:
            self.give({request.request_id: 7}, ends=[request.request_id])

    def abandon(self, handle: int) -> None:
        self.abandoned.append(handle)

    def refused(self, code: str) -> None:
        self.refusals.append(code)

    async def abort(self, request_id: str) -> bool:
        return request_id in self.submitted

    def handle(self, request_id: str) -> int:
        return self.submitted[request_id][0]

    def give(self, tokens: dict[str, int], ends: Iterable[str] = ()) -> None:
        """A step: a token each, and who ended with it."""
        handles = np.array([self.handle(name) for name in tokens], np.uint32)
        finished = [End(self.handle(name), Finish.LENGTH, 0) for name in ends]
        self.streams.take(handles, np.array(list(tokens.values()), np.uint32), finished)

    async def wait(self, *names: str) -> None:
        while not set(names) <= set(self.submitted):
            await asyncio.sleep(0.005)


class Side:
    """The public side, its backend and a stub."""

    def __init__(self) -> None:
        model = replace(IDS, max_context=20_000)
        self.streams = Streams(model)
        self.backend = Scripted(self.streams)
        self.streams.backend = self.backend


@pytest.fixture
async def side() -> AsyncIterator[Any]:
    side: Any = Side()
    server = PublicServer(side.streams)
    address = await server.start("127.0.0.1:0")
    async with grpc.aio.insecure_channel(address) as channel:
        side.address, side.channel = address, channel
        side.stub = inference_pb2_grpc.InferenceServiceStub(channel)
        yield side
    await server.stop(0)


def start(*names: str, **fields: Any) -> pb.SessionRequest:
    ids = pb.TokenIds(ids=[5, 6])
    return pb.SessionRequest(
        start=[pb.GenerateRequest(request_id=name, token_ids=ids, **fields) for name in names]
    )


async def test_a_step_is_one_message_with_every_delta(side: Any) -> None:
    call = side.stub.Session()
    await call.write(start("a", "b", "c"))
    await side.backend.wait("a", "b", "c")
    side.backend.give({"a": 7, "b": 8, "c": 9})
    first = await call.read()
    assert (first.request_ids, first.token_ids, first.token_counts) == (["a", "b", "c"], [7, 8, 9], [1, 1, 1])
    side.backend.give({"c": 3, "a": 4}, ends=["c"])
    second = await call.read()
    assert (second.request_ids, second.token_ids) == (["c", "a"], [3, 4])
    assert [(end.request_id, end.usage.completion_tokens) for end in second.ends] == [("c", 2)]


async def test_unparsable_bytes_end_a_session_at_once_and_its_requests_with_it(side: Any) -> None:
    call = side.channel.stream_stream(
        "/stagemesh.v1.InferenceService/Session",
        request_serializer=lambda message: message,
        response_deserializer=pb.SessionResponse.FromString,
    )()
    await call.write(start("a", "b").SerializeToString())
    await side.backend.wait("a", "b")
    side.backend.give({"a": 7})
    assert (await call.read()).request_ids == ["a"]
    await call.write(b"\xff\xff\xff")
    with pytest.raises(grpc.aio.AioRpcError) as raised:
        await call.read()
    assert raised.value.code() is grpc.StatusCode.INVALID_ARGUMENT
    assert "stagemesh.v1.SessionRequest" in (raised.value.details() or "")
    assert sorted(side.backend.abandoned) == [side.backend.handle("a"), side.backend.handle("b")]
    assert len(side.streams) == 0


async def test_a_client_that_does_not_read_costs_no_message_a_token(side: Any) -> None:
    """What waits for it is merged: objects are counted, not time."""
    call = side.stub.Session()
    names = ["a", "b", "c", "d"]
    await call.write(start(*names))
    await side.backend.wait(*names)
    gc.collect()
    before = len(gc.get_objects())
    for step in range(10_000):
        side.backend.give(dict.fromkeys(names, step % 1000))
        if step % 100 == 0:
            await asyncio.sleep(0)
    gc.collect()
    assert len(gc.get_objects()) - before < 2_000
    assert sum(type(one) is RequestStream for one in gc.get_objects()) == len(names)
    side.backend.give(dict.fromkeys(names, 1), ends=names)
    messages, token_ids, ended = 0, dict.fromkeys(names, 0), 0
    while ended < len(names):
        response = await call.read()
        messages += 1
        ended += len(response.ends)
        for name, count in zip(response.request_ids, response.token_counts, strict=True):
            token_ids[name] += count
    assert token_ids == dict.fromkeys(names, 10_001)
    assert messages < 2_000


async def test_a_token_that_waits_takes_a_few_bytes(side: Any) -> None:
    call = side.stub.Session()
    await call.write(start("a"))
    await side.backend.wait("a")
    tracemalloc.start()
    for step in range(20_000):  # in one turn: its reader takes none of them
        side.backend.give({"a": 300 + step % 700})
    held, _ = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert held < 10 * 20_000


async def test_thousands_of_requests_leave_nothing_behind(side: Any) -> None:
    async def round_of(count: int) -> int:
        call = side.stub.Session()
        names = [f"r{number}" for number in range(count)]
        await call.write(start(*names))
        await side.backend.wait(*names)
        side.backend.give(dict.fromkeys(names, 3), ends=names)
        ended = 0
        while ended < count:
            ended += len((await call.read()).ends)
        await call.done_writing()
        assert await call.read() is grpc.aio.EOF  # type: ignore[attr-defined]
        side.backend.submitted.clear()
        del call
        await asyncio.sleep(0.05)
        gc.collect()
        return len(gc.get_objects())

    sizes = [await round_of(500) for _ in range(4)]
    assert len(side.streams) == 0
    assert sizes[-1] - sizes[1] < 500, "an object or more is kept for each request"


async def test_what_the_scheduler_refuses_ends_that_request_alone(side: Any) -> None:
    call = side.stub.Session()
    await call.write(start("good"))
    await side.backend.wait("good")
    side.backend.refuse_all = True
    await call.write(start("late"))
    [end] = (await call.read()).ends
    error = from_proto(status_pb2.Status.FromString(end.status))
    assert (end.request_id, type(error), error.retry_after_s) == ("late", ResourceExhaustedError, 0.5)
    with pytest.raises(grpc.aio.AioRpcError) as raised:
        await side.stub.Generate(start("other").start[0]).read()
    assert raised.value.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
    side.backend.give({"good": 4}, ends=["good"])
    assert (await call.read()).token_ids == [4]


async def test_refusals_do_not_pile_up_for_a_client_that_does_not_read(side: Any) -> None:
    """One that only asks is not read any more; one that reads gets every refusal."""
    call = side.stub.Session()
    bad = start(*(f"bad{number}" for number in range(5_000)), temperature=-1.0)
    await call.write(bad)
    ended = 0
    while ended < 5_000:
        response = await call.read()
        assert len(response.ends) <= MAX_UNTOLD
        ended += len(response.ends)
    assert len(side.backend.refusals) == 5_000


async def test_answers_do_not_pile_up_for_a_client_that_does_not_read(side: Any) -> None:
    """Each is answered at once; what waits is bounded, and one that reads after all gets every answer."""
    names = [f"{number:0120d}" for number in range(12_000)]
    # Without the probe its window does not grow: what is not read soon holds up who writes.
    channel = grpc.aio.insecure_channel(side.address, (("grpc.http2.bdp_probe", 0),))
    call = inference_pb2_grpc.InferenceServiceStub(channel).Session()  # type: ignore[no-untyped-call]

    async def ask() -> None:
        for begin in range(0, len(names), 100):
            await call.write(start(*names[begin : begin + 100]))

    side.backend.answer_all = True
    asking = asyncio.create_task(ask())
    taken, unchanged = 0, 0
    while unchanged < 20 and not asking.done():
        await asyncio.sleep(0.01)
        unchanged = unchanged + 1 if len(side.backend.submitted) == taken else 0
        taken = len(side.backend.submitted)
    waiting = sum(type(one) is RequestStream for one in gc.get_objects())
    assert waiting < MAX_UNTOLD + 200, f"of {taken} taken"
    ended = 0
    while ended < len(names):
        ended += len((await call.read()).ends)
    await asking
    await channel.close()


async def test_what_waits_for_a_client_comes_in_messages_that_it_can_take(side: Any) -> None:
    names, count = [f"r{number}" for number in range(300)], 1_000
    call = side.stub.Session()
    await call.write(start(*names))
    await side.backend.wait(*names)
    for _ in range(count):
        side.backend.give(dict.fromkeys(names, 900))
    side.backend.give(dict.fromkeys(names, 900), ends=names)
    tokens = ended = 0
    while ended < len(names):
        response = await call.read()
        assert len(response.token_ids) <= MESSAGE_TOKENS + count
        tokens += len(response.token_ids)
        ended += len(response.ends)
    assert tokens == len(names) * (count + 1)


@dataclass
class Work:
    """A thread's time that passes only where a request is tokenized: three milliseconds for each."""

    submitted: dict[str, tuple[int, Request]]

    def thread_time(self) -> float:
        return 0.003 * len(self.submitted)


async def started_each_turn(side: Side, message: pb.SessionRequest) -> list[int]:
    """How many requests of a session's message have been started, after each turn of the loop that it takes."""
    before = len(side.backend.submitted)

    async def messages() -> AsyncIterator[pb.SessionRequest]:
        yield message

    reading = asyncio.create_task(Session(side.streams, float("inf"))._read(messages()))
    counts = []
    while not reading.done():
        await asyncio.sleep(0)
        counts.append(len(side.backend.submitted) - before)
    return counts


async def test_a_burst_starts_together_where_nobody_streams_and_gives_way_where_somebody_does(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """10 ms of an idle router's first turn are a burst's, and 2 ms of any other."""
    side = Side()
    monkeypatch.setattr(session, "time", Work(side.backend.submitted))
    assert (await started_each_turn(side, start(*"abcdefg")))[:4] == [4, 5, 6, 7]
    assert (await started_each_turn(side, start(*"ABC")))[:3] == [1, 2, 3]


async def test_an_id_is_live_until_its_end_was_sent(side: Any) -> None:
    call = side.stub.Session()
    await call.write(start("a"))
    await side.backend.wait("a")
    await call.write(start("a"))
    [end] = (await call.read()).ends
    assert from_proto(status_pb2.Status.FromString(end.status)).reason == "DUPLICATE_REQUEST_ID"
    side.backend.give({"a": 4}, ends=["a"])
    assert [end.finish_reason for end in (await call.read()).ends] == [pb.FINISH_REASON_LENGTH]


async def test_cancel_and_going_away_abandon(side: Any) -> None:
    call = side.stub.Session()
    await call.write(start("a", "b"))
    await side.backend.wait("a", "b")
    await call.write(pb.SessionRequest(cancel=["a", "unknown"]))
    while not side.backend.abandoned:
        await asyncio.sleep(0.005)
    assert side.backend.abandoned == [side.backend.handle("a")]
    side.backend.give({"a": 1, "b": 2})
    assert (await call.read()).request_ids == ["b"]
    call.cancel()
    while len(side.backend.abandoned) < 2:
        await asyncio.sleep(0.005)


async def test_tokens_before_an_error_are_delivered_and_generate_coalesces(side: Any) -> None:
    call = side.stub.Generate(start("a").start[0])
    await side.backend.wait("a")
    for token in (3, 4, 5):
        side.backend.give({"a": token})
    side.streams.fail(side.backend.handle("a"), UnavailableError("stage 1 went away", reason="STAGE_LOST"))
    assert (await call.read()).token_ids == [3, 4, 5]
    with pytest.raises(grpc.aio.AioRpcError) as raised:
        await call.read()
    assert raised.value.code() is grpc.StatusCode.UNAVAILABLE


async def test_a_timeout_of_its_own_shortens_the_calls(side: Any) -> None:
    call = side.stub.Session(timeout=1000)
    await call.write(start("short", timeout_ms=5_000))
    await call.write(start("long", timeout_ms=5_000_000))
    await side.backend.wait("short", "long")
    short, long = (side.backend.submitted[name][1].deadline for name in ("short", "long"))
    assert short <= time.monotonic() + 5.0
    # gRPC rounds a timeout on the wire.
    assert 900 < long - short < 1_100


def test_frames_between_router_and_worker_keep_what_they_carry() -> None:
    handles, tokens = np.array([4, 1 << 31], np.uint32), np.array([7, 49_151], np.uint32)
    ends = [End(4, Finish.STOP, 16), End(9, Finish.ABORT, 0)]
    got = unpack_deltas(pack_deltas(handles, tokens, ends))
    assert (got[0].tolist(), got[1].tolist(), got[2]) == (handles.tolist(), tokens.tolist(), ends)
    empty = unpack_deltas(pack_deltas(NO_ROWS, NO_ROWS, ends[:1]))
    assert (len(empty[0]), empty[2]) == (0, ends[:1])
    request = Request(
        request_id="näme".encode().hex(),
        prompt=np.arange(5, dtype=np.uint32),
        max_tokens=9,
        end_token_ids=frozenset([2]),
        priority=-3,
        deadline=12.5,
        trace=bytes(range(24)),
    )
    handle, unpacked, arrived = unpack_submit(pack_submit(77, request, 3.25), frozenset([2]))
    assert (handle, arrived) == (77, 3.25)
    assert unpacked.prompt.tolist() == request.prompt.tolist()
    for name in ("request_id", "max_tokens", "sampling", "end_token_ids", "priority", "deadline", "trace"):
        assert getattr(unpacked, name) == getattr(request, name), name


async def test_a_bug_that_one_request_meets_ends_that_request_alone(
    side: Any, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def check_with_bug(message: pb.GenerateRequest, model: ServedModel) -> Request:
        if message.request_id == "odd":
            raise KeyError("what nobody thought of")
        return check(message, model)

    monkeypatch.setattr("stagemesh.router.api.streams.check", check_with_bug)
    call = side.stub.Session()
    await call.write(start("good", "odd"))
    [end] = (await call.read()).ends
    error = from_proto(status_pb2.Status.FromString(end.status))
    assert (end.request_id, type(error), error.reason) == ("odd", InternalError, "BUG")
    assert error.request_id == "odd"
    side.backend.give({"good": 7}, ends=["good"])
    assert (await call.read()).token_ids == [7]
    with pytest.raises(grpc.aio.AioRpcError) as raised:
        await side.stub.Generate(start("odd").start[0]).read()
    error = from_rpc_error(raised.value)
    assert (type(error), error.reason, error.request_id) == (InternalError, "BUG", "odd")
    assert "what nobody thought of" in caplog.text
