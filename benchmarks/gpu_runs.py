"""Carries out a run: starts ours, vLLM or transformers, measures, and keeps every line it said."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, TextIO

from bench_mesh import running_mesh
from google.protobuf.json_format import MessageToDict
from gpu_specs import RunSpec
from gpu_watch import Mark, MeshWatch, steady_busy_share, used_since

from stagemesh.v1 import admin_pb2

HERE = Path(__file__).resolve().parent
MAX_CONTEXT = 2048
"""Of a sequence; the yardstick's --max-model-len."""
START_TIMEOUT_S = 330.0
"""Of ours: the first start on a machine compiles kernels."""
CAPTURES_2048 = "1,2,4,8,16,32,64,96,128,160,192,224,256,320,384,448,512,640,768,1024,1536,2048"
MULTICAST_OFF = {
    "NCCL_NVLS_ENABLE": "0",
    "TORCH_SYMM_MEM_DISABLE_MULTICAST": "1",
    "NVSHMEM_DISABLE_NVLS": "1",
}
"""A program that uses NVLink multicast can put GPUs that others share out of service."""


@dataclass(frozen=True, slots=True, kw_only=True)
class RunOptions:
    """What all runs of a call share."""

    out: Path
    """Folder of the raw files."""
    vllm: Path | None
    """Folder of the unpacked yardstick, with bench_vllm.py beside it as `bench`."""
    bench_vllm: Path | None
    dry_run: bool
    """The tiny shape on CPU stages, and short loads: proves the scripts, measures nothing."""
    quick: bool
    """One repetition."""
    mesh_options: tuple[str, ...] = ()
    """Further options of `stagemesh up`."""


class RunLog:
    """The lines of one run: NAME.jsonl under the folder of raw files, written as they come."""

    def __init__(self, spec: RunSpec, options: RunOptions) -> None:
        self.name = f"{spec.name}.jsonl"
        self.lines: list[dict[str, Any]] = []
        self._began = time.monotonic()
        self._file: TextIO = (options.out / self.name).open("w")
        self.add(
            {"measure": "spec", "name": spec.name, "system": spec.system, "layout": [spec.stages, spec.tp]}
        )

    def add(self, line: dict[str, Any]) -> None:
        """Keep a line."""
        self.lines.append(line)
        print(json.dumps(line), file=self._file, flush=True)
        print(f"  {time.monotonic() - self._began:6.1f} s {_short(line)}", file=sys.stderr, flush=True)

    def has(self, measure: str) -> bool:
        """Whether there is a line of that measure."""
        return any(line["measure"] == measure for line in self.lines)

    def close(self) -> None:
        """End the file."""
        self._file.close()


def carry_out(spec: RunSpec, options: RunOptions) -> RunLog:
    """Run one spec; an error becomes a line of measure `error` and not an exception."""
    if options.dry_run:
        spec = _tiny(spec)
    elif options.quick:
        spec = replace(spec, reps=1)
    log = RunLog(spec, options)
    began = time.monotonic()
    try:
        if spec.system == "ours":
            _run_ours(spec, options, log)
        elif spec.system == "vllm":
            _run_vllm(spec, options, log)
        else:
            _run_transformers(spec, options, log)
    except (RuntimeError, OSError, subprocess.SubprocessError, StopIteration) as error:
        log.add({"measure": "error", "what": f"{type(error).__name__}: {error}"[-3000:]})
    log.add({"measure": "wall", "s": round(time.monotonic() - began, 1)})
    log.close()
    return log


def _tiny(spec: RunSpec) -> RunSpec:
    return replace(
        spec,
        preset="tiny",
        sizes=tuple(min(size, 4) for size in spec.sizes[:2]),
        requests=tuple(6 + index for index, _ in enumerate(spec.requests)),
        tp=min(spec.tp, 2),
        step_tokens=256,
        reps=1,
    )


def mesh_options(spec: RunSpec, options: RunOptions) -> list[str]:
    """The options of `stagemesh up` for a run."""
    common = ["--stages", str(spec.stages), "--tp", str(spec.tp), "--load-format", "dummy"]
    common += ["--max-context", str(MAX_CONTEXT), "--step-tokens", str(spec.step_tokens), "--no-prefix-cache"]
    common += ["--max-sequences", str(spec.max_sequences), "--max-waiting", "8192", "--max-slots", "512"]
    if options.dry_run:
        return [*common, "--device", "cpu", "--kv-memory", "64MiB", "--threads", "1", *options.mesh_options]
    device = ["--device", "cuda", "--dtype", "bfloat16", "--memory-share", str(spec.memory_share)]
    # The scheduler's process is left to schedule; what it costs a token is a row of its own.
    return [*common, *device, "--api-workers", "1", *options.mesh_options]


@contextmanager
def watched_mesh(spec: RunSpec, options: RunOptions, log: RunLog) -> Iterator[tuple[str, MeshWatch]]:
    """Our mesh, ready: (address, watch); its own log goes beside the run's lines."""
    model = str(HERE / "shapes" / spec.preset)
    with running_mesh(
        model,
        *mesh_options(spec, options),
        log=options.out / f"{spec.name}.log",
        start_timeout_s=START_TIMEOUT_S,
    ) as mesh:
        watch = MeshWatch(mesh.admin, mesh.up_pid)
        try:
            log.add({"measure": "engine", "start_s": round(mesh.ready_s, 2), **_engine_facts(watch.status())})
            yield mesh.listen, watch
        finally:
            watch.close()


def _engine_facts(status: admin_pb2.MeshStatus) -> dict[str, Any]:
    lane = status.lanes[0]
    return {
        "num_gpu_blocks": lane.num_blocks,
        "block_size": lane.block_size,
        "kv_tokens": lane.num_blocks * lane.block_size,
        "limiting_stage": lane.limiting_stage,
        "links": [[stage.link_transport, stage.link_reason] for stage in lane.stages],
        "status": MessageToDict(status, preserving_proto_field_name=True),
    }


def _run_ours(spec: RunSpec, options: RunOptions, log: RunLog) -> None:
    with watched_mesh(spec, options, log) as (address, watch):
        if not spec.sizes and not spec.requests:
            return
        client = [sys.executable, str(HERE / "gpu_client.py"), address, "--reps", str(spec.reps)]
        client += ["--sizes", ",".join(map(str, spec.sizes)), "--requests", ",".join(map(str, spec.requests))]
        if options.dry_run:
            client += ["--scale", "32", "--prompt-len", "8"]
        run_client(client, watch, log)


def run_client(command: list[str], watch: MeshWatch, log: RunLog) -> None:
    """Run a client to its end; a throughput line gets what the mesh did meanwhile."""
    before: Mark | None = None
    for line in _json_lines(command, env=None, stderr=None):
        if line["measure"] == "begin":
            before = watch.mark()
            watch.start()
        elif before is not None:
            watch.stop()
            after = watch.mark()
            line |= used_since(before, after)
            seconds = line.get("seconds")
            if isinstance(seconds, float):
                steady = steady_busy_share(watch.busy, after.at_s - seconds, after.at_s)
                line["busy_shares"] = None if steady is None else [round(share, 4) for share in steady[1]]
            # Of the middle of the run: at its end the load is another one.
            line["pipeline"] = watch.pipelines[len(watch.pipelines) // 2] if watch.pipelines else None
            line["stages"] = [
                {"compute_ms": round(stage.mean_compute_ms, 4), "wait_ms": round(stage.mean_wait_ms, 4)}
                for stage in watch.status().lanes[0].stages
            ]
            before = None
        log.add(line)
        if line["measure"] == "error":
            raise RuntimeError(line["what"])


def _run_vllm(spec: RunSpec, options: RunOptions, log: RunLog) -> None:
    if options.dry_run:
        raise RuntimeError("dry run: vLLM is not started")
    if options.vllm is None or options.bench_vllm is None:
        raise RuntimeError("no yardstick was given: --vllm FOLDER --bench-vllm bench_vllm.py")
    command = [sys.executable, str(options.bench_vllm), "--preset", spec.preset]
    command += ["--tp", str(spec.tp), "--pp", str(spec.stages), "--reps", str(spec.reps)]
    command += ["--gpu-mem-util", str(spec.memory_share), "--max-num-seqs", str(spec.max_sequences)]
    command += ["--max-num-batched-tokens", str(spec.step_tokens), "--max-model-len", str(MAX_CONTEXT)]
    command += ["--sizes", ",".join(map(str, spec.sizes))] if spec.sizes else ["--skip-decode"]
    if spec.requests:
        command += ["--num-requests", str(spec.requests[0])]
        if spec.requests[0] > 512:
            command += ["--reps", "1"]
    else:
        command += ["--skip-throughput"]
    if spec.max_sequences > 512:
        command += ["--capture-sizes", CAPTURES_2048]
    # Ours is not to be seen by it, nor by us its versions of libraries.
    env = {**os.environ, **MULTICAST_OFF, "PYTHONPATH": str(options.vllm)}
    with (options.out / f"{spec.name}.log").open("w") as errors:
        for line in _json_lines(command, env=env, stderr=errors):
            log.add(line)
    if not log.has("done"):
        text = (options.out / f"{spec.name}.log").read_text()
        raise RuntimeError(f"vLLM ended early: {_last_error(text)}")


def _run_transformers(spec: RunSpec, options: RunOptions, log: RunLog) -> None:
    command = [sys.executable, str(HERE / "transformers_gpu.py"), str(HERE / "shapes" / spec.preset)]
    command += ["--batch", str(spec.sizes[0])]
    if options.dry_run:
        command += ["--device", "cpu", "--steps", "4", "--prompt-len", "8"]
    with (options.out / f"{spec.name}.log").open("w") as errors:
        for line in _json_lines(command, env=None, stderr=errors):
            log.add(line)
    if not log.has("decode"):
        text = (options.out / f"{spec.name}.log").read_text()
        raise RuntimeError(f"transformers ended early: {_last_error(text)}")


def _json_lines(
    command: list[str], *, env: dict[str, str] | None, stderr: TextIO | None
) -> Iterator[dict[str, Any]]:
    """The JSON objects with a `measure` that a command prints; it is ended when the reader stops."""
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=stderr, text=True, env=env)
    assert process.stdout is not None
    try:
        for text in process.stdout:
            if text.startswith('{"measure"'):
                yield json.loads(text)
        process.wait(60)
    finally:
        if process.poll() is None:
            process.terminate()
            kill = threading.Timer(20, process.kill)
            kill.start()
            process.wait()
            kill.cancel()


def _last_error(text: str) -> str:
    lines = [line for line in text.splitlines() if re.search(r"Error|error:|Exception", line)]
    return (lines or text.splitlines() or ["it said nothing"])[-1][-400:]


def _short(line: dict[str, Any]) -> str:
    shown = {key: value for key, value in line.items() if key not in ("status", "raw_s", "unix_s", "t_s")}
    return json.dumps(shown)[:300]
