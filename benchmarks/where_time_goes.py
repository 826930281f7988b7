"""Where a decode step's time goes on one GPU stage, by batch: device time by kind beside the floor of each.

    python benchmarks/where_time_goes.py --json

From a profiler trace of steps that a client's requests cause, through router and gRPC. A floor is the bytes that
must move over the measured bandwidth of a copy, or for linears the operations over --tflops if that is longer.
'control' is what a client sees of a step, without a profiler, beyond the device's own time; its sequences are
shorter than those traced, so attention counts in proportion. `--from FOLDER` reads what an earlier run left there.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

from gpu_facts import read_facts
from gpu_requests import DECODE_LENGTHS
from gpu_traces import PROMPT_TOKENS, read_traced, trace_decode
from report import Report
from trace_steps import read_spans, steps_of, times_by_kind

HERE = Path(__file__).resolve().parent
ITEMSIZE = 2
LINK_GB_S = 317.0
"""cupy NCCL send and receive over NVLink at 64 MiB (architecture.md)."""
ALL_REDUCE_GB_S = 329.0
"""Bus bandwidth of a large all-reduce on two GPUs."""
CLIENT_CONTEXT = PROMPT_TOKENS + (DECODE_LENGTHS[1] + DECODE_LENGTHS[3]) / 2
"""Tokens of a sequence in the mean over the steps whose time a client measures."""
COPY = """\
import torch
source = torch.empty(1 << 30, dtype=torch.uint8, device="cuda"); target = torch.empty_like(source)
begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
for _ in range(3): target.copy_(source)
begin.record()
for _ in range(10): target.copy_(source)
end.record(); end.synchronize()
print(2 * 10 * (1 << 30) / begin.elapsed_time(end) / 1e9)
"""
ORDER = (
    "linears",
    "attention",
    "all-reduce",
    "norms",
    "rope, activation, tables",
    "sampling",
    "link",
    "copies",
    "other",
    "launch gaps",
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Machine:
    """The ceilings that floors are worked out from."""

    tb_s: float
    """Of a device-to-device copy, bytes read and written."""
    tflops: float
    """Of a large bf16 matrix product."""


def floors_us(
    config: dict[str, int], machine: Machine, *, batch: int, context: float, stages: int, tp: int
) -> dict[str, float]:
    """The least microseconds of each kind for a step on the last of `stages` stages, one of `tp` ranks."""
    hidden, layers = config["hidden_size"], config["num_hidden_layers"] / stages
    head_dim = config["head_dim"]
    queries, keys = (
        config["num_attention_heads"] * head_dim / tp,
        config["num_key_value_heads"] * head_dim / tp,
    )
    columns, vocab = config["intermediate_size"] / tp, config["vocab_size"] / tp
    weights = layers * hidden * (2 * queries + 2 * keys + 3 * columns) + vocab * hidden

    def moved(elements: float, itemsize: int = ITEMSIZE) -> float:
        return elements * itemsize / machine.tb_s / 1e6

    reduced = layers * 2 * batch * hidden * ITEMSIZE * 2 * (tp - 1) / tp
    return {
        "linears": max(moved(weights), 2 * weights * batch / machine.tflops / 1e6),
        "attention": moved(batch * context * layers * 2 * keys),
        "all-reduce": reduced / ALL_REDUCE_GB_S / 1e3,
        # Input, residual in and out, output.
        "norms": moved((2 * layers + 1) * batch * hidden * 4),
        # q, k in and out, v in, k and v to the cache; gate and up in, product out.
        "rope, activation, tables": moved(layers * batch * (2 * queries + 5 * keys + 3 * columns)),
        "sampling": moved(batch * vocab, 4),
        "link": batch * hidden * ITEMSIZE / LINK_GB_S / 1e3 if stages > 1 else 0.0,
        "launch gaps": 0.0,
        "control": 0.0,
    }


def main() -> None:
    """Trace every batch, then print a row for each kind."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    parser.add_argument("--shape", default="llama-3.1-8b")
    parser.add_argument("--batches", default="1,64,512")
    parser.add_argument("--steps", type=int, default=48)
    parser.add_argument("--stages", type=int, default=1)
    parser.add_argument("--tp", type=int, default=1)
    parser.add_argument("--tb-s", type=float, help="bandwidth of a copy; measured if not given")
    parser.add_argument("--tflops", type=float, default=790.0, help="of a large bf16 product on random data")
    parser.add_argument("--out", type=Path, default=Path(os.environ.get("OUT", "build/gpu")))
    parser.add_argument("--from", dest="earlier", type=Path, metavar="FOLDER", help="no new run: its --out")
    parser.add_argument("--dry-run", action="store_true", help="tiny shape, CPU stage")
    options = parser.parse_args()
    batches = [int(text) for text in options.batches.split(",")]
    report = Report("where_time_goes", options.json, facts=read_facts().told())
    shape = "tiny" if options.dry_run else options.shape
    config = json.loads((HERE / "shapes" / shape / "config.json").read_text())
    try:
        machine = Machine(
            tb_s=options.tb_s or (1.0 if options.dry_run else _copy_tb_s()), tflops=options.tflops
        )
        traced = (
            read_traced(options.earlier, batches, stages=options.stages)
            if options.earlier
            else trace_decode(
                shape,
                batches,
                options.steps,
                options.out,
                stages=options.stages,
                tp=options.tp,
                measure=True,
                dry_run=options.dry_run,
            )
        )
    except (RuntimeError, subprocess.SubprocessError) as error:
        report.add("a step's time by kind", None, "us", reference=str(error)[-500:])
        report.finish()
        return
    report.facts = traced.facts
    report.note(f"copy {machine.tb_s:.2f} TB/s, products {machine.tflops:.0f} TFLOP/s")
    table = ["| batch | kind | us a step | floor | over it |", "| --- | --- | --- | --- | --- |"]
    for batch in batches:
        if batch not in traced.traces:
            report.add(f"batch {batch}: a step's time by kind", None, "us", reference="it left no trace")
            continue
        spans = read_spans(traced.traces[batch])
        steps = steps_of(spans)
        if len(steps) < 2:
            why = f"{traced.traces[batch].name} has {len(steps)} replays of a graph"
            report.add(f"batch {batch}: a step's time by kind", None, "us", reference=why)
            continue
        times = times_by_kind(spans, steps)
        device_us = sum(times.values())
        context = traced.mean_context[batch]
        shorter = times.get("attention", 0.0) * max(0.0, 1 - CLIENT_CONTEXT / context)
        times["control"] = max(0.0, traced.step_ms.get(batch, 0.0) * 1e3 - (device_us - shorter))
        floors = floors_us(
            config, machine, batch=batch, context=context, stages=options.stages, tp=options.tp
        )
        for kind in (*ORDER, "control"):
            value, floor = times.get(kind, 0.0), floors.get(kind, 0.0)
            if not value and not floor:
                continue
            report.add(f"batch {batch}: {kind}", value, "us", reference=f"floor {floor:.1f} us")
            table.append(f"| {batch} | {kind} | {value:,.1f} | {floor:,.1f} | {value - floor:,.1f} |")
        client_ms = traced.step_ms.get(batch)
        report.add(
            f"batch {batch}: a step on the device",
            device_us / 1e3,
            "ms",
            reference=f"{len(steps)} steps traced at {context:.0f} tokens of context; a client sees {client_ms} ms without "
            f"the profiler at {CLIENT_CONTEXT:.0f}",
        )
    options.out.mkdir(parents=True, exist_ok=True)
    (options.out / "where_time_goes.md").write_text("\n".join(table) + "\n")
    report.finish()


def _copy_tb_s() -> float:
    """TB/s, read and written; measured in a process of its own, which leaves the GPU's memory as it was."""
    done = subprocess.run(
        [sys.executable, "-c", COPY], capture_output=True, text=True, timeout=90, check=True
    )
    return float(done.stdout)


if __name__ == "__main__":
    main()
