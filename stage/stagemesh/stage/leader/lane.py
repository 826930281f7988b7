"""A leader's view of the lane it serves: its links, and what waits to go to the router."""

from __future__ import annotations

import asyncio
import time
from dataclasses import dataclass, field

import numpy as np

from stagemesh.stage.leader.link import LinkSender
from stagemesh.stage.leader.stats import StageStats
from stagemesh.stage.leader.unix_link import UnixListener, UnixReading
from stagemesh.stage.local_queue import Timings, unpack_timings
from stagemesh.v1 import stage_pb2
from stagemesh.wire.columns import U64, pack
from stagemesh.wire.errors import StagemeshError

REPORT_STEPS = 64
"""Steps after which a report goes out early."""
REPORT_INTERVAL_S = 0.25
HEARTBEAT_S = 1.0
REPORTED = ("arrival_ns", "queue_ns", "wait_ns", "receive_ns", "compute_ns", "send_ns", "sent_bytes")
"""Columns of StepTiming that a report has under the same name."""


@dataclass(slots=True)
class LeaderLane:
    """Everything of one epoch."""

    request: stage_pb2.OpenLaneRequest
    stats: StageStats | None = None
    senders: dict[int, LinkSender] = field(default_factory=dict)
    expected: dict[int, asyncio.Event] = field(default_factory=dict)
    """By kind: links this stage receives on; set when the dummy came."""
    listeners: dict[int, UnixListener] = field(default_factory=dict)
    """By kind: unix links that this stage will receive on."""
    readings: dict[int, UnixReading] = field(default_factory=dict)
    """By kind: unix links whose tensors go to several ranks, and so through the leader."""
    error: StagemeshError | None = None
    wake: asyncio.Event = field(default_factory=asyncio.Event)
    """Something waits for the Execute stream."""
    waiting_for: str = ""
    last_received: int = 0
    last_done: int = 0
    executing: bool = False
    _asked: dict[tuple[object, ...], list[asyncio.Future[bytes]]] = field(default_factory=dict)
    """What the ranks were asked about links of their own."""
    _results: list[bytes] = field(default_factory=list)
    _timings: list[Timings] = field(default_factory=list)
    _num_timings: int = 0
    _reported_at: float = field(default_factory=time.monotonic)

    @property
    def epoch(self) -> int:
        """Of the lane."""
        return self.request.epoch

    def fail(self, error: StagemeshError) -> None:
        """End the lane here: the Execute stream ends with the error, and so does whoever awaits ranks. The first counts."""
        if self.error is None:
            self.error = error
            for answer in (answer for answers in self._asked.values() for answer in answers):
                if not answer.done():
                    answer.set_exception(error)
            if self.stats:
                self.stats.lanes_failed[error.code.name] += 1
            self.wake.set()

    def ask_ranks(self, question: tuple[object, ...], ranks: int) -> list[asyncio.Future[bytes]]:
        """Where the answer of each rank will be; whoever asks cancels those it no longer awaits."""
        loop = asyncio.get_running_loop()
        self._asked[question] = [loop.create_future() for _ in range(ranks)]
        return self._asked[question]

    def answer(self, question: tuple[object, ...], rank: int, answer: bytes) -> None:
        """A rank's answer; one that comes too late is dropped."""
        future = self._asked[question][rank]
        if not future.done():
            future.set_result(answer)

    def add_result(self, response: bytes) -> None:
        """A serialized ExecuteResponse from the worker."""
        self._results.append(response)
        self.wake.set()

    def add_timings(self, data: bytes) -> Timings:
        """Steps that are done on this stage, as StepTimings end to end; returns those of this epoch."""
        came = unpack_timings(data)
        timings: Timings = came[came["epoch"] == self.epoch]
        if not len(timings):
            return timings
        self._timings.append(timings)
        self._num_timings += len(timings)
        self.last_done = int(timings["number"][-1])
        if self._num_timings >= REPORT_STEPS:
            self.wake.set()
        return timings

    def take_results(self) -> bytes:
        """Everything queued as one message: serialized messages of one type merge when put end to end."""
        results, self._results = self._results, []
        return results[0] if len(results) == 1 else b"".join(results)

    def report_due(self) -> bool:
        """Whether a report should go out now: enough steps, old enough ones, or the heartbeat."""
        age = time.monotonic() - self._reported_at
        return (
            self._num_timings >= REPORT_STEPS
            or (bool(self._timings) and age >= REPORT_INTERVAL_S)
            or age >= HEARTBEAT_S
        )

    def take_timings(self) -> Timings:
        """The steps done since the last call."""
        timings = np.concatenate(self._timings) if self._timings else unpack_timings(b"")
        self._timings, self._num_timings = [], 0
        return timings

    def report(self, timings: Timings) -> bytes:
        """The report of these steps, serialized as an ExecuteResponse."""
        self._reported_at = time.monotonic()
        report = stage_pb2.StageReport(
            epoch=self.epoch,
            numbers=pack(timings["number"], U64),
            **{name: pack(timings[name], U64) for name in REPORTED},
            monotonic_ns=time.monotonic_ns(),
            unix_ns=time.time_ns(),
            last_done=self.last_done,
            last_received=self.last_received,
            waiting_for=self.waiting_for,
        )
        return stage_pb2.ExecuteResponse(report=report).SerializeToString()

    def close_receivers(self) -> None:
        """Close the unix links that the leader receives on, or would have."""
        for listener in self.listeners.values():
            listener.close()
        for reading in self.readings.values():
            reading.close()
        self.listeners, self.readings = {}, {}

    async def close(self) -> None:
        """Close the links this stage sends on."""
        senders, self.senders = list(self.senders.values()), {}
        await asyncio.gather(*(sender.close() for sender in senders))
