"""The memory effect: a model that barely fits one GPU, on one and on more, as JSON and as a picture.

    python benchmarks/scaling.py --json --picture docs/scaling.svg

The 70B shape in bfloat16 at memory share 0.975 on 1 GPU, TP=2, 2 stages and 2 stages x TP=2: KV blocks, and output
tokens/s with prompts of 1,024 and outputs of 128. More GPUs hold more than in proportion, because the
weights are held once; the superlinear ratio is tokens/s over one GPU's, per GPU. A GPU that does not hold all
layers gets as many as leave it CUT_BLOCKS KV blocks, by the accounting of the stage itself, and the rows say
so. OUT/scaling.json and the picture are written after every layout, so that a run cut short keeps what it measured.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

from bar_chart import Bar, bar_chart
from gpu_facts import read_facts
from gpu_runs import MAX_CONTEXT, RunLog, RunOptions, run_client, watched_mesh
from gpu_specs import RunSpec
from report import Report

from stagemesh.stage.config import StageConfig
from stagemesh.stage.plan import plan_stage
from stagemesh.wire.errors import ConfigError

HERE = Path(__file__).resolve().parent
PROMPT_TOKENS, OUTPUT_TOKENS = 1024, 128
MIN_REQUESTS, MAX_REQUESTS = 16, 1024
WAVES = 2
"""Requests for so many times the memory there is, so that it is full most of the time."""
CUT_BLOCKS = 256
"""KV blocks that a shape cut to fit leaves at least; a layer of the 70B shape weighs some hundred more."""
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


@dataclass(frozen=True, slots=True)
class Shape:
    """What is served: a shape of benchmarks/shapes, whole or its first layers."""

    name: str
    folder: Path
    layers: int
    all_layers: int

    @property
    def told(self) -> str:
        """For people."""
        whole = self.layers == self.all_layers
        return self.name if whole else f"{self.name} cut to {self.layers} of {self.all_layers} layers"


def shape_of(name: str, out: Path, *, layers: int = 0) -> Shape:
    """A shape by its name; with `layers`, a copy under `out` that has only so many."""
    folder = HERE / "shapes" / name
    config = json.loads((folder / "config.json").read_text())
    count = config["num_hidden_layers"]
    if not layers or layers == count:
        return Shape(name, folder, count, count)
    cut = out / "shapes" / f"{name}-{layers}-layers"
    cut.mkdir(parents=True, exist_ok=True)
    (cut / "config.json").write_text(json.dumps({**config, "num_hidden_layers": layers}, indent=1))
    return Shape(name, cut.resolve(), layers, count)


def barely_fitting(name: str, out: Path, *, share: float, step_tokens: int) -> Shape:
    """The shape, whole if GPU 0 holds it and a sequence, else cut to as many layers as leave CUT_BLOCKS blocks.

    Raises:
        RuntimeError: Not even one layer fits.
    """
    whole = shape_of(name, out)
    one_sequence = -(-(PROMPT_TOKENS + OUTPUT_TOKENS) // 16)
    with tempfile.TemporaryDirectory() as tries:
        for layers in range(whole.layers, 0, -1):
            shape = shape_of(name, Path(tries), layers=layers)
            needed = one_sequence if layers == whole.layers else CUT_BLOCKS
            if blocks_of(shape, share=share, step_tokens=step_tokens) >= needed:
                return shape_of(name, out, layers=layers)
    raise RuntimeError(f"not one layer of {name} fits GPU 0 at memory share {share:g}")


def blocks_of(shape: Shape, *, share: float, step_tokens: int) -> int:
    """KV blocks that the stage's accounting leaves on GPU 0, before anything is allocated; 0: it does not fit."""
    config = StageConfig(
        model=str(shape.folder),
        stage="0/1",
        device="cuda",
        dtype="bfloat16",
        load_format="dummy",
        memory_share=share,
        max_context=MAX_CONTEXT,
        max_step_tokens=step_tokens,
        max_slots=512,
    )
    try:
        return plan_stage(config).num_blocks
    except ConfigError as error:
        if "do not fit" in str(error):
            return 0
        raise


def requests_for(kv_tokens: int, waves: float = WAVES) -> int:
    """As many as fill the memory `waves` times, within limits."""
    fit = kv_tokens // (PROMPT_TOKENS + OUTPUT_TOKENS)
    return max(MIN_REQUESTS, min(MAX_REQUESTS, int(waves * fit)))


def measure(
    layout: Layout, shape: Shape, options: RunOptions, *, share: float, step_tokens: int, waves: float
) -> Point:
    """Start the layout and load it; RuntimeError if it does not start or a request fails."""
    spec = RunSpec(
        name="scaling-" + layout.name.replace(" ", "-").replace("=", ""),
        group="D",
        system="ours",
        stages=layout.stages,
        tp=layout.tp,
        preset=str(shape.folder),
        memory_share=share,
        step_tokens=step_tokens,
        estimate_s=0,
    )
    log = RunLog(spec, options)
    try:
        with watched_mesh(spec, options, log) as (address, watch):
            lane = watch.status().lanes[0]
            kv_tokens = lane.num_blocks * lane.block_size
            count = 6 if options.dry_run else requests_for(kv_tokens, waves)
            lengths = "32,8" if options.dry_run else f"{PROMPT_TOKENS},{OUTPUT_TOKENS}"
            script = str(HERE / "gpu_client.py")
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
    parser.add_argument("--layers", type=int, default=0, help="only so many; 0: as many as one GPU holds")
    parser.add_argument(
        "--waves", type=float, default=WAVES, help="requests for so many times the memory there is"
    )
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
    facts = read_facts()
    report = Report("scaling", options.json, facts=facts.told())
    try:
        if options.dry_run or options.layers:
            shape = shape_of("tiny" if options.dry_run else options.shape, options.out, layers=options.layers)
        else:
            shape = barely_fitting(
                options.shape, options.out, share=options.memory_share, step_tokens=options.step_tokens
            )
    except (RuntimeError, ConfigError) as error:
        report.add("1 GPU: KV blocks", None, "blocks", reference=str(error))
        report.finish()
        return
    report.facts["shape"] = shape.told
    report.note(f"commit {facts.commit}, {', '.join(facts.gpus) or 'no GPU'}: {shape.told}")
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
                        shape,
                        run_options,
                        share=options.memory_share,
                        step_tokens=options.step_tokens,
                        waves=options.waves,
                    )
                )
            except RuntimeError as error:
                why = str(error)[-400:]
        if why:
            report.add(f"{layout.name}: KV blocks", None, "blocks", reference=why)
            report.add(f"{layout.name}: output", None, "tok/s", reference=why)
        else:
            _add(report, points, shape, facts.gpus)
        (options.out / "scaling.json").write_text(report.text() + "\n")
        if options.picture and points:
            options.picture.write_text(picture(points, facts.gpus, shape))
    report.finish()


def _add(report: Report, points: list[Point], shape: Shape, gpus: tuple[str, ...]) -> None:
    """The rows of the last point; the first one, of the fewest GPUs, is what it is held against."""
    base, point = points[0], points[-1]
    name = point.layout.name
    published = VLLM_BLOCKS.get(name)
    told = shape.told
    if published and shape.layers == shape.all_layers and any("H200" in gpu for gpu in gpus):
        told += f"; vLLM on H200: {published:,}"
    report.add(f"{name}: KV blocks", point.blocks, "blocks", reference=told)
    load = f"{point.requests} requests of {PROMPT_TOKENS:,} and {OUTPUT_TOKENS} tokens"
    report.add(f"{name}: output", point.tok_s, "tok/s", reference=f"{load}; {shape.told}")
    if point is base:
        return
    gpus_ratio = point.layout.num_gpus / base.layout.num_gpus
    tokens_ratio = point.tok_s / base.tok_s
    report.add(
        f"{name}: superlinear ratio over {base.layout.name}",
        tokens_ratio / gpus_ratio,
        "x",
        reference=f"{tokens_ratio:.2f} times the tokens/s and {point.blocks / base.blocks:.1f} times the blocks "
        f"with {gpus_ratio:g} times the GPUs",
    )


def picture(points: list[Point], gpus: tuple[str, ...], shape: Shape) -> str:
    """Two rows of bars: blocks and tokens/s."""
    name = gpus[0].partition(":")[2].partition("(")[0].strip() if gpus else "CPU stages, dry run"
    return bar_chart(
        f"{shape.told}, bfloat16: memory and throughput ({name})",
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
