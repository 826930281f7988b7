"""What tracing costs: CPU of router, stages and workers for each token, off against on.

    python benchmarks/tracing.py --json

Simulated stages (real leaders, workers, links and router; engines that sleep), one Session with many requests, and
an OTLP receiver that takes what comes. One mesh serves the same load turn after turn, and tracing is switched between
them (tracing_switch.py), since two processes differ by more than tracing costs. In a run every second turn is off;
those between sample 1% of the requests, or all. They last five seconds together, the time between two exports
by default: the export comes at the end of the run, and each of them bears its part.

A pair is a turn that samples and the mean of the turns off before and after it, so that what changes slowly drops
out. What changes quickly is how fast the machine is in a turn, and that the workers tell: they do the same with and
without tracing, but for parsing 57 bytes more of a traced step. So the cost of router and leaders is taken at the
workers' speed of the turns off; without that, which is printed beside it, a pair scatters three times as much. Rows
of their own show whether the workers do spend the same.

An overhead is the median over the pairs, on over off, with a 95% interval of that median by bootstrap; its upper
bound counts. The control is the same with turns off in both places, further apart, and says what can be told apart:
its interval should hold 0.
"""

from __future__ import annotations

import argparse
import os
import random
import socket
import tempfile
import time
from collections.abc import Iterable, Iterator
from concurrent import futures
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path

import grpc
import numpy as np
import numpy.typing as npt
from process_cpu import descendants
from report import Report
from sim_mesh import sim_mesh

from stagemesh.client import Client

STAGES = 3
COST = "3ms + 0.015ms*tokens"
"""A cost that depends on what is in a step: of one that does not, the router learns noise, and deals prompts by it."""
STREAMS = 192
REQUESTS = 768
"""Of a turn: each stream has four. In shorter turns chance weighs more: how steps fall out, when reports come."""
PROMPT_TOKENS = 16
OUTPUT_TOKENS = 32
RUNS = {"1%": 24, "all": 6}
"""Least is at stake at 1%, so it has most."""
ON_TURNS = 2
"""Of a run. A run has an odd number of turns, lest turns that sample are always the even ones."""
WARM_UP_TURNS = 3
"""Not counted."""
EXPORT_DELAY_MS = 3_600_000
"""Nothing is exported but at the end of a run."""
BOOTSTRAPS = 10_000
RATIOS = {"1%": 0.01, "all": 1.0}
TARGETS = {"1%": 1.0, "all": 10.0}
SERVING, WORKERS = 0, 1
"""Columns of what is spent: router and leaders, where tracing is, and the workers."""
Floats = npt.NDArray[np.float64]
EXPORT = "/opentelemetry.proto.collector.trace.v1.TraceService/Export"


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    parser.add_argument("--share", type=float, default=1.0, help="of the runs, for a quick look")
    parser.add_argument(
        "--turns",
        type=Path,
        help="write what router and leaders, then workers, spent in every turn to this file",
    )
    options = parser.parse_args()
    report = Report("tracing", options.json)
    with receiver() as (endpoint, received):
        runs = measure(endpoint, options.share)
    if options.turns:
        lines = (
            f"{run.mode} {' '.join(f'{cost * 1e6:.3f}' for cost in run.costs.ravel())}\n" for run in runs
        )
        options.turns.write_text("".join(lines))
    for mode, target in TARGETS.items():
        pairs = join(run.pairs(first=1, apart=1) for run in runs if run.mode == mode)
        add_row(report, f"CPU of a token, {mode} of the requests traced, over tracing off", target, pairs)
        workers = pairs.on[:, WORKERS] / pairs.off[:, WORKERS] - 1
        low, high = interval(workers)
        report.add(
            f"yardstick: CPU of the workers alone, {mode} of the requests traced, over tracing off",
            float(np.median(workers)) * 100,
            "%",
            reference=f"median of {len(workers)} pairs, 95% interval {low:+.2%} to {high:+.2%}",
        )
    controls = join(run.pairs(first=2, apart=2) for run in runs)
    add_row(report, "control: tracing off, over tracing off", None, controls)
    size = received["bytes"] / 1e6
    report.add("spans that the receiver got", size, "MB", reference=f"{received['calls']} exports")
    report.finish()


@dataclass(frozen=True, slots=True)
class Pairs:
    """[n, 2] seconds of CPU for a token, of SERVING and WORKERS."""

    on: Floats
    off: Floats

    def overheads(self) -> Floats:
        """[n] of all processes, at the speed of the turns off."""
        speed = self.on[:, WORKERS] / self.off[:, WORKERS]
        costs: Floats = (self.on[:, SERVING] / speed + self.off[:, WORKERS]) / self.off.sum(axis=1)
        return costs - 1

    def plain_overheads(self) -> Floats:
        """[n] of all processes, however fast the machine was."""
        costs: Floats = self.on.sum(axis=1) / self.off.sum(axis=1)
        return costs - 1


def join(some: Iterable[Pairs]) -> Pairs:
    """All of them."""
    some = list(some)
    return Pairs(np.concatenate([one.on for one in some]), np.concatenate([one.off for one in some]))


def add_row(report: Report, name: str, target: float | None, pairs: Pairs) -> None:
    """One overhead."""
    overheads, plain = pairs.overheads(), pairs.plain_overheads()
    (low, high), (plain_low, plain_high) = interval(overheads), interval(plain)
    off = np.median(pairs.off.sum(axis=1)) * 1e6
    report.add(
        name,
        high * 100,
        "%",
        target=target,
        at_most=True,
        reference=f"upper bound of the 95% interval {low:+.2%} to {high:+.2%} of the median {np.median(overheads):+.2%} "
        f"of {len(overheads)} pairs; {off:.2f} µs without; not by the workers' speed: {np.median(plain):+.2%}, "
        f"{plain_low:+.2%} to {plain_high:+.2%}",
    )


@dataclass(frozen=True, slots=True)
class Run:
    """Turns of one mesh, of which every second one samples."""

    mode: str
    costs: Floats
    """[2 * ON_TURNS + 1, 2] seconds of CPU for a token, the first and the last with tracing off; of SERVING and
    WORKERS."""

    def pairs(self, *, first: int, apart: int) -> Pairs:
        """Every second turn from `first` on, and the mean of those that are `apart` before and after it."""
        places = np.arange(first, len(self.costs) - apart, 2)
        return Pairs(self.costs[places], (self.costs[places - apart] + self.costs[places + apart]) / 2)


def measure(endpoint: str, share: float) -> list[Run]:
    """Every run, in an order drawn by lot."""
    modes = [mode for mode, count in RUNS.items() for _ in range(max(1, round(count * share)))]
    random.Random(1).shuffle(modes)
    with running_mesh(endpoint) as mesh:
        for seed in range(WARM_UP_TURNS):
            mesh.turn(0.0, seed)
        return [measure_run(mesh, mode, (number + 1) * 100) for number, mode in enumerate(modes)]


def measure_run(mesh: Mesh, mode: str, seed: int) -> Run:
    """One run."""
    turns = [mesh.turn(RATIOS[mode] if place % 2 else 0.0, seed + place) for place in range(2 * ON_TURNS + 1)]
    spent = np.array([cpu for cpu, _ in turns])
    tokens = np.array([count for _, count in turns])
    before = mesh.cpu_seconds()
    mesh.say("export")
    spent[1::2] += (mesh.cpu_seconds() - before) / ON_TURNS
    return Run(mode, spent / tokens[:, None])


class Mesh:
    """A mesh whose tracing is switched.

    Args:
        client: Of its router.
        serving: Process ids of router and leaders.
        workers: Of the workers.
        switches: Of router and leaders.
    """

    def __init__(
        self, client: Client, serving: list[int], workers: list[int], switches: list[Switch]
    ) -> None:
        self._client = client
        self._pids = (serving, workers)
        self._switches = switches

    def turn(self, ratio: float, seed: int) -> tuple[Floats, int]:
        """([2] seconds of CPU, output tokens) of one load; a ratio of 0 is tracing off.

        What an idle mesh spends while the stages' last reports are awaited is not in it: it is as much as the
        noise of all the rest, and a matter of when in its interval a report was due.
        """
        self.say(f"ratio {ratio}")
        begin = self.cpu_seconds()
        tokens = load(self._client, seed)
        loaded = self.cpu_seconds()
        self.say("reported")
        reported = self.cpu_seconds()
        self.say("settle")
        return loaded - begin + self.cpu_seconds() - reported, tokens

    def say(self, command: str) -> None:
        """To every process that traces."""
        for switch in self._switches:
            switch.say(command)

    def cpu_seconds(self) -> Floats:
        """[2] user and system time so far of all threads, of SERVING and WORKERS."""
        return np.array([sum(map(cpu_seconds, pids)) for pids in self._pids])


@contextmanager
def running_mesh(endpoint: str) -> Iterator[Mesh]:
    """It exports to that receiver when it is told to."""
    with ExitStack() as stack:
        folder = stack.enter_context(tempfile.TemporaryDirectory())
        with environment(endpoint):
            command = (str(Path(__file__).with_name("tracing_switch.py")), folder)
            flags = ("--max-sequences", str(STREAMS // STAGES), "--max-in-flight", str(STAGES))
            mesh = stack.enter_context(sim_mesh([COST] * STAGES, router=flags, command=command))
        client = stack.enter_context(Client(mesh.listen))
        tracing = (mesh.router_pid, *mesh.stage_pids)
        switches = [stack.enter_context(Switch(Path(folder) / str(pid))) for pid in tracing]
        workers = [pid for root in mesh.stage_pids for pid in descendants(root)]
        yield Mesh(client, list(tracing), workers, switches)


class Switch:
    """Tracing of one process, by the socket of its tracing_switch.py."""

    def __init__(self, path: Path) -> None:
        self._socket = socket.socket(socket.AF_UNIX)
        self._socket.connect(str(path))
        self._lines = self._socket.makefile("rw")

    def __enter__(self) -> Switch:
        return self

    def __exit__(self, *raised: object) -> None:
        self._lines.close()
        self._socket.close()

    def say(self, command: str) -> None:
        """Returns when it is done."""
        self._lines.write(command + "\n")
        self._lines.flush()
        if self._lines.readline() != "done\n":
            raise RuntimeError(f"'{command}' failed in a process of the mesh")


def load(client: Client, seed: int) -> int:
    """Output tokens of one load."""
    draw = random.Random(seed)
    prompts = [[draw.randrange(3, 32_000) for _ in range(PROMPT_TOKENS)] for _ in range(REQUESTS)]
    tokens = 0
    with client.generate_many(prompts, max_tokens=OUTPUT_TOKENS, temperature=0.0, ignore_eos=True) as stream:
        for _, chunk in stream:
            if chunk.error:
                raise chunk.error
            tokens += len(chunk.token_ids)
    return tokens


@contextmanager
def environment(endpoint: str) -> Iterator[None]:
    """The OTEL_* variables of tracing, for the processes that start within."""
    names = {
        "OTEL_EXPORTER_OTLP_ENDPOINT": endpoint,
        "OTEL_TRACES_SAMPLER": "parentbased_traceidratio",
        "OTEL_BSP_SCHEDULE_DELAY": str(EXPORT_DELAY_MS),
    }
    os.environ.update(names)
    try:
        yield
    finally:
        for name in names:
            os.environ.pop(name, None)


def cpu_seconds(pid: int) -> float:
    """User and system time of a process, all threads, to the nanosecond: /proc/PID/stat has hundredths."""
    return time.clock_gettime(~pid << 3 | 2)


def interval(values: Floats) -> tuple[float, float]:
    """95% of the median, by bootstrap."""
    draws = np.random.default_rng(1).choice(values, (BOOTSTRAPS, len(values)))
    low, high = np.percentile(np.median(draws, axis=1), (2.5, 97.5))
    return float(low), float(high)


@contextmanager
def receiver() -> Iterator[tuple[str, dict[str, int]]]:
    """(endpoint, what came): an OTLP receiver that counts bytes and keeps nothing."""
    received = {"calls": 0, "bytes": 0}

    def export(request: bytes, context: grpc.ServicerContext) -> bytes:
        received["calls"] += 1
        received["bytes"] += len(request)
        return b""

    service, method = EXPORT[1:].split("/")
    handler = grpc.unary_unary_rpc_method_handler(export)
    server = grpc.server(futures.ThreadPoolExecutor(4), options=[("grpc.max_receive_message_length", -1)])
    server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler(service, {method: handler}),))
    port = server.add_insecure_port("127.0.0.1:0")
    server.start()
    try:
        yield f"http://127.0.0.1:{port}", received
    finally:
        server.stop(0).wait()


if __name__ == "__main__":
    main()
