"""What tracing costs: CPU of router, stages and workers for each token, off against on.

    python benchmarks/tracing.py --json

Simulated stages (real leaders, workers, links and router; engines that sleep), one Session with many requests, and
an OTLP receiver that takes what comes. In a block two meshes are up, one without tracing and one that samples 1% of
the requests, or all; a pair is the same load on both, one after the other. There are two blocks for 1%, since
less is at stake; each has fresh meshes, lest one's luck with memory decides. An overhead is the
median over the pairs of on over off, with a 95% interval of that median by bootstrap; its upper bound counts.
"""

from __future__ import annotations

import argparse
import os
import random
import time
from collections.abc import Iterator
from concurrent import futures
from contextlib import ExitStack, contextmanager

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
BLOCKS = {"1%": 2, "all": 1}
"""Times that fresh meshes are started."""
PAIRS = 12
"""Of each block."""
LOADS = 4
"""Of a turn: together they take about as long as it is between two exports (OTEL_BSP_SCHEDULE_DELAY, 5 s)."""
BOOTSTRAPS = 10_000
Floats = npt.NDArray[np.float64]
EXPORT = "/opentelemetry.proto.collector.trace.v1.TraceService/Export"
RATIOS = {"off": "", "1%": "0.01", "all": "1.0"}
TARGETS = {"1%": 1.0, "all": 10.0}


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    parser.add_argument("--pairs", type=int, default=PAIRS, help="of each block")
    options = parser.parse_args()
    report = Report("tracing", options.json)
    with receiver() as (endpoint, received):
        for mode, target in TARGETS.items():
            blocks = [measure_block(mode, endpoint, options.pairs) for _ in range(BLOCKS[mode])]
            add_row(report, mode, target, blocks)
    report.add(
        "spans that the receiver got", received["bytes"] / 1e6, "MB", reference=f"{received['calls']} exports"
    )
    report.finish()


def add_row(report: Report, mode: str, target: float, blocks: list[Floats]) -> None:
    """One overhead; blocks are [pairs, 2] seconds of a token, off and on."""
    costs = np.concatenate(blocks)
    ratios = costs[:, 1] / costs[:, 0] - 1
    low, high = interval(ratios)
    each = " ".join(f"{np.median(block[:, 1] / block[:, 0]) - 1:+.2%}" for block in blocks)
    off, on = np.median(costs, axis=0) * 1e6
    report.add(
        f"CPU of a token, {mode} of the requests traced, over tracing off",
        high * 100,
        "%",
        target=target,
        at_most=True,
        reference=f"upper bound of the 95% interval {low:+.2%} to {high:+.2%} of the median "
        f"{np.median(ratios):+.2%} of {len(ratios)} pairs (by block {each}); {on:.2f} µs against {off:.2f} µs",
    )


def measure_block(mode: str, endpoint: str, pairs: int) -> Floats:
    """[pairs, 2] seconds of CPU for a token, off and on, of two fresh meshes; a pair before them is not counted.

    A mesh's turn lasts from the start of its load to the start of its next one, so that the export of its spans,
    and whatever else it does while the other works, is in the price.
    """
    with ExitStack() as stack:
        meshes = []
        for ratio in (RATIOS["off"], RATIOS[mode]):
            with environment(ratio, endpoint):
                slots = ("--max-sequences", str(STREAMS // STAGES))
                mesh = stack.enter_context(sim_mesh([COST] * STAGES, router=slots))
            meshes.append((stack.enter_context(Client(mesh.listen)), processes(mesh)))
        spent = np.zeros((pairs + 2, 2))
        tokens = np.zeros((pairs + 2, 2))
        for pair in range(pairs + 2):
            for place, (client, pids) in enumerate(meshes):
                spent[pair, place] = sum(map(cpu_seconds, pids))
                tokens[pair, place] = sum(load(client, seed=LOADS * pair + turn) for turn in range(LOADS))
        return np.diff(spent, axis=0)[1:] / tokens[1:-1]


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
def environment(ratio: str, endpoint: str) -> Iterator[None]:
    """The OTEL_* variables of a sampling ratio, for the processes that start within; none where it is empty."""
    names = {
        "OTEL_EXPORTER_OTLP_ENDPOINT": endpoint,
        "OTEL_TRACES_SAMPLER": "parentbased_traceidratio",
        "OTEL_TRACES_SAMPLER_ARG": ratio,
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
