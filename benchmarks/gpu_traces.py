"""Traces of decode steps on GPU stages, made by a mesh that a client loads."""

from __future__ import annotations

import json
import os
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from gpu_facts import read_facts
from gpu_runs import RunLog, RunOptions, run_client, watched_mesh
from gpu_specs import RunSpec
from trace_steps import DROP, read_spans, steps_of

SKIP = 12
"""Decode steps before the first traced one."""
PROMPT_TOKENS = 128
WRITE_TIMEOUT_S = 45.0


@dataclass(frozen=True, slots=True)
class Traced:
    """What a run left."""

    traces: dict[int, Path]
    """By batch."""
    step_ms: dict[int, float]
    """As a client sees them, without a profiler, for each microbatch, by batch."""
    mean_context: dict[int, float]
    """Tokens that a row of a traced step attends to, by batch."""
    facts: dict[str, Any]
    """Commit, time and GPUs of the run."""


def mean_context(steps: int, sent: float, output_tokens: int) -> float:
    """Of the rows of the traced steps: all requests run, the first of them since the load began.

    Args:
        steps: Traced ones.
        sent: Steps that the load took; those above `output_tokens` went by until the last request ran.
        output_tokens: Of each request.
    """
    ramp = max(0.0, sent - output_tokens)
    return PROMPT_TOKENS + SKIP + DROP + (steps + ramp) / 2


def trace_decode(
    shape: str,
    batches: list[int],
    steps: int,
    out: Path,
    *,
    stages: int = 1,
    tp: int = 1,
    measure: bool = False,
    dry_run: bool = False,
) -> Traced:
    """Decode at every batch with the profiler on for `steps` steps; with `measure`, the step times without it after.

    A batch is the rows of a step: of several stages as many times more requests run, a microbatch for each. The
    trace is that of the last stage's first rank.

    A batch whose rows were never so many in step after step leaves no trace: several stages may have dealt them unevenly.

    Raises:
        RuntimeError: The mesh did not start, or a request failed.
    """
    folder = out / "traces"
    folder.mkdir(parents=True, exist_ok=True)
    for old in folder.glob("rank-*"):
        old.unlink()
    spec = RunSpec(
        name="trace",
        group="A",
        system="ours",
        stages=stages,
        tp=tp,
        preset="tiny" if dry_run else shape,
        estimate_s=60,
    )
    even = ("--max-in-flight", str(stages)) if stages > 1 else ()
    options = RunOptions(out=out, vllm=None, bench_vllm=None, dry_run=dry_run, quick=True, mesh_options=even)
    log = RunLog(spec, options)
    log.add({"measure": "facts", **read_facts().told()})
    os.environ["STAGEMESH_PROFILE"] = ";".join(
        [str(folder.resolve()), *(f"{batch}:{SKIP}:{steps}" for batch in batches)]
    )
    script = str(Path(__file__).parent / "gpu_client.py")
    traces: dict[int, Path] = {}
    try:
        with watched_mesh(spec, options, log) as (address, watch):
            ranks = [stage.description.ranks for stage in watch.status().lanes[0].stages]
            for batch in batches:
                client = [sys.executable, script, address, "--requests", str(batch * stages)]
                client += ["--fixed", f"{PROMPT_TOKENS},{steps + SKIP + 40}"]
                run_client(client, watch, log)
                # A trace being written would hold up the launches of the next one.
                written = [
                    _await(folder / f"rank-{rank.process_id}-rows-{batch}.json.gz")
                    for stage in ranks
                    for rank in stage
                ]
                if all(written):
                    traces[batch] = folder / f"rank-{ranks[-1][0].process_id}-rows-{batch}.json.gz"
            if measure:
                sizes = ",".join(str(batch * stages) for batch in batches)
                run_client([sys.executable, script, address, "--sizes", sizes, "--reps", "1"], watch, log)
    finally:
        del os.environ["STAGEMESH_PROFILE"]
        log.close()
    return _traced(traces, log.lines, stages)


def read_traced(folder: Path, batches: list[int], *, stages: int = 1) -> Traced:
    """What an earlier run left in its output folder; of several ranks' traces the one whose process came last."""
    lines = [json.loads(text) for text in (folder / "trace.jsonl").read_text().splitlines()]
    found = {batch: sorted((folder / "traces").glob(f"rank-*-rows-{batch}.json.gz")) for batch in batches}
    return _traced({batch: paths[-1] for batch, paths in found.items() if paths}, lines, stages)


def _traced(traces: dict[int, Path], lines: list[dict[str, Any]], stages: int) -> Traced:
    # A sequence waits for the microbatches of all stages, so its step is as many times longer than a stage's.
    step_ms = {
        line["batch"] // stages: line["itl_ms_steady"] / stages
        for line in lines
        if line["measure"] == "decode"
    }
    loads = {line["requests"] // stages: line for line in lines if line["measure"] == "throughput"}
    context = {
        batch: mean_context(
            len(steps_of(read_spans(path))),
            loads[batch]["steps"] / stages,
            loads[batch]["output_tokens"] // loads[batch]["requests"],
        )
        for batch, path in traces.items()
    }
    facts = next((line for line in lines if line["measure"] == "facts"), {})
    return Traced(traces, step_ms, context, {key: value for key, value in facts.items() if key != "measure"})


def _await(trace: Path) -> bool:
    """Whether it came."""
    deadline = time.monotonic() + WRITE_TIMEOUT_S
    while not trace.exists() and time.monotonic() < deadline:
        time.sleep(0.1)
    return trace.exists()
