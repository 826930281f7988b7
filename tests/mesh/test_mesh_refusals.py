"""Bad requests: a row of docs/errors.md each. Whatever is refused, a stream alongside does not notice."""

from __future__ import annotations

import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import grpc
import pytest
from mesh_calls import (
    VOCAB_SIZE,
    generate,
    make_prompt,
    make_request,
    read_answer,
    read_refusal,
    refusal,
    start,
)
from mesh_models import MAX_CONTEXT
from mesh_processes import start_router
from mesh_session import Session
from running_mesh import CALL_TIMEOUT_S, RunningMesh

from stagemesh.v1 import admin_pb2, inference_pb2
from stagemesh.wire.status import from_rpc_error

INVALID = grpc.StatusCode.INVALID_ARGUMENT


@pytest.fixture(scope="module")
def mesh(single_mesh: RunningMesh) -> RunningMesh:
    """What is refused never gets to a stage: one is enough."""
    return single_mesh


@pytest.fixture(scope="module")
def neighbour(mesh: RunningMesh) -> Iterator[Any]:
    """A stream that runs while everything else here is refused, and brings what it brings alone."""
    alone = generate(mesh, make_prompt(12, 4), 400).token_ids
    call = mesh.stub.Generate(make_request(make_prompt(12, 4), 400), timeout=CALL_TIMEOUT_S)
    yield call
    assert read_answer(call).token_ids == alone


def ids(*values: int) -> inference_pb2.TokenIds:
    return inference_pb2.TokenIds(ids=values)


FIELDS = [
    ("empty prompt", {"token_ids": ids()}, "token_ids", "EMPTY_PROMPT"),
    ("no prompt", {"prompt": None}, "prompt", "BAD_FIELD"),
    ("prompt of the context", {"prompt": [1] * MAX_CONTEXT}, "token_ids", "PROMPT_TOO_LONG"),
    ("prompt over the context", {"prompt": [1] * (MAX_CONTEXT + 9)}, "token_ids", "PROMPT_TOO_LONG"),
    ("id out of range", {"token_ids": ids(1, VOCAB_SIZE, 2)}, "token_ids.ids", "BAD_FIELD"),
    ("max_tokens 0", {"max_tokens": 0}, "max_tokens", "BAD_FIELD"),
    ("max_tokens past the context", {"max_tokens": MAX_CONTEXT - 8}, "max_tokens", "BAD_FIELD"),
    ("temperature below 0", {"temperature": -0.5}, "temperature", "BAD_FIELD"),
    ("temperature NaN", {"temperature": math.nan}, "temperature", "BAD_FIELD"),
    ("temperature infinite", {"temperature": math.inf}, "temperature", "BAD_FIELD"),
    ("top_p 0", {"top_p": 0.0}, "top_p", "BAD_FIELD"),
    ("top_p below 0", {"top_p": -1.0}, "top_p", "BAD_FIELD"),
    ("top_p above 1", {"top_p": 1.5}, "top_p", "BAD_FIELD"),
    ("top_p NaN", {"top_p": math.nan}, "top_p", "BAD_FIELD"),
    ("long request_id", {"request_id": "x" * 129}, "request_id", "BAD_FIELD"),
    ("unprintable request_id", {"request_id": "a\nb"}, "request_id", "BAD_FIELD"),
]


@pytest.mark.parametrize(
    ("fields", "field", "reason"), [row[1:] for row in FIELDS], ids=[row[0] for row in FIELDS]
)
def test_bad_field(
    mesh: RunningMesh, neighbour: Any, fields: dict[str, Any], field: str, reason: str
) -> None:
    fields = dict(fields)
    if fields.get("prompt", ...) is None:
        message = inference_pb2.GenerateRequest(max_tokens=3)
        refused = read_refusal(mesh.stub.Generate(message, timeout=CALL_TIMEOUT_S))
    else:
        refused = refusal(mesh, **fields)
    assert (refused.code, refused.domain) == (INVALID, "stagemesh")
    assert (refused.field, refused.reason) == (field, reason)
    assert refused.message.startswith(field)


def test_the_last_value_that_is_still_good(mesh: RunningMesh, neighbour: Any) -> None:
    answer = generate(mesh, [1] * (MAX_CONTEXT - 3), 3, top_p=1.0, temperature=0.0)
    assert len(answer.token_ids) == 3
    to_the_end = generate(mesh, [1] * (MAX_CONTEXT - 4), None)
    assert len(to_the_end.token_ids) == 4
    assert to_the_end.finish_reason == inference_pb2.FINISH_REASON_LENGTH


def test_without_max_tokens_an_answer_may_have_all_blocks(tight_mesh: RunningMesh) -> None:
    answer = generate(tight_mesh, make_prompt(20), None)
    assert len(answer.token_ids) == tight_mesh.lane.num_blocks * tight_mesh.lane.block_size + 1 - 20
    assert answer.finish_reason == inference_pb2.FINISH_REASON_LENGTH


NOT_BUILT = {
    "stop": ["\n"],
    "logprobs": 0,
    "presence_penalty": 0.5,
    "frequency_penalty": -0.5,
    "repetition_penalty": 1.1,
    "min_p": 0.1,
    "n": 2,
    "json_schema": "{}",
    "adapter": "poet",
}


@pytest.mark.parametrize("option", NOT_BUILT)
def test_an_option_not_built_is_refused_by_name(mesh: RunningMesh, neighbour: Any, option: str) -> None:
    refused = refusal(mesh, **{option: NOT_BUILT[option]})
    assert (refused.code, refused.domain) == (grpc.StatusCode.UNIMPLEMENTED, "stagemesh")
    assert refused.reason == "OPTION_NOT_BUILT"
    assert refused.field == option
    assert f"'{option}'" in refused.message


def test_values_that_ask_for_nothing_are_taken(mesh: RunningMesh, neighbour: Any) -> None:
    nothing = {
        "n": 1,
        "presence_penalty": 0.0,
        "frequency_penalty": 0.0,
        "repetition_penalty": 1.0,
        "min_p": 0.0,
    }
    assert (
        generate(mesh, make_prompt(6), 4, **nothing).token_ids == generate(mesh, make_prompt(6), 4).token_ids
    )


@pytest.mark.parametrize("kind", ["text", "chat"])
def test_text_for_a_model_without_tokenizer(mesh: RunningMesh, neighbour: Any, kind: str) -> None:
    chat = inference_pb2.Chat(messages=[inference_pb2.ChatMessage(role="user", content="hello")])
    refused = refusal(mesh, **{"text": {"text": "hello"}, "chat": {"chat": chat}}[kind])
    assert (refused.code, refused.domain) == (grpc.StatusCode.FAILED_PRECONDITION, "stagemesh")
    assert refused.reason == "NO_TOKENIZER"
    assert refused.field == kind


def test_a_live_request_id(mesh: RunningMesh, neighbour: Any) -> None:
    call = start(mesh, request_id="live")
    refused = refusal(mesh, request_id="live")
    assert (refused.code, refused.reason, refused.field) == (INVALID, "DUPLICATE_REQUEST_ID", "request_id")
    assert refused.metadata["request_id"] == "live"
    assert next(call).token_ids, "the request that has the id was ended"
    call.cancel()


@pytest.mark.parametrize("method", ["Generate", "Abort"])
def test_bytes_that_do_not_parse(mesh: RunningMesh, neighbour: Any, method: str) -> None:
    with grpc.insecure_channel(mesh.listen) as channel:
        call = channel.unary_stream(f"/stagemesh.v1.InferenceService/{method}")(
            b"\xff\xff\xff", timeout=CALL_TIMEOUT_S
        )
        refused = read_refusal(call)
    assert (refused.code, refused.reason, refused.domain) == (INVALID, "UNPARSABLE", "stagemesh")
    assert f"stagemesh.v1.{method}Request" in refused.message


def test_an_unknown_trace(mesh: RunningMesh, neighbour: Any) -> None:
    with pytest.raises(grpc.RpcError) as raised:
        mesh.admin.GetRequestTrace(admin_pb2.GetRequestTraceRequest(request_id="?"), timeout=CALL_TIMEOUT_S)
    assert raised.value.code() is grpc.StatusCode.NOT_FOUND
    assert from_rpc_error(raised.value).reason == "REQUEST_UNKNOWN"


def test_a_refusal_is_counted_and_leaves_nothing(mesh: RunningMesh) -> None:
    before = mesh.status()
    refusal(mesh, max_tokens=0)
    after = mesh.status()
    assert after.num_failed == before.num_failed + 1
    assert after.num_running + after.num_waiting <= before.num_running + before.num_waiting


def test_more_than_all_kv_there_is(tight_mesh: RunningMesh) -> None:
    """20 blocks of 16: 320 positions, the last token sampled needs none."""
    assert tight_mesh.lane.num_blocks == 20
    refused = refusal(tight_mesh, prompt=make_prompt(100), max_tokens=222)
    assert (refused.code, refused.reason, refused.domain) == (INVALID, "ABOVE_KV_CAPACITY", "stagemesh")
    assert refused.field == "max_tokens"
    assert len(generate(tight_mesh, make_prompt(100), 221).token_ids) == 221


def test_a_full_queue(tight_mesh: RunningMesh) -> None:
    """Two run, two wait, the fifth is refused; when one has left there is room again.

    The last three come in one message: nothing is formed between them, however slow this test is.
    """
    running = [start(tight_mesh, make_prompt(5, seed), 140) for seed in range(2)]
    names = ("third", "fourth", "fifth")
    with Session(tight_mesh) as session:
        session.send(*(make_request(max_tokens=5, request_id=name) for name in names))
        session.read_until_ended(*names)
    (refused,) = session.refused.values()
    assert refused.code is grpc.StatusCode.RESOURCE_EXHAUSTED
    assert (refused.reason, refused.domain) == ("QUEUE_FULL", "stagemesh")
    assert refused.retry_s > 0
    assert refused.metadata["request_id"] == "fifth"
    # `start` has taken the first token of each.
    assert [read_answer(call).usage.completion_tokens for call in running] == [140, 140]
    assert [session.answers[name].usage.completion_tokens for name in names[:2]] == [5, 5]
    assert len(generate(tight_mesh).token_ids) == 8


def test_no_lane_is_ready(wide: Path, tmp_path: Path) -> None:
    """At once, with a hint when to try again, and the stage that is waited for."""
    router = start_router(tmp_path, wide, ["127.0.0.1:9"])
    try:
        listen = router.said(r"listening on (\S+),").group(1)
        router.said("waiting for stage 0")
        with grpc.insecure_channel(listen) as channel:
            call = channel.unary_stream(
                "/stagemesh.v1.InferenceService/Generate",
                request_serializer=inference_pb2.GenerateRequest.SerializeToString,
            )
            refused = read_refusal(call(make_request(), timeout=CALL_TIMEOUT_S))
        assert refused.code is grpc.StatusCode.UNAVAILABLE
        assert (refused.reason, refused.domain) == ("LANE_NOT_READY", "stagemesh")
        assert refused.retry_s > 0
        assert "stage 0 (127.0.0.1:9)" in refused.message
        assert router.stop() == 0
    finally:
        router.kill()
