"""What scheduling costs the router where stages are as fast as GPUs: the rows of group C of gpu.py, without GPUs.

    python benchmarks/router_cpu.py --json [--requests 1024] [--runs 3]

Four simulated stages whose steps take what four H200 should need for the 8B shape, the requests of the GPU
benchmarks and their client, one Session, one API worker. Processor time is user and system of all threads of the
router's main process from the moment the requests are sent to the last token. Stages, workers and client share the machine's
cores with it, so a step holds fewer rows than on GPUs where those are few.
"""

from __future__ import annotations

import argparse
import os
import statistics
import sys
import tempfile
from pathlib import Path
from typing import Any

from gpu_runs import MAX_CONTEXT, RunLog, RunOptions, run_client
from gpu_specs import RunSpec
from gpu_watch import MeshWatch
from report import Report
from sim_mesh import sim_mesh

NUM_STAGES = 4
COST = "1ms + 11.5us*rows + 5.9us*prefill"
"""Of a step on each: 6.9 ms with 512 rows that decode, 1,024 prompt tokens in 7 ms."""
KV_MEMORY = "64GiB"
"""Of a shape whose positions take little: blocks do not matter."""
NUM_REQUESTS = 1_024
RUNS = 3
ROUTER = [
    "--api-workers",
    "1",
    "--no-prefix-cache",
    "--max-context",
    str(MAX_CONTEXT),
    "--max-waiting",
    "8192",
]
"""As gpu.py starts it."""
TARGET_US, TARGET_MS = 5.0, 1.0


def cost_of_load(num_requests: int, runs: int) -> list[dict[str, Any]]:
    """What each of some loads cost on one mesh, one after the other: lines as gpu.py keeps them."""
    spec = RunSpec(name="router-cpu", group="C", system="ours", stages=NUM_STAGES, estimate_s=40)
    router = [*ROUTER, "--max-sequences", str(spec.max_sequences), "--step-tokens", str(spec.step_tokens)]
    stage = ["--kv-memory", KV_MEMORY, "--max-slots", str(spec.max_sequences)]
    client = [sys.executable, str(Path(__file__).with_name("gpu_client.py"))]
    with (
        tempfile.TemporaryDirectory() as folder,
        sim_mesh([COST] * NUM_STAGES, router=router, stage=stage) as mesh,
    ):
        log = RunLog(
            spec, RunOptions(out=Path(folder), vllm=None, bench_vllm=None, dry_run=False, quick=True)
        )
        # The router is a child of this process, and the only one.
        watch = MeshWatch(mesh.admin, os.getpid())
        try:
            run_client([*client, mesh.listen, "--requests", ",".join([str(num_requests)] * runs)], watch, log)
        finally:
            watch.close()
            log.close()
    return [line for line in log.lines if line["measure"] == "throughput"]


def add_rows(report: Report, num_requests: int, runs: int) -> None:
    """CPU of the scheduler's process by token and by step; the middle one of the runs."""
    loads = cost_of_load(num_requests, runs)
    rows = statistics.median(load["router_output_tokens"] / load["steps"] for load in loads)
    tokens_per_s = statistics.median(load["output_tok_s"] for load in loads)
    name = f"{NUM_STAGES} GPU-like stages, {num_requests:,} requests"
    about = f"{rows:.0f} tokens a step, {tokens_per_s:.0f} tokens/s"
    for key, what, unit, target in (
        ("router_cpu_us_per_token", "token", "us", TARGET_US),
        ("router_cpu_ms_per_step", "step", "ms", TARGET_MS),
    ):
        values = sorted(load[key] for load in loads)
        report.add(
            f"{name}: scheduler CPU per {what}",
            statistics.median(values),
            unit,
            target=target,
            at_most=True,
            reference=f"{about}; {', '.join(f'{value:.3g}' for value in values)}",
        )
    workers_us = statistics.median(
        load["router_workers_cpu_s"] / load["router_output_tokens"] * 1e6 for load in loads
    )
    report.add(f"{name}: API worker's CPU per token", workers_us, "us")


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    parser.add_argument("--requests", type=int, default=NUM_REQUESTS, help="sent at once")
    parser.add_argument("--runs", type=int, default=RUNS, help="loads, one after the other")
    options = parser.parse_args()
    report = Report("router_cpu", options.json)
    add_rows(report, options.requests, options.runs)
    report.finish()


if __name__ == "__main__":
    main()
