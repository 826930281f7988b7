"""How the ranks of one host lay down tensors in memory they share, for each other.

gloo sends a tensor through sockets: about a millisecond, twice a layer. Here a rank copies its tensor to its
place, raises its counter, and reads the others' once their counters are there.

A counter is a 32-bit word that goes up by one with each turn and wraps. A rank at turn n + 1 has read what
it wanted of turn n, so two places a rank, used in turns, are enough: whoever writes turn n + 2 has seen
every counter at n + 1. What waits spins for a moment, for the others are rarely far behind, and then sleeps in
the kernel (futex) until the counter moves, so that it keeps no core from who has work.
"""

from __future__ import annotations

import ctypes
import mmap
import time
from collections.abc import Iterator

import torch

from stagemesh.stage.host_memory import LINE_BYTES, PLACE_BYTES, num_bytes

SPINS = 2000
"""Looks at a counter before sleeping: 0.1 to 0.2 ms."""
_NAP_S = 1.0
_FUTEX, _WAIT, _WAKE, _ALL = 202, 0, 1, 1 << 30


class RankLostError(RuntimeError):
    """A rank of the group does not come: it ended, hangs, or makes other calls."""


class _Timespec(ctypes.Structure):
    _fields_ = (("seconds", ctypes.c_long), ("nanoseconds", ctypes.c_long))


class HostExchange:
    """One rank's end.

    Args:
        rank: Of the group.
        size: Ranks in it.
        memory: Descriptor from `host_memory.create(size)`, the same memory for every rank.
        timeout_s: How long a rank waits for another.
    """

    def __init__(self, rank: int, size: int, memory: int, *, timeout_s: float) -> None:
        self._rank = rank
        self._size = size
        self._timeout_s = timeout_s
        self._turn = 0
        self._map = mmap.mmap(memory, num_bytes(size))
        self._counters = memoryview(self._map)[: size * LINE_BYTES].cast("I")
        self._address = ctypes.addressof(ctypes.c_char.from_buffer(self._map))
        # [turn % 2, rank, bytes]
        self._places = torch.frombuffer(self._map, dtype=torch.uint8, offset=size * LINE_BYTES).view(
            2, size, -1
        )
        self._syscall = ctypes.CDLL(None).syscall

    def pieces(self, tensor: torch.Tensor) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        """Piece by piece of a contiguous tensor, every rank's in rank order.

        Yields:
            A piece of `tensor`, flat [n], and all ranks' [size, n] in shared memory, valid until the next.

        Raises:
            RankLostError: A rank did not come within `timeout_s`; it is named.
        """
        step = PLACE_BYTES // tensor.itemsize
        for piece in tensor.view(-1).split(step):
            places = self._places[self._turn % 2, :, : piece.nbytes].view(piece.dtype)
            places[self._rank].copy_(piece)
            self._turn += 1
            self._counters[self._rank * LINE_BYTES // 4] = self._turn & 0xFFFFFFFF
            self._futex(self._rank, _WAKE, _ALL)
            for rank in range(self._size):
                if rank != self._rank:
                    self._await(rank)
            yield piece, places

    def _await(self, rank: int) -> None:
        counters, place, turn = self._counters, rank * LINE_BYTES // 4, self._turn
        for _ in range(SPINS):
            if (counters[place] - turn) & 0x80000000 == 0:
                return
        deadline = time.monotonic() + self._timeout_s
        while (seen := counters[place]) - turn & 0x80000000:
            left = deadline - time.monotonic()
            if left <= 0:
                raise RankLostError(
                    f"rank {rank} did not come to exchange {turn} within {self._timeout_s:g} s; rank {self._rank} waited"
                )
            self._futex(rank, _WAIT, seen, min(left, _NAP_S))

    def _futex(self, rank: int, what: int, value: int, timeout_s: float | None = None) -> None:
        """Sleep while a rank's counter is `value`, or wake who sleeps on it. Sleeping may end early."""
        limit = None
        if timeout_s is not None:
            limit = ctypes.byref(_Timespec(int(timeout_s), int(timeout_s % 1 * 1e9)))
        word = ctypes.c_void_p(self._address + rank * LINE_BYTES)
        self._syscall(
            ctypes.c_long(_FUTEX),
            word,
            ctypes.c_int(what),
            ctypes.c_uint32(value),
            limit,
            None,
            ctypes.c_int(0),
        )
