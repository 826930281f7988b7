"""Traces of decode steps on one GPU stage, made by a mesh that a client loads."""

from __future__ import annotations

import os
import sys
import time
from dataclasses import dataclass
from pathlib import Path

from gpu_runs import RunLog, RunOptions, run_client, watched_mesh
from gpu_specs import RunSpec

SKIP = 12
"""Decode steps before the first traced one."""
PROMPT_TOKENS = 128
WRITE_TIMEOUT_S = 90.0


@dataclass(frozen=True, slots=True)
class Traced:
    """What a run left."""

    traces: dict[int, Path]
    """By batch."""
    step_ms: dict[int, float]
    """As a client sees them, without a profiler, by batch."""
    kv_tokens: int


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
    """Decode at every batch with the profiler on for `steps` steps; with `measure`, the step times without it first.

    Raises:
        RuntimeError: The mesh did not start, or left no trace.
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
    options = RunOptions(out=out, vllm=None, bench_vllm=None, dry_run=dry_run, quick=True)
    log = RunLog(spec, options)
    os.environ["STAGEMESH_PROFILE"] = ";".join(
        [str(folder.resolve()), *(f"{batch}:{SKIP}:{steps}" for batch in batches)]
    )
    script = str(Path(__file__).parent / "gpu_client.py")
    try:
        with watched_mesh(spec, options, log) as (address, watch):
            for batch in batches:
                client = [sys.executable, script, address, "--requests", str(batch)]
                client += ["--fixed", f"{PROMPT_TOKENS},{steps + SKIP + 40}"]
                run_client(client, watch, log)
            _await(folder, batches)
            if measure:
                sizes = ",".join(map(str, batches))
                run_client([sys.executable, script, address, "--sizes", sizes, "--reps", "1"], watch, log)
    finally:
        del os.environ["STAGEMESH_PROFILE"]
        log.close()
    step_ms = {line["batch"]: line["itl_ms_steady"] for line in log.lines if line["measure"] == "decode"}
    kv_tokens = next(line["kv_tokens"] for line in log.lines if line["measure"] == "engine")
    return Traced({batch: _trace_of(folder, batch) for batch in batches}, step_ms, kv_tokens)


def _await(folder: Path, batches: list[int]) -> None:
    deadline = time.monotonic() + WRITE_TIMEOUT_S
    while any(not list(folder.glob(f"*rows-{batch}.json.gz")) for batch in batches):
        if time.monotonic() > deadline:
            missing = [batch for batch in batches if not list(folder.glob(f"*rows-{batch}.json.gz"))]
            raise RuntimeError(f"no trace of batch {missing} within {WRITE_TIMEOUT_S:g} s")
        time.sleep(0.1)


def _trace_of(folder: Path, batch: int) -> Path:
    return min(folder.glob(f"*rows-{batch}.json.gz"))
