"""What a stage counts of its steps and links."""

from __future__ import annotations

import numpy as np

from stagemesh.stage.leader.stats import StageStats
from stagemesh.stage.local_queue import StepTiming, Timings, unpack_timings
from stagemesh.v1 import stage_pb2
from stagemesh.wire.columns import U8, U32, U64, pack
from stagemesh.wire.telemetry.names import PARTS, Attribute, Span

MS = 1_000_000


def rows(counts: list[int], inputs: list[int], sample: list[bool] | None = None) -> stage_pb2.Rows:
    given = sum(count for count, step in zip(counts, inputs, strict=True) if not step)
    return stage_pb2.Rows(
        slots=pack(np.arange(len(counts)), U32),
        counts=pack(counts, U32) if set(counts) != {1} else b"",
        input_steps=pack(inputs, U64) if any(inputs) else b"",
        tokens=pack([5] * given, U32),
        sample=pack(sample, U8) if sample else b"",
    )


def timing(number: int, send_ns: int = 1 * MS, sent_bytes: int = 100) -> Timings:
    packed = StepTiming(1, number, 10**9, 0, 2 * MS, 3 * MS, 4 * MS, send_ns, sent_bytes).pack()
    return unpack_timings(packed)


def test_steps_are_told_apart_by_what_is_in_them() -> None:
    stats = StageStats("1")
    stats.open_lane()
    stats.take_steps(
        [
            stage_pb2.Step(number=1, rows=rows([30, 8], [0, 0], sample=[True, False])),
            stage_pb2.Step(number=2, rows=rows([1, 20], [1, 0])),
            stage_pb2.Step(number=3, rows=rows([1, 1], [2, 2])),
            stage_pb2.Step(number=4, same_rows_as=3),
            stage_pb2.Step(number=5, same_rows_as=1),
        ]
    )
    assert stats.tokens == {"prefill": 38, "mixed": 21, "decode": 2 + 2 + 1}
    for number in range(1, 6):
        stats.take_timings(timing(number))
    stats.settle()
    counts = {
        (s.attributes[Attribute.PHASE], s.attributes[Attribute.PART]): (s.count, round(s.total * 1e3))
        for s in stats.step.snapshots()
    }
    assert set(counts) == {(phase, part) for phase in ("prefill", "mixed", "decode") for part in PARTS}
    assert counts["decode", Span.COMPUTE] == (3, 12)
    assert counts["mixed", Span.RECEIVE] == (1, 3)
    assert counts["prefill", Span.WAIT] == (1, 2)


def test_links_count_their_bytes_on_the_host_and_on_a_device() -> None:
    stats = StageStats("0")
    stats.open_lane()
    stats.sent(stage_pb2.LINK_KIND_ACTIVATIONS, "grpc", 4096, 0.002)
    stats.take_timings(timing(1))
    stats.settle()
    assert stats.link_bytes == {("activations", "grpc"): 4096}, "a host's link counts what it sent, once"
    stats.open_lane()
    stats.send_from_worker(stage_pb2.LINK_KIND_RING, "nccl")
    stats.take_timings(timing(1, send_ns=3 * MS, sent_bytes=77))
    stats.settle()
    assert stats.link_bytes["ring", "nccl"] == 77
    by_transport = {s.attributes[Attribute.TRANSPORT]: s.total for s in stats.link_time.snapshots()}
    assert by_transport == {"grpc": 0.002, "nccl": 0.003}
