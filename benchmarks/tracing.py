"""What tracing costs: CPU of router, stages and workers for each token, off against on.

    python benchmarks/tracing.py --json

Simulated stages (real leaders, workers, links and router; engines that sleep), one Session with many requests, and
an OTLP receiver that takes what comes. Three meshes are up at once: one without tracing, one that samples 1% of
the requests, one that samples all. A round puts the same load on each in turn, in an order that turns too; after
some rounds the meshes are replaced by fresh ones, lest one's luck with memory decides. An overhead is the median
over the rounds of on over off, with a 95% interval of that median by bootstrap; its upper bound counts.
"""

from __future__ import annotations

import argparse
import os
import random
import statistics
import time
from collections.abc import Iterator
from concurrent import futures
from contextlib import ExitStack, contextmanager

import grpc
import numpy as np
from process_cpu import descendants
from report import Report
from sim_mesh import SimMesh, sim_mesh

from stagemesh.client import Client

STAGES = 3
COST = "6ms"
STREAMS = 192
REQUESTS = 288
PROMPT_TOKENS = 16
OUTPUT_TOKENS = 24
BLOCKS = 3
"""Times that fresh meshes are started."""
ROUNDS = 14
"""Of each block."""
EXPORT_S = 1.0
"""OTEL_BSP_SCHEDULE_DELAY: a fifth of its default, so that a round's spans are exported within the next."""
BOOTSTRAPS = 10_000
EXPORT = "/opentelemetry.proto.collector.trace.v1.TraceService/Export"
MODES = {"off": None, "1%": "0.01", "all": "1.0"}
TARGETS = {"1%": 1.0, "all": 10.0}


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    parser.add_argument("--blocks", type=int, default=BLOCKS)
    parser.add_argument("--rounds", type=int, default=ROUNDS, help="of each block")
    options = parser.parse_args()
    report = Report("tracing", options.json)
    costs: dict[str, list[float]] = {mode: [] for mode in MODES}
    with receiver() as (endpoint, received):
        for block in range(options.blocks):
            measure_block(endpoint, options.rounds, costs)
            report.note(
                f"block {block}: "
                + ", ".join(
                    f"{m} {1e6 * statistics.median(c[-options.rounds :]):.2f} µs" for m, c in costs.items()
                )
            )
    for mode, target in TARGETS.items():
        ratios = np.array(costs[mode]) / np.array(costs["off"]) - 1
        low, high = interval(ratios)
        blocks = " ".join(f"{np.median(part):+.2%}" for part in np.split(ratios, options.blocks))
        report.add(
            f"CPU of a token, {mode} of the requests traced, over tracing off",
            float(high) * 100,
            "%",
            target=target,
            at_most=True,
            reference=f"upper bound of the 95% interval {low:+.2%} to {high:+.2%} of the median "
            f"{np.median(ratios):+.2%} of {len(ratios)} pairs (by block {blocks}); "
            f"{statistics.median(costs[mode]) * 1e6:.2f} µs against {statistics.median(costs['off']) * 1e6:.2f} µs",
        )
    report.add(
        "spans that the receiver got", received["bytes"] / 1e6, "MB", reference=f"{received['calls']} exports"
    )
    report.finish()


def measure_block(endpoint: str, rounds: int, costs: dict[str, list[float]]) -> None:
    """Fresh meshes, one unmeasured round, then `rounds` that count.

    A mesh's round lasts from the start of its load to the start of its next one, so that the export of its spans,
    and whatever else it does while it is idle, is in the price.
    """
    with ExitStack() as stack:
        meshes = {}
        for mode in MODES:
            with environment(mode, endpoint):
                slots = ("--max-sequences", str(STREAMS // STAGES))
                mesh = stack.enter_context(sim_mesh([COST] * STAGES, router=slots))
            meshes[mode] = (stack.enter_context(Client(mesh.listen)), processes(mesh))
        begun: dict[str, tuple[float, int]] = {}
        for number in range(rounds + 2):
            for mode, (client, pids) in meshes.items():
                now = sum(map(cpu_seconds, pids))
                if number > 1:
                    before, tokens = begun[mode]
                    costs[mode].append((now - before) / tokens)
                begun[mode] = (now, load(client, seed=number))


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
def environment(mode: str, endpoint: str) -> Iterator[None]:
    """The OTEL_* variables of a mode, for the processes that start within."""
    ratio = MODES[mode]
    names = {
        "OTEL_EXPORTER_OTLP_ENDPOINT": endpoint,
        "OTEL_TRACES_SAMPLER": "parentbased_traceidratio",
        "OTEL_TRACES_SAMPLER_ARG": ratio or "",
        "OTEL_BSP_SCHEDULE_DELAY": str(int(EXPORT_S * 1000)),
    }
    if ratio:
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


def interval(values: np.ndarray) -> tuple[float, float]:
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
