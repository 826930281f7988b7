"""Watches a mesh while a client loads it: busy stages, the router's processor time, steps and tokens."""

from __future__ import annotations

import threading
import time
from dataclasses import dataclass

import grpc
from process_cpu import command_of, cpu_s, descendants

from stagemesh.v1 import admin_pb2, admin_pb2_grpc

INTERVAL_S = 0.5


@dataclass(frozen=True, slots=True, kw_only=True)
class Mark:
    """The counters at one moment."""

    at_s: float
    router_cpu_s: float
    """Of the router's main process, which schedules."""
    workers_cpu_s: float
    """Of the processes it started."""
    steps: int
    output_tokens: int


class MeshWatch:
    """Samples the status every half second from `start` to `stop`.

    Args:
        admin: Address of the admin service.
        up_pid: The process of `stagemesh up`.
    """

    def __init__(self, admin: str, up_pid: int) -> None:
        self.busy: list[tuple[float, list[float]]] = []
        """(monotonic seconds, share of each stage over its last ten seconds)."""
        self.pipelines: list[dict[str, object]] = []
        """What the router had learnt of its pipeline at each of these moments."""
        self._channel = grpc.insecure_channel(admin)
        self._stub = admin_pb2_grpc.AdminServiceStub(self._channel)
        self._stopped = threading.Event()
        self._thread: threading.Thread | None = None
        self._router = next(pid for pid in descendants(up_pid) if ".cli router" in command_of(pid))

    def status(self) -> admin_pb2.MeshStatus:
        """The mesh's status now."""
        answer: admin_pb2.GetStatusResponse = self._stub.GetStatus(admin_pb2.GetStatusRequest(), timeout=10)
        return answer.status

    def mark(self) -> Mark:
        """The counters now."""
        status = self.status()
        return Mark(
            at_s=time.monotonic(),
            router_cpu_s=cpu_s(self._router),
            workers_cpu_s=sum(cpu_s(pid) for pid in descendants(self._router)),
            steps=sum(lane.num_steps for lane in status.lanes),
            output_tokens=status.output_tokens,
        )

    def start(self) -> None:
        """Begin to sample."""
        self.busy.clear()
        self.pipelines.clear()
        self._stopped.clear()
        self._thread = threading.Thread(target=self._sample, daemon=True)
        self._thread.start()

    def stop(self) -> None:
        """End sampling."""
        self._stopped.set()
        if self._thread is not None:
            self._thread.join()
            self._thread = None

    def close(self) -> None:
        """Let go of the connection."""
        self.stop()
        self._channel.close()

    def _sample(self) -> None:
        while not self._stopped.wait(INTERVAL_S):
            status = self.status()
            shares = [stage.busy_share for lane in status.lanes for stage in lane.stages]
            self.busy.append((time.monotonic(), shares))
            self.pipelines += [_pipeline(lane) for lane in status.lanes]


def _pipeline(lane: admin_pb2.LaneStatus) -> dict[str, object]:
    """How many steps are in flight and why, as the router sees it."""
    return {
        "microbatches": lane.max_in_flight,
        "allowed_in_flight": lane.allowed_in_flight,
        "cycle_ms": round(lane.cycle_ms, 3),
        "ring_hops_ms": round(lane.ring_hops_ms, 3),
        "trip_hops_ms": round(lane.trip_hops_ms, 3),
        "step_ms": [round(stage.step_ms, 3) for stage in lane.stages],
        "bubble_shares": [round(stage.bubble_share, 4) for stage in lane.stages],
    }


def steady_busy_share(
    busy: list[tuple[float, list[float]]], begin_s: float, end_s: float
) -> tuple[float, list[float]] | None:
    """(share of the slowest stage, of each stage) in the middle of a run; None if it was too short for it.

    A sample looks ten seconds back: those are taken whose ten seconds end before the last tenth of the run,
    when fewer and fewer requests are left, and begin after the first requests came.
    """
    last = begin_s + 0.9 * (end_s - begin_s)
    taken = [shares for at, shares in busy if begin_s + 10.0 <= at <= last and shares]
    if not taken:
        return None
    means = [sum(column) / len(taken) for column in zip(*taken, strict=True)]
    return max(means), means


def used_since(begin: Mark, end: Mark) -> dict[str, float]:
    """What a load cost the router between two marks."""
    steps, tokens = end.steps - begin.steps, end.output_tokens - begin.output_tokens
    router_s = end.router_cpu_s - begin.router_cpu_s
    facts = {
        "router_cpu_s": round(router_s, 3),
        "router_workers_cpu_s": round(end.workers_cpu_s - begin.workers_cpu_s, 3),
        "steps": float(steps),
        "router_output_tokens": float(tokens),
    }
    if tokens > 0:
        facts["router_cpu_us_per_token"] = round(router_s / tokens * 1e6, 3)
    if steps > 0:
        facts["router_cpu_ms_per_step"] = round(router_s / steps * 1e3, 4)
    return facts
