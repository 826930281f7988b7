"""The memory effect: a model that barely fits one GPU, on one and on more, as JSON and as a picture.

    python benchmarks/scaling.py --json --picture docs/scaling.svg

The 70B shape in bfloat16 at memory share 0.975 on 1 GPU, TP=2, 2 stages and 2 stages x TP=2: KV blocks, and output
tokens/s with prompts of 1,024 and outputs of 128. More GPUs hold more than in proportion, because the
weights are held once; the superlinear ratio is tokens/s over one GPU's, per GPU.
"""

from __future__ import annotations

import argparse
import os
import sys
from dataclasses import dataclass
from pathlib import Path

from bar_chart import Bar, bar_chart
from gpu_facts import read_facts
from gpu_runs import RunLog, RunOptions, run_client, watched_mesh
from gpu_specs import RunSpec
from report import Report

PROMPT_TOKENS, OUTPUT_TOKENS = 1024, 128
MIN_REQUESTS, MAX_REQUESTS = 16, 1024
WAVES = 2
"""Requests for so many times the memory there is, so that it is full most of the time."""
VLLM_BLOCKS = {"1 GPU": 541, "TP=2": 28256, "2 stages": 28062}
"""KV blocks of vLLM 0.24.0 on one and two H200, same shape and share (docs/performance.md)."""


@dataclass(frozen=True, slots=True)
class Layout:
    """How many GPUs, and how."""

    name: str
    stages: int
    tp: int

    @property
    def num_gpus(self) -> int:
        """GPUs it takes."""
        return self.stages * self.tp


LAYOUTS = (
    Layout("1 GPU", 1, 1),
    Layout("TP=2", 1, 2),
    Layout("2 stages", 2, 1),
    Layout("2 stages x TP=2", 2, 2),
)


@dataclass(frozen=True, slots=True)
class Point:
    """What a layout reached."""

    layout: Layout
    blocks: int
    tok_s: float
    requests: int


def requests_for(kv_tokens: int) -> int:
    """As many as fill the memory WAVES times, within limits."""
    fit = kv_tokens // (PROMPT_TOKENS + OUTPUT_TOKENS)
    return max(MIN_REQUESTS, min(MAX_REQUESTS, WAVES * fit))


def measure(layout: Layout, shape: str, options: RunOptions, *, share: float, step_tokens: int) -> Point:
    """Start the layout and load it; RuntimeError if it does not start or a request fails."""
    spec = RunSpec(
        name="scaling-" + layout.name.replace(" ", "-").replace("=", ""),
        group="D",
        system="ours",
        stages=layout.stages,
        tp=layout.tp,
        preset="tiny" if options.dry_run else shape,
        memory_share=share,
        step_tokens=step_tokens,
        estimate_s=0,
    )
    log = RunLog(spec, options)
    try:
        with watched_mesh(spec, options, log) as (address, watch):
            lane = watch.status().lanes[0]
            kv_tokens = lane.num_blocks * lane.block_size
            count = 6 if options.dry_run else requests_for(kv_tokens)
            lengths = "32,8" if options.dry_run else f"{PROMPT_TOKENS},{OUTPUT_TOKENS}"
            script = str(Path(__file__).parent / "gpu_client.py")
            client = [sys.executable, script, address, "--requests", str(count), "--fixed", lengths]
            run_client(client, watch, log)
    finally:
        log.close()
    line = next(line for line in log.lines if line["measure"] == "throughput")
    return Point(layout, lane.num_blocks, line["output_tok_s"], count)


def main() -> None:
    """Measure every layout that the machine has GPUs for."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    parser.add_argument("--shape", default="llama-3.1-70b")
    parser.add_argument("--layouts", default="", help="only these, by name: 'TP=2,2 stages'")
    parser.add_argument("--memory-share", type=float, default=0.975)
    parser.add_argument("--step-tokens", type=int, default=2048)
    parser.add_argument("--picture", type=Path, metavar="FILE.svg")
    parser.add_argument("--out", type=Path, default=Path(os.environ.get("OUT", "build/gpu")))
    parser.add_argument("--up", default="", help="further options of `stagemesh up`")
    parser.add_argument("--dry-run", action="store_true", help="tiny shape, CPU stages")
    options = parser.parse_args()
    options.out.mkdir(parents=True, exist_ok=True)
    run_options = RunOptions(
        out=options.out,
        vllm=None,
        bench_vllm=None,
        dry_run=options.dry_run,
        quick=True,
        mesh_options=("--max-step-tokens", str(options.step_tokens), *options.up.split())
        if not options.dry_run
        else (),
    )
    report = Report("scaling", options.json)
    facts = read_facts()
    report.note(f"commit {facts.commit}, {', '.join(facts.gpus) or 'no GPU'}")
    wanted = options.layouts.split(",") if options.layouts else [layout.name for layout in LAYOUTS]
    points: list[Point] = []
    for layout in LAYOUTS:
        if layout.name not in wanted:
            continue
        why = ""
        if not options.dry_run and layout.num_gpus > len(facts.gpus):
            why = f"needs {layout.num_gpus} GPUs, this machine has {len(facts.gpus)}"
        else:
            try:
                points.append(
                    measure(
                        layout,
                        options.shape,
                        run_options,
                        share=options.memory_share,
                        step_tokens=options.step_tokens,
                    )
                )
            except RuntimeError as error:
                why = str(error)[-400:]
        if why:
            report.add(f"{layout.name}: KV blocks", None, "blocks", reference=why)
            report.add(f"{layout.name}: output", None, "tok/s", reference=why)
    _report(report, points, facts.gpus)
    if options.picture and points:
        options.picture.write_text(picture(points, facts.gpus))
    report.finish()


def _report(report: Report, points: list[Point], gpus: tuple[str, ...]) -> None:
    base = min(points, key=lambda point: point.layout.num_gpus, default=None)
    for point in points:
        published = VLLM_BLOCKS.get(point.layout.name)
        told = f"vLLM on H200: {published:,}" if published and any("H200" in gpu for gpu in gpus) else ""
        report.add(f"{point.layout.name}: KV blocks", point.blocks, "blocks", reference=told)
        report.add(
            f"{point.layout.name}: output",
            point.tok_s,
            "tok/s",
            reference=f"{point.requests} requests of {PROMPT_TOKENS:,} and {OUTPUT_TOKENS} tokens",
        )
    for point in points:
        if base is None or point is base:
            continue
        gpus_ratio = point.layout.num_gpus / base.layout.num_gpus
        tokens_ratio = point.tok_s / base.tok_s
        report.add(
            f"{point.layout.name}: superlinear ratio over {base.layout.name}",
            tokens_ratio / gpus_ratio,
            "x",
            reference=f"{tokens_ratio:.2f} times the tokens/s and {point.blocks / base.blocks:.1f} times the blocks "
            f"with {gpus_ratio:g} times the GPUs",
        )


def picture(points: list[Point], gpus: tuple[str, ...]) -> str:
    """Two rows of bars: blocks and tokens/s."""
    name = gpus[0].partition(":")[2].partition("(")[0].strip() if gpus else "CPU stages, dry run"
    return bar_chart(
        f"70B shape in bfloat16: memory and throughput ({name})",
        [
            ("KV blocks of 16 tokens", [Bar(point.layout.name, point.blocks) for point in points]),
            (
                f"output tokens/s, prompts of {PROMPT_TOKENS:,}, outputs of {OUTPUT_TOKENS}",
                [Bar(point.layout.name, point.tok_s) for point in points],
            ),
        ],
    )


if __name__ == "__main__":
    main()
