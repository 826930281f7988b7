"""The blocking client against a real gRPC server in this process."""

from __future__ import annotations

import gc
import math
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import grpc
import pytest
from grpc_health.v1 import health_pb2
from scripted_router import ScriptedRouter, endless, refusal, words

from stagemesh.client import (
    CancelledError,
    Client,
    Completion,
    ConfigError,
    DeadlineExceededError,
    FailedPreconditionError,
    FinishReason,
    InternalError,
    InvalidArgumentError,
    ResourceExhaustedError,
    StageLostError,
    StagemeshError,
    TokenStream,
    UnavailableError,
    UnimplementedError,
    Usage,
)
from stagemesh.client._channel import CHANNEL_OPTIONS
from stagemesh.client._exchange import Exchange
from stagemesh.client._request import MAX_REQUEST_BYTES
from stagemesh.v1 import inference_pb2 as pb


@pytest.fixture
def router() -> Iterator[ScriptedRouter]:
    with ScriptedRouter() as router:
        yield router


@pytest.fixture
def client(router: ScriptedRouter) -> Iterator[Client]:
    with Client(router.address, timeout=20.0) as client:
        yield client


def test_chunks_come_as_sent(router: ScriptedRouter, client: Client) -> None:
    with client.generate("hi", request_id="r1") as stream:
        chunks = list(stream)
    assert [chunk.text for chunk in chunks] == ["Hello", " world", ""]
    assert [chunk.token_ids for chunk in chunks] == [(0,), (1,), ()]
    assert [chunk.finish_reason for chunk in chunks] == [None, None, FinishReason.STOP]
    assert chunks[0].usage is None
    assert chunks[-1].usage == Usage(prompt_tokens=3, completion_tokens=2, cached_tokens=1)
    assert {chunk.request_id for chunk in chunks} == {"r1"}


def test_what_is_left_out_is_unset_and_zero_is_not(router: ScriptedRouter, client: Client) -> None:
    list(client.generate("hi"))
    list(client.generate("hi", max_tokens=0, temperature=0.0, top_k=0, seed=0, top_p=None))
    bare, zeros = (seen.request for seen in router.received)
    for name in ("max_tokens", "temperature", "top_k", "seed"):
        assert not bare.HasField(name), name
        assert zeros.HasField(name), name
        assert getattr(zeros, name) == 0
    assert not zeros.HasField("top_p")


def test_every_option_reaches_the_router(router: ScriptedRouter, client: Client) -> None:
    options: dict[str, Any] = {"max_tokens": 7, "temperature": 0.5, "top_k": 40, "top_p": 0.25, "seed": 2**63}
    options |= {
        "ignore_eos": True,
        "priority": -2,
        "request_id": "r",
        "stop": ["a", "b"],
        "n": 2,
        "min_p": 0.5,
    }
    options |= {"logprobs": 3, "presence_penalty": 1.0, "frequency_penalty": -1.0, "repetition_penalty": 2.0}
    options |= {"json_schema": "{}", "adapter": "x"}
    list(client.generate("hi", **options))
    [seen] = router.received
    assert seen.request == pb.GenerateRequest(text="hi", **options)


def test_the_three_kinds_of_prompt(router: ScriptedRouter, client: Client) -> None:
    list(client.generate(token_ids=[1, 2]))
    list(client.chat([{"role": "user", "content": "hi"}]))
    list(client.generate(""))
    ids, chat, empty = (seen.request for seen in router.received)
    assert list(ids.token_ids.ids) == [1, 2]
    assert [(message.role, message.content) for message in chat.chat.messages] == [("user", "hi")]
    assert empty.WhichOneof("prompt") == "text"


@pytest.mark.parametrize(
    ("arguments", "field"),
    [
        ({}, "prompt"),
        ({"prompt": "a", "token_ids": [1]}, "prompt"),
        ({"prompt": "a", "max_tokens": -1}, "max_tokens"),
        ({"prompt": "a", "temperature": "hot"}, "temperature"),
        ({"token_ids": [-1]}, "token_ids"),
        ({"prompt": 3}, "text"),
        ({"prompt": "a" * MAX_REQUEST_BYTES}, "text"),
        ({"prompt": "a", "timeout": math.nan}, "timeout"),
        ({"prompt": "a", "timeout": "5"}, "timeout"),
        ({"prompt": "a", "metadata": [("Team", "blue")]}, "metadata"),
        ({"prompt": "a", "metadata": [("team", "bl\u00fce")]}, "metadata"),
        ({"prompt": "a", "metadata": [("team", "a\nb")]}, "metadata"),
        ({"prompt": "a", "metadata": [("team-bin", "text")]}, "metadata"),
    ],
)
def test_a_value_no_request_can_hold_is_named(
    router: ScriptedRouter, client: Client, arguments: dict[str, Any], field: str
) -> None:
    with pytest.raises(InvalidArgumentError) as caught:
        client.generate(**arguments)
    assert caught.value.field == field
    assert caught.value.reason == ("INVALID_PROMPT" if field == "prompt" else "INVALID_VALUE")
    assert not router.received


def test_an_unknown_option_is_a_type_error(client: Client) -> None:
    with pytest.raises(TypeError, match="max_token'; known are adapter"):
        client.generate("a", max_token=3)  # type: ignore[call-arg]


def test_metadata_and_deadline_reach_the_router(router: ScriptedRouter) -> None:
    numbers = iter(range(10))
    with Client(
        router.address, timeout=50.0, metadata=lambda: [("traceparent", f"00-{next(numbers)}")]
    ) as client:
        list(client.generate("hi", metadata=[("x-team", "blue")]))
        list(client.generate("hi", timeout=20.0))
        list(client.generate("hi", timeout=None))
    first, second, third = router.received
    assert (first.metadata["traceparent"], first.metadata["x-team"]) == ("00-0", "blue")
    assert second.metadata["traceparent"] == "00-1"
    assert first.remaining_s is not None
    assert 40 < first.remaining_s < 50.1  # grpc-timeout is rounded up
    assert second.remaining_s is not None
    assert 0 < second.remaining_s < 20.1
    assert third.remaining_s is None or third.remaining_s > 1e6


def test_a_timeout_beyond_all_clocks_is_for_ever(router: ScriptedRouter, client: Client) -> None:
    for timeout in (math.inf, 1e12):
        assert client.complete("hi", timeout=timeout).text == "Hello world"
        assert client.model(timeout=timeout).name == "scripted"
    for seen in router.received:
        assert seen.remaining_s is None or seen.remaining_s > 1e6


def test_the_id_is_known_at_once_and_the_router_has_the_last_word(
    router: ScriptedRouter, client: Client
) -> None:
    stream = client.generate("hi")
    assert len(stream.request_id) == 32
    list(stream)
    assert router.received[0].request.request_id == stream.request_id
    router.id_metadata, router.script = (
        "from-metadata",
        lambda request, context: iter([pb.GenerateResponse(text="a")]),
    )
    stream = client.generate("hi", request_id="mine")
    assert next(stream).request_id == "from-metadata"
    assert stream.request_id == "from-metadata"


def test_complete_collects(router: ScriptedRouter, client: Client) -> None:
    assert client.complete("hi", request_id="r") == Completion(
        request_id="r",
        text="Hello world",
        token_ids=(0, 1),
        finish_reason=FinishReason.STOP,
        usage=Usage(prompt_tokens=3, completion_tokens=2, cached_tokens=1),
    )
    assert client.complete(messages=[{"role": "user", "content": "hi"}]).text == "Hello world"


def test_model_and_abort(router: ScriptedRouter, client: Client) -> None:
    assert (client.model().name, client.model().end_token_ids) == ("scripted", (2,))
    assert client.abort("nobody") is False
    list(client.generate("hi", request_id="r9"))
    assert client.abort("r9") is True
    assert router.aborted == ["nobody", "r9"]


def test_a_finish_reason_from_the_future_is_unknown(router: ScriptedRouter, client: Client) -> None:
    router.script = lambda request, context: iter([pb.GenerateResponse(finish_reason=99)])  # type: ignore[arg-type]
    assert client.complete("hi").finish_reason is FinishReason.UNKNOWN


@pytest.mark.parametrize(
    "error",
    [
        InvalidArgumentError("top_p: 2 is not in (0, 1]", reason="BAD_TOP_P", field="top_p"),
        FailedPreconditionError("no tokenizer", reason="NO_TOKENIZER", metadata={"model": "m"}),
        UnimplementedError("stop", reason="NOT_BUILT", field="stop"),
        StageLostError("stage 1 went away", reason="STAGE_LOST", stage="stage 1", retry_after_s=1.5),
        UnavailableError("the lane is forming", reason="LANE_FORMING"),
        ResourceExhaustedError("the queue is full", reason="QUEUE_FULL", retry_after_s=0.25),
        DeadlineExceededError("too late", reason="TOO_LATE"),
        CancelledError("cancelled", reason="GONE"),
        InternalError("a bug", reason="BUG"),
    ],
    ids=lambda error: type(error).__name__,
)
def test_errors_arrive_as_they_were_raised(
    router: ScriptedRouter, client: Client, error: StagemeshError
) -> None:
    router.script = refusal(error)
    with pytest.raises(StagemeshError) as caught:
        list(client.generate("hi", request_id="r7"))
    got = caught.value
    assert type(got) is type(error)
    assert (got.message, got.reason, got.field) == (error.message, error.reason, error.field)
    assert (got.stage, got.retry_after_s, got.metadata) == (error.stage, error.retry_after_s, error.metadata)
    assert got.request_id == "r7"


def test_an_unexpected_failure_of_the_server_is_in_the_tree(router: ScriptedRouter, client: Client) -> None:
    router.script = lambda request, context: iter([1 // 0])  # type: ignore[list-item]
    with pytest.raises(StagemeshError) as caught:
        list(client.generate("hi", request_id="r"))
    assert caught.value.request_id == "r"


def test_the_deadline_ends_a_stream(router: ScriptedRouter, client: Client) -> None:
    router.script = endless
    begin = time.monotonic()
    with pytest.raises(DeadlineExceededError, match="request r"):
        list(client.generate("hi", timeout=0.3, request_id="r"))
    assert time.monotonic() - begin > 0.2
    assert all(seen.has_ended() for seen in router.received)


def test_close_cancels(router: ScriptedRouter, client: Client) -> None:
    router.script = endless
    stream = client.generate("hi")
    next(stream)
    assert not router.received[0].ended.is_set()
    stream.close()
    assert router.has_ended(0)
    assert list(stream) == []


def test_leaving_the_block_cancels(router: ScriptedRouter, client: Client) -> None:
    router.script = endless
    with client.generate("hi") as stream:
        next(stream)
    assert router.has_ended(0)


def test_break_and_forgetting_the_stream_cancels(router: ScriptedRouter, client: Client) -> None:
    router.script = endless
    for _ in client.generate("hi"):
        break
    gc.collect()
    assert router.has_ended(0)


def test_close_from_another_thread_ends_the_iteration(router: ScriptedRouter, client: Client) -> None:
    router.script = endless
    stream = client.generate("hi")
    next(stream)
    timer = threading.Timer(0.2, stream.close)
    timer.start()
    for _ in stream:
        pass
    timer.join()


def test_closing_the_client_ends_its_streams_and_calls(router: ScriptedRouter) -> None:
    router.script = endless
    client = Client(router.address)
    stream = client.generate("hi")
    next(stream)
    client.close()
    with pytest.raises(CancelledError):
        list(stream)
    for call in (lambda: client.generate("hi"), client.model, client.ready):
        with pytest.raises(FailedPreconditionError, match="closed") as caught:
            call()
        assert caught.value.reason == "CLIENT_CLOSED"


def test_no_server_names_the_address_and_the_request(router: ScriptedRouter) -> None:
    router.stop()
    with Client(router.address) as client, pytest.raises(UnavailableError) as caught:
        client.complete("hi", request_id="r")
    assert str(caught.value) == f"no connection to {router.address}: Connection refused (request r)"


SILENT = """
import time
from concurrent.futures import ThreadPoolExecutor
import grpc
from stagemesh.v1 import inference_pb2, inference_pb2_grpc

class Silent(inference_pb2_grpc.InferenceServiceServicer):
    def Generate(self, request, context):
        yield inference_pb2.GenerateResponse(text="x", token_ids=[1])
        time.sleep(1000)

options = (("grpc.http2.max_ping_strikes", 0), ("grpc.http2.min_recv_ping_interval_without_data_ms", 1))
server = grpc.server(ThreadPoolExecutor(1), options=options)
inference_pb2_grpc.add_InferenceServiceServicer_to_server(Silent(), server)
print(server.add_insecure_port("127.0.0.1:0"), flush=True)
server.start()
time.sleep(1000)
"""


def test_a_router_that_stops_without_a_word_is_noticed_while_a_stream_waits(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Also after pings to which it answered, between which nothing was sent."""
    faster = tuple(
        (key, value // 30 if "keepalive_time" in key or "ping_timeout" in key else value)
        for key, value in CHANNEL_OPTIONS
    )
    monkeypatch.setattr("stagemesh.client._client.CHANNEL_OPTIONS", faster)
    router = subprocess.Popen([sys.executable, "-c", SILENT], stdout=subprocess.PIPE, text=True)
    assert router.stdout is not None
    try:
        with Client(f"127.0.0.1:{router.stdout.readline().strip()}", timeout=50) as client:
            stream = client.generate("hi")
            assert next(stream).text == "x"
            time.sleep(4.5)  # four pings
            router.send_signal(signal.SIGSTOP)
            with pytest.raises(UnavailableError, match="ping timeout"):
                next(stream)
    finally:
        router.kill()
        router.communicate()


def test_a_server_of_another_kind_names_the_address() -> None:
    server = grpc.server(ThreadPoolExecutor(1))
    address = f"127.0.0.1:{server.add_insecure_port('127.0.0.1:0')}"
    server.start()
    with (
        Client(address) as client,
        pytest.raises(UnimplementedError, match=f"{address} does not have this call"),
    ):
        client.complete("hi")
    server.stop(None)


def test_a_call_that_is_made_while_its_stream_is_closed_is_cancelled() -> None:
    calls: list[Call] = []

    class Call:
        cancelled = False

        def __next__(self) -> pb.GenerateResponse:
            raise UnavailableError("not now", retry_after_s=0.0)

        def cancel(self) -> None:
            self.cancelled = True

    def start(exchange: Exchange) -> Call:
        if calls:
            stream.close()  # as another thread may
        calls.append(Call())
        return calls[-1]

    exchange = Exchange(pb.GenerateRequest(text="a"), timeout_s=None, retries=1, address="a:1")
    stream = TokenStream(exchange, start)
    assert list(stream) == []
    assert [call.cancelled for call in calls] == [True, True]


def test_a_refusal_is_not_retried_unless_asked(router: ScriptedRouter, client: Client) -> None:
    router.scripts = [refusal(UnavailableError("forming", reason="LANE_FORMING", retry_after_s=0.01))]
    with pytest.raises(UnavailableError):
        client.complete("hi")
    assert len(router.received) == 1


def test_retries_wait_as_the_router_says_and_take_a_new_id(router: ScriptedRouter) -> None:
    router.scripts = [refusal(UnavailableError("forming", reason="LANE_FORMING", retry_after_s=0.3))] * 2
    begin = time.monotonic()
    with Client(router.address, retries=2) as client:
        assert client.complete("hi").text == "Hello world"
    assert time.monotonic() - begin >= 0.6
    assert len({seen.request.request_id for seen in router.received}) == 3


def test_retries_keep_the_callers_id_and_run_out(router: ScriptedRouter) -> None:
    router.script = refusal(ResourceExhaustedError("full", retry_after_s=0.01))
    with Client(router.address, retries=2) as client, pytest.raises(ResourceExhaustedError):
        client.complete("hi", request_id="mine")
    assert [seen.request.request_id for seen in router.received] == ["mine"] * 3


def test_no_retry_after_the_first_token_nor_past_the_deadline(router: ScriptedRouter) -> None:
    def lost(request: pb.GenerateRequest, context: Any) -> Iterator[pb.GenerateResponse]:
        yield pb.GenerateResponse(text="a")
        yield from refusal(StageLostError("gone", reason="STAGE_LOST", retry_after_s=0.01))(request, context)

    with Client(router.address, retries=5) as client:
        router.script = lost
        with pytest.raises(StageLostError):
            client.complete("hi")
        router.script = refusal(UnavailableError("forming", retry_after_s=60.0))
        with pytest.raises(UnavailableError):
            client.complete("hi", timeout=20.0)
    assert len(router.received) == 2


def test_it_reconnects_to_a_server_that_came_back(router: ScriptedRouter, client: Client) -> None:
    assert client.complete("hi").text == "Hello world"
    router.stop()
    assert client.ready() is False
    with ScriptedRouter(words("again"), port=router.port):
        client.wait_ready(timeout=60)
        assert client.complete("hi").text == "again"


def test_ready_follows_the_health_service(router: ScriptedRouter, client: Client) -> None:
    assert client.ready(timeout=60) is True
    router.set_health(health_pb2.HealthCheckResponse.NOT_SERVING)
    assert client.ready() is False
    with pytest.raises(DeadlineExceededError, match="was not ready within"):
        client.wait_ready(timeout=0.3)
    timer = threading.Timer(0.3, router.set_health, [health_pb2.HealthCheckResponse.SERVING])
    timer.start()
    client.wait_ready(timeout=60)
    assert client.ready(timeout=60) is True
    timer.join()


def test_a_bad_address_is_refused() -> None:
    with pytest.raises(ConfigError, match="HOST:PORT"):
        Client("localhost")
