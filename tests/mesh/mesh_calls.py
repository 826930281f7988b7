"""Requests and what comes back for them, on the wire."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import grpc
import numpy as np
from google.protobuf.message import Message
from google.rpc import error_details_pb2, status_pb2
from grpc_status import rpc_status
from running_mesh import CALL_TIMEOUT_S, RunningMesh

from stagemesh.v1 import inference_pb2

VOCAB_SIZE = 331


def make_prompt(length: int, seed: int = 0) -> list[int]:
    """Random token ids."""
    return np.random.default_rng((seed, length)).integers(0, VOCAB_SIZE, length).tolist()


def make_request(prompt: Sequence[int] | None = None, max_tokens: int | None = 8, **fields: Any) -> Any:
    """A greedy request that ignores end tokens, unless `fields` say otherwise."""
    values: dict[str, Any] = {"temperature": 0.0, "ignore_eos": True, "max_tokens": max_tokens}
    if not {"text", "chat", "token_ids"} & set(fields):
        values["token_ids"] = inference_pb2.TokenIds(ids=make_prompt(9) if prompt is None else prompt)
    return inference_pb2.GenerateRequest(**values | fields)


@dataclass(slots=True)
class Answer:
    """Everything a stream brought."""

    request_id: str = ""
    token_ids: list[int] = field(default_factory=list)
    text: str = ""
    finish_reason: int = 0
    usage: inference_pb2.Usage = field(default_factory=inference_pb2.Usage)


def read_answer(call: Iterator[inference_pb2.GenerateResponse]) -> Answer:
    """Read a Generate call to its end."""
    answer = Answer()
    for response in call:
        assert not answer.finish_reason, "a message came after the last"
        answer.request_id = answer.request_id or response.request_id
        answer.token_ids += response.token_ids
        answer.text += response.text
        answer.finish_reason = response.finish_reason
        answer.usage = response.usage
    return answer


def generate(
    mesh: RunningMesh, prompt: Sequence[int] | None = None, max_tokens: int | None = 8, **fields: Any
) -> Answer:
    """One request, from start to end."""
    return read_answer(mesh.stub.Generate(make_request(prompt, max_tokens, **fields), timeout=CALL_TIMEOUT_S))


def start(
    mesh: RunningMesh, prompt: Sequence[int] | None = None, max_tokens: int = 1500, **fields: Any
) -> Any:
    """A long request that has brought its first token."""
    call = mesh.stub.Generate(make_request(prompt, max_tokens, **fields), timeout=CALL_TIMEOUT_S)
    next(call)
    return call


@dataclass(frozen=True, slots=True)
class Refusal:
    """A status with its details."""

    code: grpc.StatusCode
    message: str
    reason: str
    domain: str
    field: str
    retry_s: float
    metadata: dict[str, str]


def read_refusal(call: Iterator[Any]) -> Refusal:
    """Read a call that must end with an error; what it brings before that does not matter."""
    try:
        for _ in call:
            pass
    except grpc.RpcError as error:
        status = rpc_status.from_call(error)
        if status is None:  # gRPC's own statuses have no details
            return Refusal(error.code(), error.details(), "", "", "", 0.0, {})
        return to_refusal(status)
    raise AssertionError("the call ended well")


def refusal(mesh: RunningMesh, **fields: Any) -> Refusal:
    """What a request that must be refused is told."""
    return read_refusal(mesh.stub.Generate(make_request(**fields), timeout=CALL_TIMEOUT_S))


def to_refusal(status: status_pb2.Status) -> Refusal:
    """The details of a status, at most one of each kind."""
    details: dict[type[Message], Any] = {}
    for kind in (error_details_pb2.ErrorInfo, error_details_pb2.BadRequest, error_details_pb2.RetryInfo):
        found = [detail for detail in status.details if detail.Is(kind.DESCRIPTOR)]
        assert len(found) <= 1
        details[kind] = kind()
        if found:
            found[0].Unpack(details[kind])
    info, bad, retry = details.values()
    code = next(code for code in grpc.StatusCode if code.value[0] == status.code)
    field = bad.field_violations[0].field if bad.field_violations else ""
    delay_s = retry.retry_delay.ToNanoseconds() / 1e9
    return Refusal(code, status.message, info.reason, info.domain, field, delay_s, dict(info.metadata))
