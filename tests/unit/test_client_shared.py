"""Concurrent calls of one client go over one session, both clients, against a real gRPC server in this process."""

from __future__ import annotations

import asyncio
import gc
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
from scripted_router import ScriptedRouter, endless, refusal

from stagemesh.client import (
    AsyncClient,
    CancelledError,
    Client,
    DeadlineExceededError,
    FinishReason,
    InternalError,
    InvalidArgumentError,
    UnavailableError,
)
from stagemesh.client._shared import Inbox, SharedSession
from stagemesh.client._shared_calls import AsyncSharedCall, open_shared, open_shared_async
from stagemesh.v1 import inference_pb2 as pb


@pytest.fixture
def router() -> Iterator[ScriptedRouter]:
    with ScriptedRouter() as router:
        router.script = by_prompt
        yield router


def by_prompt(request: pb.GenerateRequest, context: Any) -> Iterator[pb.GenerateResponse]:
    """ "endless" is, "bad" is refused, "not now" says when; anything else is echoed."""
    if request.text == "endless":
        yield from endless(request, context)
    if request.text == "bad":
        yield from refusal(InvalidArgumentError("no", reason="BAD_FIELD", field="text"))(request, context)
    if request.text == "not now":
        error = UnavailableError("forming", reason="LANE_NOT_READY", retry_after_s=0.01)
        yield from refusal(error)(request, context)
    for letter in request.text:
        yield pb.GenerateResponse(text=letter, token_ids=[ord(letter)])
    usage = pb.Usage(prompt_tokens=1, completion_tokens=len(request.text))
    yield pb.GenerateResponse(finish_reason=pb.FINISH_REASON_STOP, usage=usage)


def test_one_call_alone_is_a_generate_and_those_beside_it_share_a_session(router: ScriptedRouter) -> None:
    with Client(router.address) as client:
        assert client.complete("alone").text == "alone"
        assert client.complete("again").text == "again"
        assert not router.sessions
        with client.generate("endless") as first:
            next(first)
            assert client.complete("one").text == "one"
            assert len(router.sessions) == 1
            with client.generate("endless") as second:
                assert next(second).text.startswith("x")
                answer = client.complete("two", request_id="mine")
                assert (answer.text, answer.request_id) == ("two", "mine")
                assert answer.finish_reason is FinishReason.STOP
                assert (answer.usage.prompt_tokens, answer.usage.completion_tokens) == (1, 3)
        assert router.received[-1].has_ended()


def test_threads_get_each_its_own_answer(router: ScriptedRouter) -> None:
    with Client(router.address) as client, client.generate("endless"), ThreadPoolExecutor(16) as pool:
        texts = [f"text {number}" for number in range(200)]
        assert [answer.text for answer in pool.map(client.complete, texts)] == texts
    assert len(router.sessions) < 200


async def test_tasks_get_each_its_own_answer(router: ScriptedRouter) -> None:
    async with AsyncClient(router.address) as client:
        texts = [f"text {number}" for number in range(100)]
        answers = await asyncio.gather(*map(client.complete, texts))
        assert [answer.text for answer in answers] == texts
    assert len(router.sessions) == 1
    assert len(router.received) == 100


def test_one_that_fails_fails_alone_and_a_hint_is_followed(router: ScriptedRouter) -> None:
    with Client(router.address, retries=2) as client, client.generate("endless") as first:
        next(first)
        with client.generate("endless") as second:
            with pytest.raises(InvalidArgumentError) as caught:
                client.complete("bad", request_id="r1")
            assert (caught.value.reason, caught.value.request_id) == ("BAD_FIELD", "r1")
            with pytest.raises(UnavailableError):
                client.complete("not now")
            assert next(second).text
    assert sum(seen.request.text == "not now" for seen in router.received) == 3


def test_a_deadline_is_the_requests_own(router: ScriptedRouter) -> None:
    with Client(router.address) as client, client.generate("endless") as first:
        next(first)
        with pytest.raises(DeadlineExceededError, match="request r2"):
            client.complete("endless", timeout=0.3, request_id="r2")
        seen = router.request(1)
        assert 0 < seen.request.timeout_ms <= 301
        assert seen.has_ended()
        assert client.complete("fine", timeout=None).text == "fine"
        assert router.received[2].request.timeout_ms == 0


def test_closing_or_forgetting_a_stream_cancels_it_alone(router: ScriptedRouter) -> None:
    with Client(router.address) as client, client.generate("endless") as first:
        next(first)
        second, third = client.generate("endless"), client.generate("endless")
        next(second)
        next(third)
        second.close()
        assert list(second) == []
        assert router.has_ended(1)
        del third
        gc.collect()
        assert router.has_ended(2)
        assert next(first).text


def test_close_from_another_thread_ends_the_iteration(router: ScriptedRouter) -> None:
    with Client(router.address) as client, client.generate("endless") as first:
        next(first)
        second = client.generate("endless")
        next(second)
        timer = threading.Timer(0.2, second.close)
        timer.start()
        for _ in second:
            pass
        timer.join()


def test_closing_the_client_ends_all(router: ScriptedRouter) -> None:
    client = Client(router.address)
    first = client.generate("endless")
    next(first)
    second = client.generate("endless", request_id="r")
    next(second)
    client.close()
    with pytest.raises(CancelledError, match="request r"):
        list(second)


async def test_on_asyncio_too(router: ScriptedRouter) -> None:
    async with AsyncClient(router.address) as client, client.generate("endless") as first:
        await anext(first)
        with pytest.raises(DeadlineExceededError):
            await client.complete("endless", timeout=0.3)
        task = asyncio.create_task(client.complete("endless"))
        while len(router.received) < 3:
            await asyncio.sleep(0.01)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        assert await asyncio.to_thread(router.has_ended, 2)
        with pytest.raises(InvalidArgumentError):
            await client.complete("bad")
        second = client.generate("endless", request_id="r")
        await anext(second)
        await client.close()
        with pytest.raises(CancelledError, match="request r"):
            [chunk async for chunk in second]


def test_a_trace_context_travels_with_its_request_and_other_metadata_has_a_call_of_its_own(
    router: ScriptedRouter,
) -> None:
    numbers = iter(range(10))
    with (
        Client(router.address, metadata=lambda: [("traceparent", f"00-{next(numbers)}")]) as client,
        client.generate("endless") as first,
    ):
        next(first)
        client.complete("a")
        assert router.received[1].request.traceparent == "00-1"
        client.complete("b", metadata=[("x-team", "blue")])
        assert router.received[2].metadata["x-team"] == "blue"


def test_the_session_is_made_anew_where_the_router_was(router: ScriptedRouter) -> None:
    with Client(router.address) as client:
        first = client.generate("endless")
        next(first)
        second = client.generate("endless")
        next(second)
        router.stop()
        with pytest.raises(UnavailableError):
            list(second)
        with ScriptedRouter(by_prompt, port=router.port) as again:
            client.wait_ready(timeout=60)
            with client.generate("endless") as third:
                next(third)
                assert client.complete("back").text == "back"
            assert len(again.sessions) == 1


def test_where_no_session_lasts_each_request_has_a_call_of_its_own(
    router: ScriptedRouter, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And the next one is not made in vain, again and again, with the client's lock taken."""
    with Client(router.address) as client, client.generate("endless") as first:
        next(first)
        opened: list[SharedSession] = []

        def lost_at_once(*args: Any) -> SharedSession:
            assert len(opened) < 10
            opened.append(SharedSession(lambda request: None, ()))
            opened[-1].lost(UnavailableError("gone"))
            return opened[-1]

        monkeypatch.setattr(client, "_open_shared", lost_at_once)
        assert client.complete("alone").text == "alone"
        assert not router.sessions


@pytest.mark.parametrize("turns", range(4))
async def test_a_task_that_is_cancelled_as_a_token_comes_is_cancelled(turns: int) -> None:
    call = AsyncSharedCall(SharedSession(lambda request: None, ()), "r", 60.0)
    task = asyncio.create_task(call.read())
    for _ in range(5):
        await asyncio.sleep(0)
    call.inbox.put("x", (1,))
    for _ in range(turns):
        await asyncio.sleep(0)
    if task.cancel():
        with pytest.raises(asyncio.CancelledError):
            await task
    else:
        assert (await task).text == "x"


@pytest.mark.parametrize("on_asyncio", [False, True])
async def test_a_message_that_breaks_the_contract_ends_what_was_on_the_session(on_asyncio: bool) -> None:
    """Told here, and not by a deadline that may be far."""
    broken = pb.SessionResponse(texts=["of nobody"])

    class Call:
        def __iter__(self) -> Iterator[pb.SessionResponse]:
            return iter([broken])

        async def read(self) -> pb.SessionResponse:
            return broken

    inbox = Inbox(lambda: None)

    def opened(requests: Any) -> Call:
        return Call()

    session = (open_shared_async if on_asyncio else open_shared)(opened, (), "mesh:1")
    if session.start(pb.GenerateRequest(request_id="r"), inbox):
        for _ in range(10_000):
            if session.num_live == 0:
                break
            await asyncio.sleep(0.005)
        with pytest.raises(InternalError, match="what mesh:1 sent cannot be taken"):
            inbox.take()
    assert not session.start(pb.GenerateRequest(request_id="later"), inbox)
