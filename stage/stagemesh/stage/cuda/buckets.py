"""Which sizes of steps graphs are captured for, and which of them takes a step. Pure arithmetic."""

from __future__ import annotations

from bisect import bisect_left

STEPS = ((16, 8), (64, 16), (512, 32))
"""Up to a size, one bucket every so many rows; below 8: powers of two. Above 256 rows, where products are bound by
arithmetic, a row of padding costs 17 us over 16 layers of an 8B shape on an H100; a graph costs 40 ms at every start."""
SECTION_STEPS = ((512, 64), (1024, 128))
"""The same for positions of a step with prefill. Of more than 1,024 the device takes longer than the host does
to launch it kernel by kernel."""


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


def section_buckets(max_tokens: int) -> tuple[int, ...]:
    """Ascending sizes of steps with prefill, up to max_tokens or as far as graphs pay."""
    sizes, size = [], 0
    for limit, width in SECTION_STEPS:
        while size < limit:
            size += width
            sizes.append(size)
    return tuple(size for size in sizes if size <= max_tokens) or (max_tokens,)


def bucket_for(buckets: tuple[int, ...], rows: int) -> int | None:
    """The smallest bucket that takes so many rows; None if none does."""
    at = bisect_left(buckets, rows)
    return buckets[at] if at < len(buckets) else None
