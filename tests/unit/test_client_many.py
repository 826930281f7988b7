"""Many requests over one session, both clients, against a real gRPC server in this process."""

from __future__ import annotations

import asyncio
import gc
import threading
from collections.abc import Callable, Iterator
from typing import Any

import pytest
from scripted_router import WAIT_S, Script, ScriptedRouter, endless, refusal, silent, words

from stagemesh.client import (
    AsyncClient,
    Chunk,
    Client,
    Completion,
    DeadlineExceededError,
    FinishReason,
    InvalidArgumentError,
    ManyStream,
    ResourceExhaustedError,
    StagemeshError,
    UnavailableError,
)
from stagemesh.client._exchange import Exchange
from stagemesh.client._many import Many
from stagemesh.v1 import inference_pb2 as pb

Answers = list[Completion | StagemeshError]


@pytest.fixture
def router() -> Iterator[ScriptedRouter]:
    with ScriptedRouter() as router:
        yield router


def blocking(router: ScriptedRouter, prompts: Any, **options: Any) -> Answers:
    with Client(router.address, retries=options.pop("retries", 0)) as client:
        return client.generate_many(prompts, **options).completions()


def on_asyncio(router: ScriptedRouter, prompts: Any, **options: Any) -> Answers:
    async def run() -> Answers:
        async with AsyncClient(router.address, retries=options.pop("retries", 0)) as client:
            return await client.generate_many(prompts, **options).completions()

    return asyncio.run(run())


both = pytest.mark.parametrize("many", [blocking, on_asyncio])
Run = Callable[..., Answers]


def echo(request: pb.GenerateRequest, context: Any) -> Iterator[pb.GenerateResponse]:
    """Its prompt, letter by letter."""
    for letter in request.text:
        yield pb.GenerateResponse(text=letter, token_ids=[ord(letter)])
    yield pb.GenerateResponse(finish_reason=pb.FINISH_REASON_STOP)


def by_prompt(**scripts: Script) -> Script:
    def script(request: pb.GenerateRequest, context: Any) -> Iterator[pb.GenerateResponse]:
        return scripts.get(request.text, echo)(request, context)

    return script


@both
def test_answers_come_in_the_order_of_the_prompts(router: ScriptedRouter, many: Run) -> None:
    router.script = echo
    prompts = [f"prompt {number}" for number in range(30)]
    answers = many(router, prompts)
    assert [answer.text for answer in answers if isinstance(answer, Completion)] == prompts
    assert len(router.sessions) == 1
    assert len(router.received) == 30


@both
def test_one_that_is_refused_leaves_the_others(router: ScriptedRouter, many: Run) -> None:
    router.script = by_prompt(bad=refusal(InvalidArgumentError("no", reason="BAD_FIELD", field="text")))
    first, second, third = many(router, ["one", "bad", "two"])
    assert isinstance(second, InvalidArgumentError)
    assert (second.reason, second.field, second.request_id) == (
        "BAD_FIELD",
        "text",
        router.received[1].request.request_id,
    )
    assert isinstance(first, Completion)
    assert isinstance(third, Completion)
    assert (first.text, third.text) == ("one", "two")


@both
def test_max_live_bounds_what_is_under_way(router: ScriptedRouter, many: Run) -> None:
    live, most, lock = 0, 0, threading.Lock()

    def counted(request: pb.GenerateRequest, context: Any) -> Iterator[pb.GenerateResponse]:
        nonlocal live, most
        with lock:
            live += 1
            most = max(most, live)
        yield from words("a")(request, context)

    def leaving(request: pb.GenerateRequest, context: Any) -> Iterator[pb.GenerateResponse]:
        nonlocal live
        for one in counted(request, context):
            if one.finish_reason:
                with lock:
                    live -= 1
            yield one

    router.script = leaving
    assert len(many(router, ["x"] * 20, max_live=3)) == 20
    assert most <= 3


@both
def test_a_refusal_with_a_hint_is_tried_again_and_only_that_one(router: ScriptedRouter, many: Run) -> None:
    full = refusal(ResourceExhaustedError("full", reason="QUEUE_FULL", retry_after_s=0.01))
    router.script = words("ok")
    router.scripts = [full, full]
    answers = many(router, ["a", "b", "c"], retries=1)
    assert all(isinstance(answer, Completion) and answer.text == "ok" for answer in answers)
    assert len(router.received) == 5
    router.scripts = [full]
    assert any(isinstance(answer, ResourceExhaustedError) for answer in many(router, ["a", "b"]))


@both
def test_prompts_of_every_kind_with_options_of_their_own(router: ScriptedRouter, many: Run) -> None:
    chat = [{"role": "user", "content": "hi"}]
    prompts = ["text", [1, 2], chat, {"prompt": "own", "max_tokens": 3}, {"token_ids": [7], "seed": 5}]
    many(router, prompts, max_tokens=9, temperature=0.0)
    sent = sorted((seen.request for seen in router.received), key=lambda request: request.max_tokens)
    assert [request.max_tokens for request in sent] == [3, 9, 9, 9, 9]
    assert sent[0].text == "own"
    kinds = [request.WhichOneof("prompt") for request in sent[1:]]
    assert sorted(kind for kind in kinds if kind) == ["chat", "text", "token_ids", "token_ids"]
    assert [request.seed for request in sent if request.HasField("seed")] == [5]
    assert all(request.HasField("temperature") for request in sent)


@both
def test_nothing_to_ask_is_nothing_to_do(router: ScriptedRouter, many: Run) -> None:
    assert many(router, []) == []
    assert not router.sessions


@both
def test_long_prompts_go_in_messages_a_router_takes(router: ScriptedRouter, many: Run) -> None:
    """Whose limit here is gRPC's own, 4 MiB; together they have 12."""
    router.script = words("ok")
    answers = many(router, ["a" * (1 << 20)] * 12)
    assert [answer.text for answer in answers if isinstance(answer, Completion)] == ["ok"] * 12


@pytest.mark.parametrize("prompt", [5, None, b"abc"])
def test_what_is_no_prompt_is_named(router: ScriptedRouter, prompt: Any) -> None:
    with Client(router.address) as client, pytest.raises(InvalidArgumentError, match=r"prompts\[1\]: "):
        client.generate_many(["a", prompt])


def test_a_message_that_breaks_the_contract_ends_every_request() -> None:
    class Call:
        def __next__(self) -> pb.SessionResponse:
            return pb.SessionResponse(texts=["of nobody"])

        def cancel(self) -> None:
            pass

    exchange = Exchange(pb.GenerateRequest(text="a"), timeout_s=None, retries=0, address="mesh:1")
    [(index, chunk)] = list(ManyStream(Many([exchange], max_live=1), lambda requests: Call(), "mesh:1"))
    assert (index, chunk.finish_reason) == (0, FinishReason.ERROR)
    assert chunk.error is not None
    assert chunk.error.reason == "BAD_RESPONSE"


@both
@pytest.mark.parametrize(
    ("prompts", "options", "field"),
    [
        (["a", {"prompt": "b", "token_ids": [1]}], {}, "prompt"),
        (["a", [-1]], {}, "token_ids"),
        (["a"], {"max_live": 0}, "max_live"),
        ([{"prompt": "a", "request_id": "r"}, {"prompt": "b", "request_id": "r"}], {}, "request_id"),
    ],
)
def test_a_value_no_request_can_hold_is_named(
    router: ScriptedRouter, many: Run, prompts: Any, options: dict[str, Any], field: str
) -> None:
    with pytest.raises(InvalidArgumentError) as caught:
        many(router, prompts, **options)
    assert caught.value.field == field
    assert not router.received


@both
def test_the_deadline_is_one_for_all_and_ends_each(router: ScriptedRouter, many: Run) -> None:
    router.script = by_prompt(long=endless)
    for timeout_s in (0.5, 5.0, 50.0):  # a busy machine may take long over the short one
        short, long = many(router, ["short", "long"], timeout=timeout_s)
        assert isinstance(long, DeadlineExceededError)
        if isinstance(short, Completion):
            break
    assert isinstance(short, Completion)
    assert long.request_id == router.received[-1].request.request_id
    assert router.sessions[-1].remaining_s <= timeout_s + 0.1


@both
def test_no_router_ends_each_with_the_address(router: ScriptedRouter, many: Run) -> None:
    router.stop()
    answers = many(router, ["a", "b"])
    assert [type(answer) for answer in answers] == [UnavailableError] * 2
    assert all(router.address in str(answer) for answer in answers)
    assert len({answer.request_id for answer in answers}) == 2


def test_chunks_of_a_request_come_in_order(router: ScriptedRouter) -> None:
    router.script = echo
    with Client(router.address) as client, client.generate_many(["abc", "xyz"]) as stream:
        chunks: dict[int, list[Chunk]] = {0: [], 1: []}
        for index, chunk in stream:
            chunks[index].append(chunk)
        assert stream.request_ids == [seen.request.request_id for seen in router.received]
    assert ["".join(chunk.text for chunk in one) for one in chunks.values()] == ["abc", "xyz"]
    assert all(one[-1].finish_reason is FinishReason.STOP for one in chunks.values())


def test_cancel_ends_one_and_close_the_rest(router: ScriptedRouter) -> None:
    router.script = endless
    with Client(router.address) as client:
        stream = client.generate_many(["a", "b"])
        next(stream)
        stream.cancel(0)
        assert router.has_ended(0)
        assert router.sessions[0].cancelled == [stream.request_ids[0]]
        assert {index for index, _ in (next(stream) for _ in range(20))} == {1}
        stream.close()
        assert list(stream) == []
        assert router.has_ended(1)


def test_cancelling_the_last_that_runs_ends_a_reader_that_waits(router: ScriptedRouter) -> None:
    router.script = by_prompt(quiet=silent)
    with Client(router.address) as client:
        stream = client.generate_many(["quiet", "ab"], max_live=1)
        chunks: list[tuple[int, Chunk]] = []
        reader = threading.Thread(target=lambda: chunks.extend(stream), daemon=True)
        reader.start()
        router.request(0)
        stream.cancel(0)
        reader.join(WAIT_S)
        assert not reader.is_alive()
        assert "".join(chunk.text for _, chunk in chunks) == "ab"
        assert {index for index, _ in chunks} == {1}
        assert router.sessions[0].cancelled == stream.request_ids[:1]


def test_a_session_that_the_router_ends_early_ends_its_requests() -> None:
    class Call:
        def __next__(self) -> pb.SessionResponse:
            raise StopIteration

        def cancel(self) -> None:
            pass

    exchange = Exchange(pb.GenerateRequest(text="a"), timeout_s=None, retries=0, address="mesh:1")
    [(_, chunk)] = list(ManyStream(Many([exchange], max_live=1), lambda requests: Call(), "mesh:1"))
    assert isinstance(chunk.error, UnavailableError)
    assert chunk.error.reason == "SESSION_ENDED"


def test_nothing_of_a_cancelled_request_comes_even_if_it_was_here() -> None:
    def both_at_once(requests: Iterator[pb.SessionRequest]) -> Any:
        ids = [start.request_id for start in next(requests).start]
        counts = [1] * len(ids)
        step = pb.SessionResponse(request_ids=ids, texts=["x", "y"], token_counts=counts, token_ids=counts)
        end = pb.SessionEnd(request_id=ids[0], finish_reason=pb.FINISH_REASON_STOP)
        return Call([step, pb.SessionResponse(ends=[end])])

    class Call:
        def __init__(self, responses: list[pb.SessionResponse]) -> None:
            self._responses = iter(responses)

        def __next__(self) -> pb.SessionResponse:
            return next(self._responses)

        def cancel(self) -> None:
            pass

    requests = [pb.GenerateRequest(request_id=name, text=name) for name in "ab"]
    exchanges = [Exchange(one, timeout_s=None, retries=0, address="a:1") for one in requests]
    stream = ManyStream(Many(exchanges, max_live=2), both_at_once, "a:1")
    assert next(stream)[1].text == "x"
    stream.cancel(1)
    [(index, chunk)] = list(stream)
    assert (index, chunk.finish_reason) == (0, FinishReason.STOP)


def test_forgetting_the_stream_cancels(router: ScriptedRouter) -> None:
    router.script = endless
    with Client(router.address) as client:
        for _ in client.generate_many(["a", "b"]):
            break
        gc.collect()
        assert all(seen.has_ended() for seen in router.received)


async def test_cancelling_the_task_cancels_and_is_asyncios_own(router: ScriptedRouter) -> None:
    router.script = endless
    async with AsyncClient(router.address) as client:
        task = asyncio.create_task(client.generate_many(["a", "b"]).completions())
        while not router.received:
            await asyncio.sleep(0.01)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        assert await asyncio.to_thread(router.has_ended, 0)


async def test_cancel_ends_one_on_asyncio(router: ScriptedRouter) -> None:
    router.script = endless
    async with AsyncClient(router.address) as client, client.generate_many(["a", "b"]) as stream:
        await anext(stream)
        stream.cancel(1)
        assert await asyncio.to_thread(router.has_ended, 1)
        assert {index for index, _ in [await anext(stream) for _ in range(20)]} == {0}
    assert await asyncio.to_thread(router.has_ended, 0)


async def test_cancelling_the_last_ends_a_task_that_waits(router: ScriptedRouter) -> None:
    router.script = silent
    async with AsyncClient(router.address) as client, client.generate_many(["a"]) as stream:
        reader = asyncio.create_task(anext(stream, None))
        await asyncio.to_thread(router.request, 0)
        stream.cancel(0)
        assert await reader is None
