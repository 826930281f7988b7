"""How long the ranks of a CPU stage take to sum a tensor: through shared memory, and through gloo.

    python benchmarks/collectives.py --json

A process and a thread a rank, hidden size 576 (SmolLM2-135M's) in float32, for the rows of a decode step of one
and of 16 streams and of a prefill chunk. Microseconds an all-reduce, the mean of a few hundred in a row.
"""

from __future__ import annotations

import argparse
import multiprocessing
import os
import tempfile
import time
from multiprocessing.connection import Connection
from pathlib import Path

import torch
from report import Report

from stagemesh.stage import host_memory
from stagemesh.stage.group import RankGroup

HIDDEN_SIZE = 576
ROWS = (1, 16, 512)
WARM_UP = 20


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=300)
    options = parser.parse_args()
    report = Report("collectives", options.json)
    gloo = run(options.ranks, options.rounds, shares_memory=False)
    shared = run(options.ranks, options.rounds, shares_memory=True) if host_memory.is_available() else None
    for index, rows in enumerate(ROWS):
        report.add(
            f"all-reduce of {rows} x {HIDDEN_SIZE}, {options.ranks} ranks",
            shared[index] if shared else None,
            "us",
            reference=f"gloo {gloo[index]:.0f} us"
            + ("" if shared else "; no shared memory on this platform"),
        )
    report.finish()


def run(size: int, rounds: int, *, shares_memory: bool) -> list[float]:
    """Microseconds for each of ROWS, as rank 0 sees it."""
    context = multiprocessing.get_context("fork")
    memory = host_memory.create(size) if shares_memory else None
    ours, theirs = context.Pipe()
    with tempfile.TemporaryDirectory() as folder:
        store = Path(folder) / "store"
        processes = [
            context.Process(target=_rank, args=(rank, size, memory, store, rounds, theirs))
            for rank in range(size)
        ]
        for process in processes:
            process.start()
        figures: list[float] = ours.recv()
        for process in processes:
            process.join()
    if memory is not None:
        os.close(memory)
    return figures


@torch.inference_mode()
def _rank(rank: int, size: int, memory: int | None, store: Path, rounds: int, results: Connection) -> None:
    torch.set_num_threads(1)
    os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    group = RankGroup.connect(rank, size, store, timeout_s=20, memory=memory)
    figures = []
    for rows in ROWS:
        tensor = torch.zeros(rows, HIDDEN_SIZE)
        for _ in range(WARM_UP):
            group.all_reduce(tensor)
        began = time.perf_counter()
        for _ in range(rounds):
            group.all_reduce(tensor)
        figures.append((time.perf_counter() - began) / rounds * 1e6)
    if rank == 0:
        results.send(figures)


if __name__ == "__main__":
    main()
