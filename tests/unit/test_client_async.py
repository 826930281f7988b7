"""The asyncio client against a real gRPC server in this process."""

from __future__ import annotations

import asyncio
import gc
from collections.abc import AsyncIterator, Iterator
from typing import Any

import pytest
from grpc_health.v1 import health_pb2
from scripted_router import ScriptedRouter, endless, refusal, words

from stagemesh.client import (
    AsyncClient,
    CancelledError,
    DeadlineExceededError,
    FailedPreconditionError,
    InvalidArgumentError,
    StagemeshError,
    UnavailableError,
)
from stagemesh.v1 import inference_pb2 as pb


@pytest.fixture
def router() -> Iterator[ScriptedRouter]:
    with ScriptedRouter() as router:
        yield router


@pytest.fixture
async def client(router: ScriptedRouter) -> AsyncIterator[AsyncClient]:
    async with AsyncClient(router.address, timeout=20.0) as client:
        yield client


async def ended(router: ScriptedRouter) -> bool:
    return await asyncio.to_thread(router.has_ended, 0)


async def test_chunks_come_as_sent(router: ScriptedRouter, client: AsyncClient) -> None:
    async with client.generate("hi", request_id="r1", max_tokens=4) as stream:
        chunks = [chunk async for chunk in stream]
    assert [chunk.text for chunk in chunks] == ["Hello", " world", ""]
    assert {chunk.request_id for chunk in chunks} == {"r1"}
    assert router.received[0].request == pb.GenerateRequest(text="hi", request_id="r1", max_tokens=4)


async def test_metadata_deadline_and_id(router: ScriptedRouter) -> None:
    async with AsyncClient(router.address, metadata=[("traceparent", "00-a")]) as client:
        stream = client.chat([{"role": "user", "content": "hi"}], timeout=20.0)
        sent_id = stream.request_id
        router.id_metadata = "theirs"
        async for _ in stream:
            pass
    [seen] = router.received
    assert seen.metadata["traceparent"] == "00-a"
    assert seen.remaining_s is not None
    assert 0 < seen.remaining_s < 20.1
    assert seen.request.request_id == sent_id


async def test_the_rest_of_the_surface(router: ScriptedRouter, client: AsyncClient) -> None:
    assert (await client.complete(token_ids=[1])).text == "Hello world"
    assert (await client.model()).max_context == 64
    assert await client.abort("nobody") is False
    assert await client.ready(timeout=60) is True
    router.set_health(health_pb2.HealthCheckResponse.NOT_SERVING)
    assert await client.ready() is False
    with pytest.raises(DeadlineExceededError, match="was not ready within"):
        await client.wait_ready(timeout=0.2)


@pytest.mark.parametrize(
    "error",
    [
        InvalidArgumentError("top_p: 2 is not in (0, 1]", reason="BAD_TOP_P", field="top_p"),
        UnavailableError("forming", reason="LANE_FORMING", retry_after_s=0.5, stage="stage 2"),
        CancelledError("the server cancelled it"),
    ],
    ids=lambda error: type(error).__name__,
)
async def test_errors_arrive_as_they_were_raised(
    router: ScriptedRouter, client: AsyncClient, error: StagemeshError
) -> None:
    router.script = refusal(error)
    with pytest.raises(StagemeshError) as caught:
        await client.complete("hi", request_id="r7")
    got = caught.value
    assert type(got) is type(error)
    assert (got.message, got.field, got.request_id) == (error.message, error.field, "r7")
    assert (got.retry_after_s, got.stage) == (error.retry_after_s, error.stage)


async def test_close_and_leaving_the_block_cancel(router: ScriptedRouter, client: AsyncClient) -> None:
    router.script = endless
    async with client.generate("hi") as stream:
        await anext(stream)
    assert await ended(router)
    assert [chunk async for chunk in stream] == []


async def test_break_and_forgetting_the_stream_cancels(router: ScriptedRouter, client: AsyncClient) -> None:
    router.script = endless
    async for _ in client.generate("hi"):
        break
    gc.collect()
    assert await ended(router)


async def test_cancelling_the_task_cancels_and_is_asyncios_own(
    router: ScriptedRouter, client: AsyncClient
) -> None:
    router.script = endless
    task = asyncio.create_task(client.complete("hi"))
    await asyncio.to_thread(router.request, 0)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert await ended(router)


async def test_close_from_another_task_ends_the_iteration(
    router: ScriptedRouter, client: AsyncClient
) -> None:
    router.script = endless
    stream = client.generate("hi")
    await anext(stream)
    asyncio.get_running_loop().call_later(0.2, stream.cancel)
    async for _ in stream:
        pass


async def test_closing_the_client_ends_its_streams(router: ScriptedRouter) -> None:
    router.script = endless
    client = AsyncClient(router.address)
    stream = client.generate("hi", request_id="r")
    await anext(stream)
    await client.close()
    with pytest.raises(CancelledError, match="request r"):
        [chunk async for chunk in stream]
    with pytest.raises(FailedPreconditionError, match="closed"):
        client.generate("hi")


async def test_the_deadline_ends_a_stream(router: ScriptedRouter, client: AsyncClient) -> None:
    router.script = endless
    with pytest.raises(DeadlineExceededError, match="request r"):
        await client.complete("hi", timeout=0.3, request_id="r")


async def test_retries(router: ScriptedRouter) -> None:
    router.scripts = [refusal(UnavailableError("forming", reason="LANE_FORMING", retry_after_s=0.05))]
    async with AsyncClient(router.address, retries=1) as client:
        assert (await client.complete("hi")).text == "Hello world"
    assert len({seen.request.request_id for seen in router.received}) == 2


async def test_it_reconnects_to_a_server_that_came_back(router: ScriptedRouter, client: AsyncClient) -> None:
    assert await client.ready(timeout=60)
    router.stop()
    with pytest.raises(UnavailableError, match="no connection to"):
        await client.complete("hi")
    with ScriptedRouter(words("again"), port=router.port):
        await client.wait_ready(timeout=60)
        assert (await client.complete("hi")).text == "again"


async def test_many_streams_at_once(router: ScriptedRouter, client: AsyncClient) -> None:
    def echo(request: pb.GenerateRequest, context: Any) -> Iterator[pb.GenerateResponse]:
        yield pb.GenerateResponse(text=request.text)

    router.script = echo
    answers = await asyncio.gather(*(client.complete(str(number)) for number in range(20)))
    assert [answer.text for answer in answers] == [str(number) for number in range(20)]
