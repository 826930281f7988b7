"""What tracing costs: CPU of router, stages and workers for each token, off against on.

    python benchmarks/tracing.py --json

Simulated stages (real leaders, workers, links and router; engines that sleep), one Session with many requests, and
an OTLP receiver that takes what comes. One mesh serves turn after turn of the same load, and tracing is switched
between them (tracing_switch.py): every second turn is off, those between are 1% of the requests, all, and off once
more, the control. A turn ends when what it owes is paid: its requests' spans made and exported, beside what is
exported every five seconds anyway. A pair is a turn against the mean of the turns off before and after it, so that
what changes slowly drops out. An overhead is the median over its pairs, with a 95% interval of that median by
bootstrap; its upper bound counts. The control says what this can tell apart: its interval should hold 0.
"""

from __future__ import annotations

import argparse
import os
import random
import socket
import tempfile
import time
from collections.abc import Iterator
from concurrent import futures
from contextlib import ExitStack, contextmanager
from pathlib import Path

import grpc
import numpy as np
import numpy.typing as npt
from process_cpu import descendants
from report import Report
from sim_mesh import SimMesh, sim_mesh

from stagemesh.client import Client

STAGES = 3
COST = "4ms"
STREAMS = 192
PROMPT_TOKENS = 16
OUTPUT_TOKENS = 32
ROUNDS = 36
"""Each has a turn of every mode, in an order of its own."""
WARM_UP_ROUNDS = 1
"""Not counted."""
LOADS = 2
"""Of a turn."""
BOOTSTRAPS = 10_000
RATIOS = {"1%": 0.01, "all": 1.0, "control": 0.0}
TARGETS = {"1%": 1.0, "all": 10.0}
NAMES = {
    "1%": "CPU of a token, 1% of the requests traced, over tracing off",
    "all": "CPU of a token, all of the requests traced, over tracing off",
    "control": "CPU of a token, tracing off, over tracing off",
}
Floats = npt.NDArray[np.float64]
EXPORT = "/opentelemetry.proto.collector.trace.v1.TraceService/Export"


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    parser.add_argument("--rounds", type=int, default=ROUNDS, help="pairs of each mode")
    parser.add_argument("--loads", type=int, default=LOADS, help="loads of a turn")
    parser.add_argument("--turns", type=Path, help="write the cost of every turn to this file")
    options = parser.parse_args()
    report = Report("tracing", options.json)
    with receiver() as (endpoint, received):
        turns = measure(endpoint, options.rounds, options.loads)
    if options.turns:
        options.turns.write_text("".join(f"{mode} {cost * 1e6:.3f}\n" for mode, cost in turns))
    for mode in RATIOS:
        add_row(report, mode, turns)
    size = received["bytes"] / 1e6
    report.add("spans that the receiver got", size, "MB", reference=f"{received['calls']} exports")
    report.finish()


def add_row(report: Report, mode: str, turns: list[tuple[str, float]]) -> None:
    """One overhead, from (mode, seconds of a token) of every turn."""
    pairs = np.array(
        [
            (cost, (turns[place - 1][1] + turns[place + 1][1]) / 2)
            for place, (what, cost) in enumerate(turns)
            if what == mode
        ]
    )
    ratios = pairs[:, 0] / pairs[:, 1] - 1
    low, high = interval(ratios)
    on, off = np.median(pairs, axis=0) * 1e6
    report.add(
        NAMES[mode],
        high * 100,
        "%",
        target=TARGETS.get(mode),
        at_most=True,
        reference=f"upper bound of the 95% interval {low:+.2%} to {high:+.2%} of the median "
        f"{np.median(ratios):+.2%} of {len(ratios)} pairs; {on:.2f} µs against {off:.2f} µs",
    )


def measure(endpoint: str, rounds: int, loads: int) -> list[tuple[str, float]]:
    """(mode, seconds of CPU for a token) of every turn that counts, in order; the first and the last are off."""
    draw = random.Random(1)
    modes = ["off"]
    for _ in range(WARM_UP_ROUNDS + rounds):
        for mode in draw.sample(list(RATIOS), len(RATIOS)):
            modes += (mode, "off")
    with ExitStack() as stack:
        folder = stack.enter_context(tempfile.TemporaryDirectory())
        with environment(endpoint):
            command = (str(Path(__file__).with_name("tracing_switch.py")), folder)
            slots = ("--max-sequences", str(STREAMS // STAGES))
            mesh = stack.enter_context(sim_mesh([COST] * STAGES, router=slots, command=command))
        client = stack.enter_context(Client(mesh.listen))
        switches = [
            stack.enter_context(Switch(Path(folder) / str(pid)))
            for pid in (mesh.router_pid, *mesh.stage_pids)
        ]
        pids = processes(mesh)
        turns = []
        for number, mode in enumerate(modes):
            for switch in switches:
                switch.say(f"ratio {RATIOS.get(mode, 0.0)}")
            before = sum(map(cpu_seconds, pids))
            tokens = sum(load(client, seed=loads * number + part) for part in range(loads))
            for switch in switches:
                switch.say("settle")
            turns.append((mode, (sum(map(cpu_seconds, pids)) - before) / tokens))
    return turns[2 * len(RATIOS) * WARM_UP_ROUNDS :]


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
    prompts = [[draw.randrange(3, 32_000) for _ in range(PROMPT_TOKENS)] for _ in range(STREAMS)]
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
    names = {"OTEL_EXPORTER_OTLP_ENDPOINT": endpoint, "OTEL_TRACES_SAMPLER": "parentbased_traceidratio"}
    os.environ.update(names)
    try:
        yield
    finally:
        for name in names:
            os.environ.pop(name, None)


def processes(mesh: SimMesh) -> list[int]:
    """Router, leaders and workers."""
    roots = (mesh.router_pid, *mesh.stage_pids)
    return [*roots, *(pid for root in roots for pid in descendants(root))]


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
