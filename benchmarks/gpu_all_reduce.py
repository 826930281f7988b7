"""The all-reduce in one kernel with residual and norm, on two GPUs: whether it is right, and its time beside two kernels;
and the ways to sum alone, with what a stage chooses.

    python benchmarks/gpu_all_reduce.py --json

Times are those of calls in a CUDA graph, as decode steps make them and as a stage measures them at its start.
"""

from __future__ import annotations

import argparse
import multiprocessing
import os
import sys
import tempfile
from functools import partial
from pathlib import Path

import torch
import torch.distributed as dist
from report import Report

from stagemesh.stage.cuda.environment import CUDA_VARIABLES
from stagemesh.stage.cuda.fused_reduce import FusedReducer, load_module
from stagemesh.stage.cuda.reduce import KINDS, MEASURED_ROWS, SharedReducer, time_in_graph
from stagemesh.stage.group import RankGroup
from stagemesh.stage.kernels.norm import add_rms_norm

HIDDEN, MAX_TOKENS, EPS = 4096, 8192, 1e-5
CHECKED_ROWS, TIMED_ROWS = (1, 2, 7, 8, 33, 64, 100, 128), (1, 16, 64, 128)
REPEATS = 20
TOLERANCE = 0.04
"""A step of bf16 at the largest values there are."""
PORT = "29871"


def check(reducer: FusedReducer, weight: torch.Tensor, rows: int, *, pdl: bool) -> tuple[float, bool]:
    """(largest difference from sum, addition and norm, whether the ranks have equal results)."""
    worst, same = 0.0, True
    part = reducer.partial[:rows]
    for _ in range(REPEATS):
        part.copy_(torch.randn(rows, HIDDEN, device="cuda"))
        residual = torch.randn(rows, HIDDEN, device="cuda", dtype=torch.bfloat16)
        dist.broadcast(residual, 0)
        whole = part.float()
        dist.all_reduce(whole)
        expected, normed = residual.clone(), torch.empty_like(residual)
        add_rms_norm(whole.bfloat16(), expected, weight, EPS, normed)
        reducer._fused(part, residual, weight, EPS, part, pdl=pdl)
        for got, wanted in ((residual, expected), (part, normed)):
            worst = max(worst, float((got.float() - wanted.float()).abs().max()))
        first = part.clone()
        dist.broadcast(first, 0)
        same &= torch.equal(first, part)
    return worst, same


def rank_main(rank: int, size: int, as_json: bool, cache: Path) -> None:
    """One rank; rank 0 prints."""
    os.environ.update(CUDA_VARIABLES, MASTER_ADDR="127.0.0.1", MASTER_PORT=PORT)
    torch.cuda.set_device(rank)
    dist.init_process_group("nccl", rank=rank, world_size=size, device_id=torch.device("cuda", rank))
    group, report = RankGroup(rank, size), Report("gpu_all_reduce", as_json)
    module, reason = load_module(group, HIDDEN, torch.bfloat16)
    if module is None:
        raise RuntimeError(reason)
    reducer = FusedReducer(group, MAX_TOKENS, HIDDEN, torch.bfloat16, torch.device("cuda", rank), module)
    reducer.measure(cache, time_in_graph, pdl=True)
    weight = torch.randn(HIDDEN, device="cuda", dtype=torch.bfloat16)
    dist.broadcast(weight, 0)
    torch.manual_seed(rank)
    for rows in CHECKED_ROWS:
        for pdl in (False, True):
            worst, same = check(reducer, weight, rows, pdl=pdl)
            told = f"{'with' if pdl else 'without'} PDL; {'equal' if same else 'NOT EQUAL'} on the ranks"
            report.add(
                f"{rows} rows, largest difference", worst, "", target=TOLERANCE, at_most=True, reference=told
            )
    reducer.partial.zero_()
    for rows in MEASURED_ROWS:
        for kind in KINDS:
            us = time_in_graph(partial(reducer._sum, kind, reducer.partial[:rows]))
            report.add(f"{rows} rows, {kind}", us, "us", reference=f"chosen: {reducer.kind(rows)}")
    residual = torch.zeros(TIMED_ROWS[-1], HIDDEN, device="cuda", dtype=torch.bfloat16)
    reducer.partial.zero_()
    for rows in TIMED_ROWS:
        part, into = reducer.partial[:rows], residual[:rows]

        def apart(part: torch.Tensor = part, into: torch.Tensor = into) -> None:
            SharedReducer.sum_add_norm(reducer, part, into, weight, EPS, part, pdl=True)

        def together(part: torch.Tensor = part, into: torch.Tensor = into) -> None:
            reducer._fused(part, into, weight, EPS, part, pdl=True)

        report.add(f"{rows} rows, two kernels", time_in_graph(apart), "us", reference=reducer.kind(rows))
        report.add(f"{rows} rows, one kernel", time_in_graph(together), "us")
    if rank == 0:
        report.finish()
    dist.barrier()
    dist.destroy_process_group()


def main() -> None:
    """Start the two ranks."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        context, cache = multiprocessing.get_context("spawn"), Path(folder) / "all-reduce.json"
        ranks = [
            context.Process(target=rank_main, args=(rank, 2, options.json or rank > 0, cache))
            for rank in range(2)
        ]
        for one in ranks:
            one.start()
        for one in ranks:
            one.join()
    sys.exit(max(abs(one.exitcode or 0) for one in ranks))


if __name__ == "__main__":
    main()
