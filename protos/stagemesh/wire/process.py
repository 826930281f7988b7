"""Life and death of child processes."""

from __future__ import annotations

import ctypes
import gc
import logging
import os
import platform
import signal
import struct
import sys

log = logging.getLogger(__name__)

_PR_SET_PDEATHSIG = 1
_SCHED_SETATTR = {"x86_64": 314, "aarch64": 274}
"""Numbers of the system call; older C libraries have no function for it."""
_SCHED_ATTR = struct.Struct("<IIQiIQQQ")
"""size, policy, flags, nice, priority, runtime, deadline, period."""


def settle() -> None:
    """What a process has loaded by now stays: the garbage collector need not walk it again and again, which
    takes it tens of milliseconds at moments of its own choice."""
    gc.collect()
    gc.freeze()


def die_with_parent(parent_pid: int | None = None, signum: int = signal.SIGKILL) -> None:
    """Have the kernel send this process `signum` when the process that started it ends, however it ends.

    Called by the child as early as it can. Linux only; elsewhere it does nothing. The kernel watches the
    parent's *thread* that forked, so parents start their children from a thread that lives as long as they.

    Args:
        parent_pid: The parent as the parent knows itself. If it is gone already, this process ends now;
            without it, that gap between fork and this call cannot be seen.
        signum: The signal to get.
    """
    if not sys.platform.startswith("linux"):
        log.debug("PR_SET_PDEATHSIG is Linux's alone; children may outlive this parent on %s", sys.platform)
        return
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.prctl(_PR_SET_PDEATHSIG, int(signum), 0, 0, 0) != 0:
        log.debug("prctl(PR_SET_PDEATHSIG): %s", os.strerror(ctypes.get_errno()))
        return
    if parent_pid is not None and os.getppid() != parent_pid:
        os.kill(os.getpid(), signum)


def take_short_slices(nanoseconds: int) -> None:
    """Let this thread run for so long at a time where others want its processor, and be let in the sooner for it.

    A thread that wakes up for a moment's work often, and whom others wait for, otherwise waits until whoever runs
    has had the whole of its slice: some milliseconds. Its share of the processor stays what it is, and no privilege
    is needed. Linux from 6.12; older kernels ignore it, elsewhere it does nothing.
    """
    number = _SCHED_SETATTR.get(platform.machine())
    if number is None or not sys.platform.startswith("linux"):
        log.debug("no time slices of a thread's own on %s %s", sys.platform, platform.machine())
        return
    nice = os.getpriority(os.PRIO_PROCESS, 0)
    attributes = _SCHED_ATTR.pack(_SCHED_ATTR.size, os.SCHED_OTHER, 0, nice, 0, nanoseconds, 0, 0)
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.syscall(number, 0, attributes, 0) != 0:
        log.debug("sched_setattr: %s", os.strerror(ctypes.get_errno()))
