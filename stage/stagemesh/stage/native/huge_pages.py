"""Memory on huge pages, for what every step reads whole: with 4 KiB pages a product waits for their translation."""

from __future__ import annotations

import mmap
import threading
from collections.abc import Sequence

import torch

HUGE_PAGE_BYTES = 2 << 20
CHUNK_BYTES = 32 << 20
ALIGNMENT = 64


class HugePages:
    """Deals out float32 memory that lives as long as the tensors in it. Any thread may ask."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._chunk = torch.empty(0, dtype=torch.uint8)

    def empty(self, shape: Sequence[int]) -> torch.Tensor:
        """A contiguous tensor, a cache line's alignment at least."""
        count = 1
        for size in shape:
            count *= size
        num_bytes = -(-4 * count // ALIGNMENT) * ALIGNMENT
        with self._lock:
            if len(self._chunk) < num_bytes:
                self._chunk = _map(max(num_bytes, CHUNK_BYTES))
            mine, self._chunk = self._chunk[:num_bytes], self._chunk[num_bytes:]
        return mine.view(torch.float32)[:count].view(*shape)


def _map(num_bytes: int) -> torch.Tensor:
    """Untouched memory from the start of a huge page; a machine without them gives small ones."""
    memory = mmap.mmap(-1, num_bytes + HUGE_PAGE_BYTES, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    if hasattr(mmap, "MADV_HUGEPAGE"):
        memory.madvise(mmap.MADV_HUGEPAGE)
    whole = torch.frombuffer(memory, dtype=torch.uint8)
    begin = -whole.data_ptr() % HUGE_PAGE_BYTES
    return whole[begin : begin + num_bytes]
