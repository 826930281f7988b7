"""What a streamed token costs the router and its API workers, and what many streams do to its memory.

    python benchmarks/streams.py --json

Stages are simulated (real leaders, links and workers; engines that sleep), the tokenizer is the demo model's, and
the client is a process of its own that takes every message. Processor time is user and system of all threads of
the processes named, as Linux counts it, over a window in which every stream runs. `benchmarks/pipeline.py` has these
rows among its own.
"""

from __future__ import annotations

import argparse
import os
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import grpc
from process_cpu import cpu_s, descendants
from process_memory import pss_mib
from report import Report
from sim_mesh import SimMesh, sim_mesh
from streams_load import Delivered, Load

from stagemesh.v1 import admin_pb2, admin_pb2_grpc

ROOT = Path(__file__).resolve().parent.parent
DEMO = "SmolLM2-135M-Instruct.Q4_1.gguf"
ROOMY = "256GiB"
"""KV memory that the simulated stages claim to have, where blocks should not matter."""
NUM_STREAMS = 256
COSTS = ("8ms", "8ms")
OUTPUT = 8_000
"""Tokens of a stream that is measured: more than it gets within the window."""
WARM_S, WINDOW_S = 3.0, 8.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Cost:
    """What a window measured."""

    tokens_per_s: float
    router_us: float
    """Processor time a token of the router's process."""
    workers_us: float
    """Of its API workers."""
    tokens_per_message: float

    @property
    def total_us(self) -> float:
        """Of both."""
        return self.router_us + self.workers_us

    def __str__(self) -> str:
        return (
            f"router {self.router_us:.1f} + workers {self.workers_us:.1f} us, {self.tokens_per_s:.0f} tokens/s, "
            f"{self.tokens_per_message:.1f} tokens a message"
        )


def demo_model() -> Path:
    """The demo model, where make puts it or STAGEMESH_DEMO_MODEL says."""
    given = [Path(path)] if (path := os.environ.get("STAGEMESH_DEMO_MODEL")) else []
    for found in (*given, *(ROOT / ".cache" / "models").rglob(DEMO)):
        if found.is_file():
            return found
    raise RuntimeError("no demo model: run make model, or set STAGEMESH_DEMO_MODEL to its path")


@contextmanager
def mesh(costs: Sequence[str], *router: str, kv_memory: str = ROOMY) -> Iterator[SimMesh]:
    """Simulated stages behind a router with the demo model's tokenizer."""
    stage = ("--kv-memory", kv_memory)
    with sim_mesh(costs, router=router, stage=stage, model=demo_model()) as running:
        yield running


def status(running: SimMesh) -> admin_pb2.MeshStatus:
    """What the router says of itself."""
    with grpc.insecure_channel(running.admin) as channel:
        stub = admin_pb2_grpc.AdminServiceStub(channel)
        answer: admin_pb2.GetStatusResponse = stub.GetStatus(admin_pb2.GetStatusRequest(), timeout=10.0)
        return answer.status


def cost_per_token(
    kind: str,
    *,
    api_workers: int,
    costs: Sequence[str] = COSTS,
    streams: int = NUM_STREAMS,
    window_s: float = WINDOW_S,
) -> Cost:
    """Processor time a token, while `streams` streams run.

    Args:
        kind: "session" or "generate".
        api_workers: Of the router.
        costs: A step's cost on each stage.
        streams: Requests at once.
        window_s: Seconds measured.

    Raises:
        RuntimeError: The client did not get what the router sent, or streams ended before the window did.
    """
    with mesh(costs, "--api-workers", str(api_workers)) as running:
        workers = descendants(running.router_pid)
        with Load(running.listen, kind, [(8, OUTPUT)] * streams) as load:
            _wait(lambda: status(running).num_running == streams, "the streams")
            time.sleep(WARM_S)
            begin = _look(running, workers, load)
            time.sleep(window_s)
            end = _look(running, workers, load)
            if (left := status(running).num_running) < streams:
                raise RuntimeError(f"{left} of {streams} streams still run at the end of the window")
    tokens = end.tokens - begin.tokens
    delivered = end.delivered.tokens - begin.delivered.tokens
    if not 0.9 < delivered / tokens < 1.1:
        raise RuntimeError(f"the client got {delivered} tokens of {tokens} in the window")
    return Cost(
        tokens_per_s=tokens / (end.at - begin.at),
        router_us=(end.router_s - begin.router_s) / tokens * 1e6,
        workers_us=(end.workers_s - begin.workers_s) / tokens * 1e6,
        tokens_per_message=delivered / max(1, end.delivered.messages - begin.delivered.messages),
    )


def failures_of_1000() -> tuple[int, str]:
    """How many of 1,000 streams that start at once do not finish, and what the first of them said."""
    with mesh(COSTS, "--api-workers", "1") as running:
        with Load(running.listen, "generate", [(8, 64)] * 1000) as load:
            done = load.finish()
        return 1000 - done.finished, done.first_error


def memory_growth(
    num_requests: int = 20_000, settled: int = 2_000, api_workers: int = 0
) -> tuple[float, str]:
    """Growth in per cent of the router's memory (and its workers') from `settled` requests to `num_requests`."""
    # With the default KV memory the prefix cache is full, and its index with it, after the first requests.
    with mesh(("1ms",), "--api-workers", str(api_workers), kv_memory="1GiB") as running:
        pids = [running.router_pid, *descendants(running.router_pid)]
        used = []
        for count in (settled, num_requests - settled):
            with Load(running.listen, "session", [(16, 8)] * count) as load:
                done = load.finish()
            if done.finished < count:
                raise RuntimeError(f"{count - done.finished} requests failed: {done.first_error}")
            time.sleep(2.0)  # traces are settled a second after a request's end
            used.append(sum(map(pss_mib, pids)))
    return 100 * (used[1] - used[0]) / used[0], f"{used[0]:.1f} MiB, then {used[1]:.1f} MiB"


def add_rows(report: Report, *, quick: bool = False) -> None:
    """The rows of issue 3's table that are about streams."""
    window_s = 3.0 if quick else WINDOW_S
    session = cost_per_token("session", api_workers=1, window_s=window_s)
    name = f"cpu per token, {NUM_STREAMS} streams"
    report.add(
        f"{name}, Session", session.total_us, "us", target=15, stretch=8, at_most=True, reference=str(session)
    )
    generate = cost_per_token("generate", api_workers=1, window_s=window_s)
    report.add(
        f"{name}, Generate",
        generate.total_us,
        "us",
        target=100,
        stretch=50,
        at_most=True,
        reference=str(generate),
    )
    for kind in ("session", "generate"):
        alone = cost_per_token(kind, api_workers=0, window_s=window_s)
        report.add(f"{name}, {kind}, no API workers", alone.total_us, "us", reference=str(alone))
    peak = cost_per_token("session", api_workers=1, costs=("1ms",), streams=512, window_s=window_s)
    report.add(
        "scheduler process alone, cpu per token at peak",
        peak.router_us,
        "us",
        target=5,
        stretch=2,
        at_most=True,
        reference=f"512 streams, one stage of 1 ms: {peak}",
    )
    failed, error = failures_of_1000()
    report.add("1,000 streams at once, failed", failed, "", target=0, at_most=True, reference=error)
    count = 4_000 if quick else 20_000
    for workers in (0, 1):
        growth, sizes = memory_growth(count, api_workers=workers)
        report.add(
            f"memory growth, 2,000 to {count:,} requests, {workers} API workers",
            growth,
            "%",
            target=2,
            at_most=True,
            reference=sizes,
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class _Look:
    at: float
    tokens: int
    router_s: float
    workers_s: float
    delivered: Delivered


def _look(running: SimMesh, workers: Sequence[int], load: Load) -> _Look:
    tokens = status(running).output_tokens
    return _Look(
        at=time.monotonic(),
        tokens=tokens,
        router_s=cpu_s(running.router_pid),
        workers_s=sum(map(cpu_s, workers)),
        delivered=load.so_far(),
    )


def _wait(ready: object, what: str, timeout_s: float = 60.0) -> None:
    assert callable(ready)
    deadline = time.monotonic() + timeout_s
    while not ready():
        if time.monotonic() > deadline:
            raise RuntimeError(f"waited {timeout_s:.0f} s for {what}")
        time.sleep(0.1)


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    parser.add_argument("--quick", action="store_true", help="shorter windows and fewer requests")
    options = parser.parse_args()
    report = Report("streams", options.json)
    add_rows(report, quick=options.quick)
    report.finish()


if __name__ == "__main__":
    main()
