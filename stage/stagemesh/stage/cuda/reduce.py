"""Sums over the ranks of a stage: NCCL, and for small messages kernels over memory that the ranks share.

torch's symmetric memory lets a rank read the others' buffers over NVLink: the one-shot kernel reads them all
(least latency), the two-shot one reduces a part and gathers the rest. Which is best at which size is measured
at start, in CUDA graphs as decode steps have them, and decided by rank 0 for all (rule 11); NVLink multicast is not used.
"""

from __future__ import annotations

import itertools
import json
import logging
import os
import statistics
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from stagemesh.stage.group import RankGroup
from stagemesh.stage.kernels.norm import add_rms_norm
from stagemesh.stage.memory import MAX_SUMMED_ROWS

log = logging.getLogger(__name__)

KINDS = ("one_shot", "two_shot", "nccl")
MEASURED_ROWS = (1, 8, 32, 64, 128, 256, 512, 1024)
WARM_UPS, CALLS, REPLAYS = 3, 20, 11
"""Of a call that is timed: outside of a graph, in it, and of the graph."""

TimeOf = Callable[[Callable[[], object]], float]
"""Microseconds that a call takes on the device, which every rank asks for at the same time."""


class Reducer:
    """Sums tensors over the ranks; with one rank nothing happens."""

    name = "none"

    def __init__(self, group: RankGroup) -> None:
        self._group = group

    def sum(self, part: torch.Tensor) -> torch.Tensor:
        """The sum over the ranks of [T, hidden], a view of the buffer `partial`; perhaps in another buffer."""
        return self._group.all_reduce(part)

    def sum_add_norm(
        self,
        part: torch.Tensor,
        residual: torch.Tensor,
        weight: torch.Tensor,
        eps: float,
        out: torch.Tensor,
        *,
        pdl: bool = False,
    ) -> None:
        """residual += the sum of part over the ranks; out = norm(residual). All [T, hidden]; out may be part."""
        add_rms_norm(self.sum(part), residual, weight, eps, out, pdl=pdl)

    def sum_in_place(self, tensor: torch.Tensor) -> None:
        """The sum over the ranks in the tensor itself."""
        self._group.all_reduce(tensor)

    def greatest_in_place(self, keys: torch.Tensor) -> None:
        """The elementwise maximum over the ranks."""
        if self._group.size > 1:
            dist.all_reduce(keys, op=dist.ReduceOp.MAX)


class SharedReducer(Reducer):
    """With symmetric memory.

    Args:
        group: Of NCCL.
        max_tokens: Rows of the buffer.
        hidden: Width of it.
        dtype: Of it.
        device: Where.
    """

    def __init__(
        self, group: RankGroup, max_tokens: int, hidden: int, dtype: torch.dtype, device: torch.device
    ) -> None:
        super().__init__(group)
        import torch.distributed._symmetric_memory as symmetric

        assert dist.group.WORLD is not None
        self._name = dist.group.WORLD.group_name
        self.partial = symmetric.empty(max_tokens, hidden, dtype=dtype, device=device).zero_()
        symmetric.rendezvous(self.partial, self._name)
        self._out = torch.zeros(min(max_tokens, MAX_SUMMED_ROWS), hidden, dtype=dtype, device=device)
        self._crossovers: list[tuple[int, str]] = []
        """(rows, kind): the kind up to so many rows, ascending; NCCL beyond."""

    def sum(self, part: torch.Tensor) -> torch.Tensor:
        return self._sum(self.kind(part.shape[0]), part)

    def kind(self, rows: int) -> str:
        """What sums so many rows."""
        for limit, kind in self._crossovers:
            if rows <= limit:
                return kind
        return "nccl"

    def measure(self, cache: Path, time_of: TimeOf, *, pdl: bool = False) -> None:
        """Find the crossovers, or take those of an earlier start on this machine.

        Args:
            cache: File that keeps them.
            time_of: `time_in_graph`.
            pdl: Steps launch kernels before the one ahead of them has ended.
        """
        chosen = self._recall(cache, "", len(MEASURED_ROWS), lambda: self._measure(time_of))
        self._crossovers = []
        for rows, kind in zip(MEASURED_ROWS, chosen, strict=True):
            if rows > self._out.shape[0]:
                break
            if self._crossovers and self._crossovers[-1][1] == KINDS[kind]:
                self._crossovers.pop()
            self._crossovers.append((rows, KINDS[kind]))
        self.name = ", ".join(f"{kind} to {rows} rows" for rows, kind in self._crossovers) or "nccl"
        log.info("all-reduce: %s", self.name)

    def _recall(self, cache: Path, what: str, count: int, measure: Callable[[], list[int]]) -> list[int]:
        """So many numbers of rank 0, on every rank: what the cache has, or what is measured now and kept in it."""
        shape = f"x{self._group.size} {self.partial.shape[1]} {self.partial.dtype}"
        # By what was measured: times of calls outside of graphs, which older versions kept, are those of the host.
        key = f"{torch.cuda.get_device_name()} {shape} in a graph{what}"
        known = _read(cache) if self._group.rank == 0 else {}
        chosen = self._agree(known.get(key, [-1] * count))
        if chosen[0] < 0:
            chosen = self._agree(measure())
            if self._group.rank == 0:
                _keep(cache, {**_read(cache), key: chosen})
        return chosen

    def _agree(self, choices: list[int]) -> list[int]:
        """Rank 0's choices, on every rank."""
        tensor = torch.tensor(choices, dtype=torch.int64, device=self.partial.device)
        dist.broadcast(tensor, src=0)
        return list(tensor.tolist())

    def _measure(self, time_of: TimeOf) -> list[int]:
        """The index of the fastest kind at each of MEASURED_ROWS."""
        best = []
        for rows in MEASURED_ROWS:
            part = self.partial[: min(rows, self._out.shape[0])]
            times = [time_of(partial(self._sum, kind, part)) for kind in KINDS]
            best.append(times.index(min(times)))
            log.info("all-reduce of %d rows: %s us of %s", rows, [round(t, 1) for t in times], KINDS)
        self.partial.zero_()
        return best

    def _sum(self, kind: str, part: torch.Tensor) -> torch.Tensor:
        ops: Any = torch.ops.symm_mem
        if kind == "one_shot":
            out = self._out[: part.shape[0]]
            ops.one_shot_all_reduce_out(part, "sum", self._name, out)
            return out
        if kind == "two_shot":
            ops.two_shot_all_reduce_(part, "sum", self._name)
            return part
        return super().sum(part)


def time_in_graph(call: Callable[[], object]) -> float:
    """Microseconds of a call in a CUDA graph, the median over replays.

    Timed one by one, calls of a few microseconds take as long as the host takes to launch them. Every rank of the process
    group calls this with the same call.
    """
    # Once outside of the graph at least: kernels load, and NCCL connects, which a capture does not allow.
    for _ in range(WARM_UPS):
        call()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    # thread_local: NCCL's watchdog may touch the device meanwhile.
    with torch.cuda.graph(graph, capture_error_mode="thread_local"):
        for _ in range(CALLS):
            call()
    graph.replay()
    torch.cuda.synchronize()
    dist.barrier()
    events = [torch.cuda.Event(enable_timing=True) for _ in range(REPLAYS + 1)]
    events[0].record()
    for event in events[1:]:
        graph.replay()
        event.record()
    torch.cuda.synchronize()
    replays = (begin.elapsed_time(end) for begin, end in itertools.pairwise(events))
    return float(statistics.median(replays)) * 1e3 / CALLS


def _read(cache: Path) -> dict[str, list[int]]:
    """What the file knows; nothing if it cannot be read: it is measured again, and other ranks wait for this one."""
    try:
        known: dict[str, list[int]] = json.loads(cache.read_text())
    except FileNotFoundError:
        return {}
    except (OSError, ValueError) as error:
        log.warning("%s cannot be read, so all-reduce is measured again: %s", cache, error)
        return {}
    return known


def _keep(cache: Path, known: dict[str, list[int]]) -> None:
    """Whole or not at all: stages of the same host read it while they start."""
    new = cache.with_suffix(f".{os.getpid()}")
    try:
        cache.parent.mkdir(parents=True, exist_ok=True)
        new.write_text(json.dumps(known))
        new.replace(cache)
    except OSError as error:
        log.warning("%s cannot be written, so the next start measures all-reduce again: %s", cache, error)
