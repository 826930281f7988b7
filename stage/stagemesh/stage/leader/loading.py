"""What a stage shows while it loads, and the one line it ends with."""

from __future__ import annotations

import logging
import sys
import time
from types import TracebackType

from stagemesh.stage.config import StageConfig
from stagemesh.stage.engine.interface import RankFacts
from stagemesh.stage.plan import StagePlan

log = logging.getLogger(__name__)

MIB = 1 << 20
LINE_INTERVAL_S = 2.0


class LoadDisplay:
    """A progress bar on a terminal, a line now and then in a pipe."""

    def __init__(self, name: str) -> None:
        self._name = name
        self._last_line = time.monotonic()
        self._bar = None
        if sys.stderr.isatty():
            from rich.console import Console
            from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeElapsedColumn

            self._bar = Progress(
                TextColumn("{task.description}"),
                BarColumn(),
                DownloadColumn(binary_units=True),
                TimeElapsedColumn(),
                console=Console(stderr=True),
                transient=True,
            )
            self._task = self._bar.add_task(f"{name} loading", total=None)

    def update(self, what: str, done: int, total: int) -> None:
        """What is loaded ("weights", in bytes) or captured ("graphs"), over all ranks."""
        if self._bar:
            self._bar.update(self._task, completed=done, total=total, description=f"{self._name} {what}")
        elif time.monotonic() - self._last_line >= LINE_INTERVAL_S:
            self._last_line = time.monotonic()
            if what == "weights":
                log.info("loading: %d of %d MiB", done // MIB, total // MIB)
            else:
                log.info("%s: %d of %d", what, done, total)

    def __enter__(self) -> LoadDisplay:
        if self._bar:
            self._bar.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._bar:
            self._bar.stop()


def load_line(plan: StagePlan, facts: list[RankFacts], config: StageConfig) -> str:
    """Layers, heads and bytes of each rank, seconds by phase, KV blocks, threads."""
    ranks = ", ".join(
        f"rank {fact.rank}: {fact.num_heads}/{fact.num_kv_heads} heads/KV heads, {fact.weight_bytes / MIB:.0f} MiB"
        for fact in facts
    )
    if not sum(sum(fact.load_seconds.values()) for fact in facts):
        return f"layers {plan.layers.start}:{plan.layers.stop} simulated, cost {config.cost}; {plan.num_blocks} KV blocks"
    slowest = max(facts, key=lambda fact: sum(fact.load_seconds.values()))
    phases = ", ".join(f"{phase} {seconds:.1f}" for phase, seconds in slowest.load_seconds.items())
    backends = "".join(f"; {what}: {backend}" for what, backend in facts[0].backends.items())
    return (
        f"layers {plan.layers.start}:{plan.layers.stop} of {plan.source.config.num_layers} on {facts[0].device} "
        f"({plan.dtype}); {ranks}; loaded in {sum(slowest.load_seconds.values()):.1f} s ({phases}); "
        f"{plan.num_blocks} KV blocks of {config.block_size} tokens; {config.num_threads} threads a rank{backends}"
    )
