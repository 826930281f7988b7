"""Gaps between the device's steps: decode at one batch on one GPU stage, through router and gRPC, from a trace.

    python benchmarks/launch_gaps.py --json

Prints the largest and the p99 gap over the traced steps; the trace is kept in the output folder.
"""

from __future__ import annotations

import argparse
import os
import statistics
from pathlib import Path

from gpu_facts import read_facts
from gpu_traces import trace_decode
from report import Report
from trace_steps import gap_parts_us, gaps_us, quantile, read_spans, steps_of


def main() -> None:
    """Trace, then print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    parser.add_argument("--shape", default="llama-3.1-8b")
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--steps", type=int, default=220)
    parser.add_argument("--out", type=Path, default=Path(os.environ.get("OUT", "build/gpu")))
    parser.add_argument("--trace", type=Path, help="read this trace instead of making one")
    parser.add_argument("--dry-run", action="store_true", help="tiny shape, CPU stage")
    options = parser.parse_args()
    report = Report("launch_gaps", options.json, facts=read_facts().told())
    try:
        traces = (
            {options.batch: options.trace}
            if options.trace
            else trace_decode(
                options.shape, [options.batch], options.steps, options.out, dry_run=options.dry_run
            ).traces
        )
        path = traces.get(options.batch)
        if path is None:
            raise RuntimeError(f"no step of {options.batch} rows was traced")
        spans = read_spans(path)
        steps = steps_of(spans)
    except RuntimeError as error:
        report.add(
            "largest gap between device steps", None, "us", target=20, at_most=True, reference=str(error)
        )
        report.finish()
        return
    gaps = gaps_us(steps)
    if len(gaps) < 2:
        why = f"{path.name} has {len(steps)} replays of a graph; the steps ran without graphs"
        report.add("largest gap between device steps", None, "us", target=20, at_most=True, reference=why)
    else:
        told = f"{len(steps)} steps at batch {options.batch}, trace {path.name}"
        report.add(
            "largest gap between device steps", max(gaps), "us", target=20, at_most=True, reference=told
        )
        report.add("p99 gap between device steps", quantile(gaps, 0.99), "us", target=20, at_most=True)
        filled = ", ".join(f"{name} {value:.1f}" for name, value in gap_parts_us(spans, steps).items())
        report.add("median gap between device steps", statistics.median(gaps), "us", reference=filled)
        times = [step.end - step.begin for step in steps]
        report.add("median time of a step on the device", statistics.median(times) / 1e3, "ms")
    report.finish()


if __name__ == "__main__":
    main()
