"""A lane that a worker cannot open: whoever opened it hears of it."""

from __future__ import annotations

from typing import Any

from stagemesh.stage.engine.interface import NoLinks
from stagemesh.stage.local_queue import ToLeader
from stagemesh.stage.worker.worker import Worker
from stagemesh.v1 import stage_pb2
from stagemesh.wire.columns import U64, unpack
from stagemesh.wire.errors import InvalidArgumentError


class Outbox:
    def __init__(self) -> None:
        self.said: list[list[Any]] = []

    def send_multipart(self, parts: list[Any]) -> None:
        self.said.append(parts)


class FullEngine:
    """Has tables for fewer slots."""

    links, holds_tokens = NoLinks(), True

    def open(self, lane: stage_pb2.OpenLaneRequest) -> None:
        raise InvalidArgumentError(f"max_slots is {lane.max_slots}; there is room for 8", field="max_slots")


def test_an_epoch_that_the_engine_refuses_is_told_by_its_number() -> None:
    outbox, engine, inbox = Outbox(), FullEngine(), object()
    worker = Worker(0, engine, inbox, outbox, block_size=16, max_context=64)  # type: ignore[arg-type]
    worker._open(
        stage_pb2.OpenLaneRequest(epoch=77, num_stages=9, stage_index=0, max_slots=9, num_blocks=8, depth=3)
    )
    kind, epoch, message = outbox.said[-1]
    assert kind == ToLeader.REFUSED
    assert unpack(epoch, U64, "epoch", 1).tolist() == [77]
    assert b"there is room for 8" in message
