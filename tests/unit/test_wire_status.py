"""Errors to statuses and back, over a real channel too."""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import grpc
import pytest
from google.protobuf import any_pb2
from google.rpc import error_details_pb2, status_pb2
from hypothesis import given
from hypothesis import strategies as st

from stagemesh.wire import errors
from stagemesh.wire.errors import StagemeshError, StartupError
from stagemesh.wire.status import from_proto, from_rpc_error, to_grpc, to_proto


def tree(kind: type[StagemeshError] = StagemeshError) -> Iterator[type[StagemeshError]]:
    """Every error that goes over the wire."""
    for child in kind.__subclasses__():
        if not issubclass(child, StartupError):
            yield child
            yield from tree(child)


KINDS = list(tree())
REASONS = {errors.StageLostError: "STAGE_LOST", errors.ChainError: "CHAIN_REFUSED"}


def make(kind: type[StagemeshError]) -> StagemeshError:
    return kind(
        "what happened",
        reason=REASONS.get(kind, "SOME_REASON"),
        field="max_tokens",
        request_id="r1",
        stage="stage 1 (host:1)",
        retry_after_s=1.5,
        metadata={"differs": "dtype"},
    )


def values(error: StagemeshError) -> tuple[object, ...]:
    return (
        type(error),
        error.message,
        error.reason,
        error.field,
        error.request_id,
        error.stage,
        error.retry_after_s,
        error.metadata,
    )


def test_the_tree_is_complete() -> None:
    assert len(KINDS) == 11
    assert all(kind.code is not grpc.StatusCode.UNKNOWN for kind in KINDS)


@pytest.mark.parametrize("kind", KINDS)
def test_there_and_back(kind: type[StagemeshError]) -> None:
    error = make(kind)
    assert values(from_proto(to_proto(error))) == values(error)


@pytest.mark.parametrize("kind", KINDS)
def test_there_and_back_with_a_message_alone(kind: type[StagemeshError]) -> None:
    error = kind("what happened", reason=REASONS.get(kind, ""))
    again = from_proto(to_proto(error))
    assert values(again) == values(error)
    assert error.reason
    status = to_proto(error)
    assert [detail.TypeName() for detail in status.details] == ["google.rpc.ErrorInfo"]


@pytest.mark.parametrize("kind", KINDS)
def test_the_details_are_googles(kind: type[StagemeshError]) -> None:
    status = to_proto(make(kind))
    assert status.code == kind.code.value[0]
    info, bad, retry = (
        error_details_pb2.ErrorInfo(),
        error_details_pb2.BadRequest(),
        error_details_pb2.RetryInfo(),
    )
    for detail, message in zip(status.details, (info, bad, retry), strict=True):
        assert detail.Unpack(message)
    assert info.domain == "stagemesh"
    assert dict(info.metadata) == {"differs": "dtype", "request_id": "r1", "stage": "stage 1 (host:1)"}
    assert bad.field_violations[0].field == "max_tokens"
    assert retry.retry_delay.ToMilliseconds() == 1500


@given(
    message=st.text(max_size=30),
    reason=st.text(min_size=1, max_size=10),
    field=st.text(max_size=10),
    retry=st.none() | st.integers(0, 10_000).map(lambda milliseconds: milliseconds / 1000),
)
def test_any_values_go_round(message: str, reason: str, field: str, retry: float | None) -> None:
    error = errors.InvalidArgumentError(message, reason=reason, field=field, retry_after_s=retry)
    if reason in REASONS.values():
        return
    assert values(from_proto(to_proto(error))) == values(error)


def test_what_quotes_something_long_arrives(failing: tuple[grpc.Channel, list[StagemeshError]]) -> None:
    channel, wanted = failing
    long = "\N{PILE OF POO}" * 5_000
    wanted.append(errors.ChainError(long, reason="CHAIN_REFUSED", field="text", request_id=long, stage=long))
    with pytest.raises(grpc.RpcError) as raised:
        channel.unary_unary("/test.Test/Fail")(b"", timeout=20)
    error = from_rpc_error(raised.value)
    assert (type(error), error.reason, error.field) == (errors.ChainError, "CHAIN_REFUSED", "text")
    assert error.message == "\N{PILE OF POO}" * 250 + "…"
    assert long.startswith(error.request_id.removesuffix("…"))


def test_half_a_character_is_no_reason_to_lose_an_error() -> None:
    assert from_proto(to_proto(errors.NotFoundError("no \udcff here"))).message == "no ? here"


def test_statuses_of_others_have_an_error_too() -> None:
    stranger = any_pb2.Any()
    stranger.Pack(error_details_pb2.DebugInfo(detail="?"))
    for code in grpc.StatusCode:
        if code is grpc.StatusCode.OK:
            continue
        error = from_proto(status_pb2.Status(code=code.value[0], message="m", details=[stranger]), "r9")
        assert isinstance(error, StagemeshError)
        assert error.request_id == "r9"
        if type(error) is not errors.InternalError:
            assert error.code is code


@pytest.fixture
def failing() -> Iterator[tuple[grpc.Channel, list[StagemeshError]]]:
    """A server whose one method ends with whatever is in the list."""
    wanted: list[StagemeshError] = []

    def fail(request: bytes, context: grpc.ServicerContext) -> bytes:
        context.abort_with_status(to_grpc(wanted[-1]))
        return b""

    server = grpc.server(ThreadPoolExecutor(1))
    handler = grpc.method_handlers_generic_handler(
        "test.Test", {"Fail": grpc.unary_unary_rpc_method_handler(fail)}
    )
    server.add_generic_rpc_handlers((handler,))
    port = server.add_insecure_port("127.0.0.1:0")
    server.start()
    with grpc.insecure_channel(f"127.0.0.1:{port}") as channel:
        yield channel, wanted
    server.stop(0).wait(10)


def test_over_a_channel(failing: tuple[grpc.Channel, list[StagemeshError]]) -> None:
    channel, wanted = failing
    call = channel.unary_unary("/test.Test/Fail")
    for kind in KINDS:
        wanted.append(make(kind))
        with pytest.raises(grpc.RpcError) as raised:
            call(b"", timeout=20)
        assert raised.value.code() is kind.code
        assert values(from_rpc_error(raised.value)) == values(wanted[-1])


def test_grpcs_own_errors() -> None:
    with grpc.insecure_channel("127.0.0.1:9") as channel, pytest.raises(grpc.RpcError) as raised:
        channel.unary_unary("/test.Test/Fail")(b"", timeout=20)
    error = from_rpc_error(raised.value, "r5")
    assert type(error) is errors.UnavailableError
    assert error.request_id == "r5"
    assert error.retryable
