"""What a process asks of the kernel for itself."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

from stagemesh.wire import process

SCHED_OTHER_AND_SLICE = """
import ctypes, os, struct
from stagemesh.wire.process import take_short_slices
os.nice(3)
take_short_slices(100_000)
have = ctypes.create_string_buffer(48)
assert ctypes.CDLL(None).syscall({get}, 0, have, 48, 0) == 0
print(os.sched_getscheduler(0), os.getpriority(os.PRIO_PROCESS, 0), struct.unpack("<IIQiIQQQ", have.raw)[5])
"""
_SCHED_GETATTR = {"x86_64": 315, "aarch64": 275}


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="Linux alone has slices of a thread's own")
def test_a_short_slice_changes_neither_policy_nor_niceness() -> None:
    number = _SCHED_GETATTR.get(os.uname().machine)
    if number is None:
        pytest.skip(f"the call's number on {os.uname().machine} is not known here")
    done = subprocess.run(
        [sys.executable, "-c", SCHED_OTHER_AND_SLICE.format(get=number)],
        capture_output=True,
        text=True,
        check=True,
    )
    policy, nice, slice_ns = map(int, done.stdout.split())
    assert (policy, nice) == (os.SCHED_OTHER, os.getpriority(os.PRIO_PROCESS, 0) + 3)
    assert slice_ns in (0, 100_000)  # kernels before 6.12 do not know it


def test_without_the_call_nothing_happens(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(process.platform, "machine", lambda: "vax")
    process.take_short_slices(100_000)
