"""Life and death of child processes."""

from __future__ import annotations

import ctypes
import gc
import logging
import os
import signal
import sys

log = logging.getLogger(__name__)

_PR_SET_PDEATHSIG = 1


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
