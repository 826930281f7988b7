"""Memory that the ranks of one host share; see host_exchange for what they do with it."""

from __future__ import annotations

import os
import platform
import sys

PLACE_BYTES = 1 << 20
"""Of a tensor at a time; a longer one goes in pieces."""
LINE_BYTES = 64
"""Between the counters of two ranks, so that they share no cache line."""


def is_available() -> bool:
    """Linux on x86-64: elsewhere the order in which writes become visible would need barriers."""
    return sys.platform == "linux" and platform.machine() == "x86_64"


def num_bytes(size: int) -> int:
    """A counter a rank, then two places a rank."""
    return size * (LINE_BYTES + 2 * PLACE_BYTES)


def create(size: int) -> int:
    """Descriptor of new memory for `size` ranks. It goes when the last process that has it ends."""
    memory = os.memfd_create("stagemesh-ranks")
    os.ftruncate(memory, num_bytes(size))
    return memory
