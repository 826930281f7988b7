"""Memory of processes as Linux counts it."""

from __future__ import annotations

from pathlib import Path


def pss_mib(pid: int) -> float:
    """Proportional set size: a page shared by n processes counts 1/n."""
    for line in Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines():
        if line.startswith("Pss:"):
            return int(line.split()[1]) / 1024
    raise RuntimeError(f"/proc/{pid}/smaps_rollup has no Pss line")


def children(pid: int) -> list[int]:
    """Processes it has started and that still run."""
    return [
        int(child)
        for task in Path(f"/proc/{pid}/task").iterdir()
        for child in (task / "children").read_text().split()
    ]
