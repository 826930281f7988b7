"""Processor time of processes as Linux counts it."""

from __future__ import annotations

import os
from pathlib import Path

TICKS_PER_S = os.sysconf("SC_CLK_TCK")


def cpu_s(pid: int) -> float:
    """User and system time of all threads of a process so far, seconds, to 0.01."""
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / TICKS_PER_S


def command_of(pid: int) -> str:
    """Its command line, words apart by spaces."""
    return Path(f"/proc/{pid}/cmdline").read_text().replace("\0", " ").strip()


def descendants(pid: int) -> list[int]:
    """Every process below it that still runs."""
    found: list[int] = []
    open_pids = [pid]
    while open_pids:
        for task in Path(f"/proc/{open_pids.pop()}/task").glob("*/children"):
            try:
                below = [int(child) for child in task.read_text().split()]
            except OSError:  # it ended meanwhile
                continue
            found += below
            open_pids += below
    return found
