"""Cores, memory and limits of the process, as the kernel and the container give them."""

from __future__ import annotations

import os
import resource
from pathlib import Path

from stagemesh.client.doctor.finding import Finding, Level
from stagemesh.wire.cgroup import cpu_quota, memory_limit

_MIB, _GIB = 1 << 20, 1 << 30
_LEAST_MEMORY = 2 * _GIB
_LEAST_SHM_GPU = _GIB
_LEAST_FILES = 4096


def check_limits(role: str, *, gpus: bool) -> list[Finding]:
    """What a process of that role has to live with here."""
    findings = [_cores(), _memory(role), _files()]
    if role == "stage":
        findings.append(_shm(gpus))
        if gpus:
            findings.append(_memlock())
    return findings


def _cores() -> Finding:
    cores = len(os.sched_getaffinity(0))
    quota = cpu_quota()
    found = f"{cores} cores" + (f", of which the container may use {quota:g}" if quota else "")
    values = {"cores": cores, "quota": quota}
    if quota is not None and quota < 1:
        todo = "give the container a CPU at least (cpus in compose): less stops a stage in every period of the quota"
        return Finding(check="cores", level=Level.WARN, found=found, todo=todo, values=values)
    return Finding(check="cores", level=Level.OK, found=found, values=values)


def _memory(role: str) -> Finding:
    available = _available_memory()
    limit = memory_limit()
    usable = min(available, limit) if limit else available
    found = f"{available / _GIB:.1f} GiB available" + (f", limit {limit / _GIB:.1f} GiB" if limit else "")
    values = {"available_bytes": available, "limit_bytes": limit}
    if role == "stage" and usable < _LEAST_MEMORY:
        todo = "a stage's process, weights and KV memory need more; see --kv-memory and mem_limit"
        return Finding(check="memory", level=Level.WARN, found=found, todo=todo, values=values)
    return Finding(check="memory", level=Level.OK, found=found, values=values)


def _shm(gpus: bool) -> Finding:
    try:
        stats = os.statvfs("/dev/shm")
    except OSError as error:
        todo = "mount a tmpfs on /dev/shm" if gpus else ""
        level = Level.FAIL if gpus else Level.OK
        return Finding(check="shared memory", level=level, found=f"/dev/shm: {error.strerror}", todo=todo)
    free = stats.f_bavail * stats.f_frsize
    found = f"/dev/shm has {free / _MIB:.0f} MiB free"
    if gpus and free < _LEAST_SHM_GPU:
        todo = "NCCL's queues live there: shm_size: 8g in compose, --shm-size in docker run"
        return Finding(
            check="shared memory", level=Level.WARN, found=found, todo=todo, values={"free_bytes": free}
        )
    return Finding(check="shared memory", level=Level.OK, found=found, values={"free_bytes": free})


def _files() -> Finding:
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    found = f"{soft} open files (may be raised to {hard})"
    if soft < _LEAST_FILES:
        todo = f"ulimit -n {_LEAST_FILES}, or LimitNOFILE= in the unit: every client is a connection"
        return Finding(check="open files", level=Level.WARN, found=found, todo=todo, values={"soft": soft})
    return Finding(check="open files", level=Level.OK, found=found, values={"soft": soft})


def _memlock() -> Finding:
    soft, _ = resource.getrlimit(resource.RLIMIT_MEMLOCK)
    if soft == resource.RLIM_INFINITY:
        return Finding(check="locked memory", level=Level.OK, found="unlimited")
    return Finding(
        check="locked memory",
        level=Level.WARN,
        found=f"{soft / _MIB:.0f} MiB",
        todo="ulimits: memlock: -1 in compose, LimitMEMLOCK=infinity in the unit: pinned memory and RDMA need it",
        values={"soft_bytes": soft},
    )


def _available_memory() -> int:
    for line in Path("/proc/meminfo").read_text().splitlines():
        if line.startswith("MemAvailable:"):
            return int(line.split()[1]) * 1024
    return 0
