"""A stage that is spoken to wrongly: it refuses by name, and serves on."""

from __future__ import annotations

import itertools
import queue
import time
from collections.abc import Callable, Iterator
from typing import Any

import grpc
import numpy as np
import pytest
from grpc_status import rpc_status
from mesh_calls import Refusal, read_refusal, to_refusal
from mesh_processes import Service, address_of
from running_mesh import CALL_TIMEOUT_S

from stagemesh.v1 import stage_pb2, stage_pb2_grpc
from stagemesh.wire import frame
from stagemesh.wire.columns import F32, U32, U64, pack

SERVICE = "/stagemesh.v1.StageService/"
EPOCHS = itertools.count(1)


@pytest.fixture
def channel(lone_stage: Service) -> Iterator[grpc.Channel]:
    with grpc.insecure_channel(address_of(lone_stage)) as one:
        yield one


@pytest.fixture
def stub(channel: grpc.Channel) -> stage_pb2_grpc.StageServiceStub:
    return stage_pb2_grpc.StageServiceStub(channel)


def lane(epoch: int, **fields: Any) -> stage_pb2.OpenLaneRequest:
    values = {"num_stages": 1, "num_blocks": 8, "max_slots": 4, "depth": 2}
    return stage_pb2.OpenLaneRequest(lane_id="test", epoch=epoch, **values | fields)


@pytest.fixture
def epoch(stub: stage_pb2_grpc.StageServiceStub) -> int:
    """Of a lane that is open."""
    number = next(EPOCHS)
    stub.OpenLane(lane(number), timeout=CALL_TIMEOUT_S)
    return number


def make_step(
    epoch: int, number: int, slot: int = 0, *, block: int = 0, admit: bool = True
) -> stage_pb2.Step:
    """One that computes three positions of a slot and samples the last."""
    step = stage_pb2.Step(epoch=epoch, number=number)
    if admit:
        one = step.admissions
        one.slots, one.positions, one.seeds = pack([slot], U32), pack([0], U32), pack([1], U64)
        one.temperatures, one.top_ks, one.top_ps = pack([0], F32), pack([0], U32), pack([1], F32)
        step.append_slots, step.append_blocks = pack([slot], U32), pack([block], U32)
    step.rows.slots, step.rows.counts = pack([slot], U32), pack([3], U32)
    step.rows.tokens = pack([5, 6, 7], U32)
    return step


class Execution:
    """An Execute stream with requests given one by one."""

    def __init__(self, channel: grpc.Channel, epoch: int | str | None) -> None:
        self._outgoing: queue.SimpleQueue[bytes | None] = queue.SimpleQueue()
        metadata = () if epoch is None else (("stagemesh-epoch", str(epoch)),)
        self.call = channel.stream_stream(f"{SERVICE}Execute")(
            iter(self._outgoing.get, None), timeout=CALL_TIMEOUT_S, metadata=metadata
        )

    def send(self, *steps: stage_pb2.Step) -> None:
        self._outgoing.put(stage_pb2.ExecuteRequest(steps=steps).SerializeToString())

    def send_bytes(self, data: bytes) -> None:
        self._outgoing.put(data)

    def result(self) -> stage_pb2.StepResult:
        """The next result; reports are passed over."""
        while True:
            response = stage_pb2.ExecuteResponse.FromString(next(self.call))
            if response.results:
                assert len(response.results) == 1
                return response.results[0]

    def refusal(self) -> Refusal:
        return read_refusal(self.call)

    def close(self) -> None:
        self._outgoing.put(None)
        self.call.cancel()


@pytest.fixture
def execute(channel: grpc.Channel) -> Iterator[Callable[[Any], Execution]]:
    """execute(epoch): an Execute stream."""
    opened: list[Execution] = []

    def open_one(epoch: Any) -> Execution:
        opened.append(Execution(channel, epoch))
        return opened[-1]

    yield open_one
    for one in opened:
        one.close()


def call_refusal(call: Callable[[], Any]) -> Refusal:
    with pytest.raises(grpc.RpcError) as raised:
        call()
    status = rpc_status.from_call(raised.value)
    assert status is not None
    return to_refusal(status)


def tokens_of(execution: Execution, epoch: int) -> list[int]:
    execution.send(make_step(epoch, 1))
    result = execution.result()
    assert (result.epoch, result.number) == (epoch, 1)
    return np.frombuffer(result.token_ids, U32).tolist()


def test_a_step_is_answered_and_the_slots_of_an_epoch_are_new(
    stub: stage_pb2_grpc.StageServiceStub, execute: Callable[[Any], Execution], epoch: int
) -> None:
    first = tokens_of(execute(epoch), epoch)
    assert len(first) == 1
    higher = next(EPOCHS)
    stub.OpenLane(lane(higher), timeout=CALL_TIMEOUT_S)
    assert tokens_of(execute(higher), higher) == first


@pytest.mark.parametrize("method", ["Describe", "OpenLane", "PrepareLink", "ConnectLink"])
def test_bytes_that_do_not_parse(channel: grpc.Channel, method: str) -> None:
    refused = read_refusal(channel.unary_stream(SERVICE + method)(b"\xff\xff\xff", timeout=CALL_TIMEOUT_S))
    assert refused.code is grpc.StatusCode.INVALID_ARGUMENT
    assert (refused.reason, refused.domain) == ("UNPARSABLE", "stagemesh")
    assert f"stagemesh.v1.{method}Request" in refused.message


def test_bytes_that_do_not_parse_on_execute(execute: Callable[[Any], Execution], epoch: int) -> None:
    execution = execute(epoch)
    execution.send_bytes(b"\xff\xff\xff")
    refused = execution.refusal()
    assert (refused.code, refused.reason) == (grpc.StatusCode.INVALID_ARGUMENT, "UNPARSABLE")
    assert "stagemesh.v1.ExecuteRequest" in refused.message


def test_bytes_that_do_not_parse_on_transfer(channel: grpc.Channel, epoch: int) -> None:
    call = channel.stream_stream(f"{SERVICE}Transfer")(iter([b"\xff\xff\xff"]), timeout=CALL_TIMEOUT_S)
    refused = read_refusal(call)
    assert (refused.code, refused.reason) == (grpc.StatusCode.INVALID_ARGUMENT, "UNPARSABLE")
    assert "stagemesh.v1.TransferRequest" in refused.message


def test_transfer_for_a_link_nobody_prepared(channel: grpc.Channel, epoch: int) -> None:
    message = b"".join(
        frame.encode(epoch=epoch, kind=stage_pb2.LINK_KIND_ACTIVATIONS, step=1, tensor=memoryview(b"xxxx"))
    )
    refused = read_refusal(
        channel.stream_stream(f"{SERVICE}Transfer")(iter([message]), timeout=CALL_TIMEOUT_S)
    )
    assert (refused.code, refused.reason) == (grpc.StatusCode.FAILED_PRECONDITION, "LINK_NOT_PREPARED")


def test_an_epoch_that_is_not_above_the_last(stub: stage_pb2_grpc.StageServiceStub, epoch: int) -> None:
    for stale in (epoch, epoch - 1):
        refused = call_refusal(lambda stale=stale: stub.OpenLane(lane(stale), timeout=CALL_TIMEOUT_S))
        assert (refused.code, refused.reason) == (grpc.StatusCode.FAILED_PRECONDITION, "STALE_EPOCH")
        assert str(stale) in refused.message


def test_calls_of_an_older_epoch(
    stub: stage_pb2_grpc.StageServiceStub, execute: Callable[[Any], Execution], epoch: int
) -> None:
    old = epoch - 1
    prepare = stage_pb2.PrepareLinkRequest(epoch=old, kind=stage_pb2.LINK_KIND_RING, transport="grpc")
    for refused in (
        call_refusal(lambda: stub.PrepareLink(prepare, timeout=CALL_TIMEOUT_S)),
        execute(old).refusal(),
    ):
        assert (refused.code, refused.reason) == (grpc.StatusCode.FAILED_PRECONDITION, "STALE_EPOCH")
        assert refused.domain == "stagemesh"


@pytest.mark.parametrize("value", [None, "many"])
def test_execute_without_an_epoch(execute: Callable[[Any], Execution], value: str | None) -> None:
    refused = execute(value).refusal()
    assert (refused.code, refused.reason) == (grpc.StatusCode.INVALID_ARGUMENT, "NO_EPOCH")


def test_a_second_execute_stream(execute: Callable[[Any], Execution], epoch: int) -> None:
    first = execute(epoch)
    tokens_of(first, epoch)
    refused = execute(epoch).refusal()
    assert (refused.code, refused.reason) == (grpc.StatusCode.FAILED_PRECONDITION, "LANE_TAKEN")
    step = make_step(epoch, 2, slot=1, block=1)
    first.send(step)
    assert first.result().number == 2, "the stream that was there was harmed"


def test_raising_the_epoch_ends_the_stream_of_the_older(
    stub: stage_pb2_grpc.StageServiceStub, execute: Callable[[Any], Execution], epoch: int
) -> None:
    execution = execute(epoch)
    tokens_of(execution, epoch)
    stub.OpenLane(lane(next(EPOCHS)), timeout=CALL_TIMEOUT_S)
    refused = execution.refusal()
    assert (refused.code, refused.reason) == (grpc.StatusCode.UNAVAILABLE, "EPOCH_RAISED")


BAD_STEPS = {
    "a gap in the numbers": (lambda epoch: make_step(epoch, 3, admit=False), "expected step 2"),
    "a number again": (lambda epoch: make_step(epoch, 1, admit=False), "expected step 2"),
    "an unknown slot": (lambda epoch: make_step(epoch, 2, slot=4), "slot 4 of 4"),
    "an unknown block": (lambda epoch: make_step(epoch, 2, slot=1, block=8), "block 8 of 8"),
    "rows of no step": (lambda epoch: stage_pb2.Step(epoch=epoch, number=2, same_rows_as=77), "step 77"),
    "no block for its positions": (
        lambda epoch: stage_pb2.Step(
            epoch=epoch, number=2, rows=stage_pb2.Rows(slots=pack([2], U32), tokens=pack([1], U32))
        ),
        "has 0 blocks",
    ),
    "half a column": (
        lambda epoch: stage_pb2.Step(epoch=epoch, number=2, rows=stage_pb2.Rows(slots=b"\1\0\0")),
        "multiple of 4",
    ),
}


@pytest.mark.parametrize("what", BAD_STEPS)
def test_a_bad_step_ends_the_lane_and_not_the_stage(
    stub: stage_pb2_grpc.StageServiceStub, execute: Callable[[Any], Execution], epoch: int, what: str
) -> None:
    make, words = BAD_STEPS[what]
    execution = execute(epoch)
    first = tokens_of(execution, epoch)
    execution.send(make(epoch))
    refused = execution.refusal()
    assert (refused.code, refused.reason) == (grpc.StatusCode.INVALID_ARGUMENT, "BAD_STEP")
    assert refused.domain == "stagemesh"
    assert words in refused.message
    higher = next(EPOCHS)
    stub.OpenLane(lane(higher), timeout=CALL_TIMEOUT_S)
    assert tokens_of(execute(higher), higher) == first


@pytest.mark.parametrize(
    ("field", "value"), [("num_blocks", 1 << 30), ("num_blocks", 0), ("max_slots", 1 << 20)]
)
def test_a_lane_above_what_the_stage_has(
    stub: stage_pb2_grpc.StageServiceStub, field: str, value: int
) -> None:
    refused = call_refusal(
        lambda: stub.OpenLane(lane(next(EPOCHS), **{field: value}), timeout=CALL_TIMEOUT_S)
    )
    assert refused.code is grpc.StatusCode.INVALID_ARGUMENT
    assert refused.field == field


def test_an_unknown_transport(stub: stage_pb2_grpc.StageServiceStub, epoch: int) -> None:
    prepare = stage_pb2.PrepareLinkRequest(epoch=epoch, kind=stage_pb2.LINK_KIND_RING, transport="pigeon")
    refused = call_refusal(lambda: stub.PrepareLink(prepare, timeout=CALL_TIMEOUT_S))
    assert (refused.code, refused.reason) == (grpc.StatusCode.FAILED_PRECONDITION, "TRANSPORT_UNKNOWN")
    assert "pigeon" in refused.message


def test_a_link_whose_sender_does_not_come(stub: stage_pb2_grpc.StageServiceStub, epoch: int) -> None:
    prepare = stage_pb2.PrepareLinkRequest(epoch=epoch, kind=stage_pb2.LINK_KIND_RING, transport="grpc")
    stub.PrepareLink(prepare, timeout=CALL_TIMEOUT_S)
    connect = stage_pb2.ConnectLinkRequest(
        epoch=epoch, kind=stage_pb2.LINK_KIND_RING, transport="grpc", timeout_ms=200
    )
    began = time.monotonic()
    refused = call_refusal(lambda: stub.ConnectLink(connect, timeout=CALL_TIMEOUT_S))
    assert time.monotonic() - began < CALL_TIMEOUT_S / 2
    assert (refused.code, refused.reason) == (grpc.StatusCode.UNAVAILABLE, "STAGE_LOST")
