"""Which batch sizes decode graphs are captured for, and which of them takes a step. Pure arithmetic."""

from __future__ import annotations

from bisect import bisect_left

STEPS = ((16, 8), (64, 16), (128, 32), (256, 64), (512, 128))
"""Up to a size, one bucket every so many rows; below 8: powers of two. More rows past a bucket's end cost a
few microseconds each, one more graph costs its capture at every start."""


def graph_buckets(max_rows: int) -> tuple[int, ...]:
    """Ascending bucket sizes up to max_rows, which is one itself."""
    sizes = {1, 2, 4, 8}
    size = 8
    for limit, width in STEPS:
        while size < limit:
            size += width
            sizes.add(size)
    while size < max_rows:
        size += STEPS[-1][1]
        sizes.add(size)
    return (*sorted(size for size in sizes if size < max_rows), max_rows)


def bucket_for(buckets: tuple[int, ...], rows: int) -> int | None:
    """The smallest bucket that takes so many rows; None if none does."""
    at = bisect_left(buckets, rows)
    return buckets[at] if at < len(buckets) else None
