"""What the control group of a container gives the process: a share of the CPUs, and memory."""

from __future__ import annotations

import os
from pathlib import Path

ROOT = Path("/sys/fs/cgroup")
"""Where a container sees its own group, version 2 or 1."""


def usable_cores() -> int:
    """Cores that the process can keep busy: those it may run on, at most the quota's whole ones; 1 at least."""
    cores = len(os.sched_getaffinity(0))
    quota = cpu_quota()
    return cores if quota is None else max(1, min(cores, int(quota)))


def cpu_quota() -> float | None:
    """Cores that the container may use at once; None without a limit."""
    quota, _, period = _read("cpu.max").partition(" ")
    if not period:
        quota, period = _read("cpu/cpu.cfs_quota_us"), _read("cpu/cpu.cfs_period_us")
    if quota.isdigit() and period.isdigit() and int(period):
        return int(quota) / int(period)
    return None


def memory_limit() -> int | None:
    """Bytes; None without a limit."""
    for name in ("memory.max", "memory/memory.limit_in_bytes"):
        text = _read(name)
        if text.isdigit() and int(text) < 1 << 60:  # version 1 says "no limit" by a very large number
            return int(text)
    return None


def _read(name: str) -> str:
    try:
        return (ROOT / name).read_text().strip()
    except OSError:
        return ""
