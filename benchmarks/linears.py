"""What layout of the weights is fastest for a CPU linear: the measurement behind stage/models/product.py.

Times the 120 linears of SmolLM2-135M's 30 layers (random float32 weights of its shapes, about 425 MB, so
that no cache holds them) for a few numbers of rows:

- plain: torch.nn.functional.linear with the weight as files have it, [out, in];
- transposed: matmul with the weight kept as [in, out], stagemesh's choice on Intel's CPUs without the kernels;
- onednn: oneDNN's prepacked weights, with torch's private operators, stagemesh's choice on others without them;
- native: the compiled kernels, stagemesh's choice where the CPU has AVX-512 and the build had a compiler.

The figure is the best of a few runs in milliseconds; they take turns in each round.
"""

from __future__ import annotations

import argparse
import json
import os
import time
from collections.abc import Callable

import torch

from stagemesh.stage import native

SHAPES = ((960, 576), (576, 576), (3072, 576), (576, 1536))
"""[out, in] of the fused q, k and v, the output, the fused gate and up, and the down projection."""
NUM_LAYERS = 30

Run = Callable[[list[torch.Tensor]], object]


def make_runs() -> dict[str, Run]:
    """One function for each layout; it takes an input for each shape."""
    plain = [[torch.randn(shape) for shape in SHAPES] for _ in range(NUM_LAYERS)]
    transposed = [[weight.t().contiguous() for weight in layer] for layer in plain]
    runs: dict[str, Run] = {
        "plain": lambda xs: [
            torch.nn.functional.linear(x, w) for layer in plain for x, w in zip(xs, layer, strict=True)
        ],
        "transposed": lambda xs: [x @ w for layer in transposed for x, w in zip(xs, layer, strict=True)],
    }
    if torch.backends.mkldnn.is_available():
        pack, linear = torch.ops.mkldnn._reorder_linear_weight, torch.ops.mkldnn._linear_pointwise
        packed = [[pack(weight, None) for weight in layer] for layer in plain]
        runs["onednn"] = lambda xs: [
            linear(x, w, None, "none", [], "") for layer in packed for x, w in zip(xs, layer, strict=True)
        ]
    if native.is_available():
        panels = [[native.in_panels(weight) for weight in layer] for layer in plain]
        runs["native"] = lambda xs: [
            native.linear(x, w, out)
            for layer in panels
            for x, w, (out, _) in zip(xs, layer, SHAPES, strict=True)
        ]
    return runs


def measure(runs: dict[str, Run], rows: int, rounds: int) -> dict[str, float]:
    """Best milliseconds of each layout for that many rows."""
    xs = [torch.randn(rows, width) for _, width in SHAPES]
    best = dict.fromkeys(runs, float("inf"))
    for number in range(rounds + 1):
        for name, run in runs.items():
            began = time.perf_counter()
            run(xs)
            if number:  # the first round warms up
                best[name] = min(best[name], (time.perf_counter() - began) * 1e3)
    return {name: round(milliseconds, 1) for name, milliseconds in best.items()}


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument("--rows", type=int, nargs="+", default=[1, 4, 16, 32, 128])
    parser.add_argument("--rounds", type=int, default=6)
    parser.add_argument("--json", action="store_true", help="a JSON object instead of a table")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    with torch.inference_mode():
        runs = make_runs()
        figures = {rows: measure(runs, rows, options.rounds) for rows in options.rows}
    if options.json:
        cpu = torch.backends.cpu.get_cpu_capability()
        about = {"torch": torch.__version__, "threads": options.threads, "cpu_capability": cpu}
        print(json.dumps({**about, "unit": "ms", "rows": figures}))
        return
    print("rows  " + "".join(f"{name:>12}" for name in runs))
    for rows, times in figures.items():
        print(f"{rows:4}  " + "".join(f"{times[name]:12.1f}" for name in runs))


if __name__ == "__main__":
    main()
