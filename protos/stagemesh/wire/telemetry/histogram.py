"""Histograms that take many values at once. Needs numpy, and nothing of OpenTelemetry until somebody looks.

The SDK's histogram takes one value at a time, at 5 µs each; a busy router has one for each token.
"""

from __future__ import annotations

import threading
import time
from bisect import bisect_left
from collections import deque
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from stagemesh.wire.telemetry.names import Metric


@dataclass(frozen=True, slots=True)
class Snapshot:
    """A histogram at one moment, all counts of that moment."""

    attributes: dict[str, str]
    bucket_counts: list[int]
    """One more than bounds; not summed up."""
    total: float
    lowest: float
    highest: float

    @property
    def count(self) -> int:
        """Values seen."""
        return sum(self.bucket_counts)


AT_ONCE = 4096
"""Values that wait to be sorted into buckets, at most: sorting a few costs almost what sorting many does."""


class Series:
    """The values under one set of attributes. They are added by one thread, and looked at by any.

    Args:
        bounds: Upper bounds of the buckets, inclusive, rising.
        attributes: Of the series.
    """

    def __init__(self, bounds: tuple[float, ...], attributes: dict[str, str]) -> None:
        self._attributes = attributes
        self._bounds = bounds
        self._edges = np.array(bounds)
        self._counts = np.zeros(len(bounds) + 1, np.int64)
        self._total = 0.0
        self._lowest, self._highest = float("inf"), 0.0
        self._waiting: deque[npt.NDArray[np.float64]] = deque()
        self._num_waiting = 0
        self._sorting = threading.Lock()

    def add(self, value: float) -> None:
        """Take one value."""
        with self._sorting:
            self._counts[bisect_left(self._bounds, value)] += 1
            self._total += value
            self._lowest, self._highest = min(self._lowest, value), max(self._highest, value)

    def add_all(self, values: npt.NDArray[np.float64]) -> None:
        """Take [N] values, which the caller leaves as they are."""
        self._waiting.append(values)
        self._num_waiting += len(values)
        if self._num_waiting >= AT_ONCE or len(self._waiting) >= AT_ONCE:
            self._num_waiting = 0
            self._sort()

    def _sort(self) -> None:
        with self._sorting:
            waiting = [self._waiting.popleft() for _ in range(len(self._waiting))]
            if waiting:
                self._count(np.concatenate(waiting))

    def _count(self, values: npt.NDArray[np.float64]) -> None:
        if not len(values):
            return
        places = np.searchsorted(self._edges, values)
        self._counts += np.bincount(places, minlength=len(self._counts))
        self._total += float(values.sum())
        self._lowest = min(self._lowest, float(values.min()))
        self._highest = max(self._highest, float(values.max()))

    def snapshot(self) -> Snapshot:
        """What it has, for a thread that exports."""
        self._sort()
        counts = self._counts.tolist()
        return Snapshot(
            self._attributes, counts, self._total, self._lowest if any(counts) else 0.0, self._highest
        )


class BulkHistogram:
    """All series of one instrument.

    Args:
        metric: Its name, unit and buckets.
    """

    def __init__(self, metric: Metric) -> None:
        self.metric = metric
        self.started_ns = time.time_ns()
        self._series: dict[tuple[str, ...], Series] = {}

    def of(self, **labels: str) -> Series:
        """The series with these labels, by attribute key: `of(**{Attribute.STAGE: "0"})`; made on first use."""
        key = tuple(labels.values())
        series = self._series.get(key)
        if series is None:
            series = self._series[key] = Series(self.metric.buckets, labels)
        return series

    def snapshots(self) -> list[Snapshot]:
        """Every series now."""
        return [series.snapshot() for series in list(self._series.values())]


class Recent:
    """The newest values of a distribution, for a look at the present.

    Args:
        size: How many.
    """

    def __init__(self, size: int) -> None:
        self._size = size
        self._kept: deque[npt.NDArray[np.float64]] = deque([np.zeros(0)])
        self._count = 0
        """Values in there: enough without the first array."""

    def add_all(self, values: npt.NDArray[np.float64]) -> None:
        """Take [N] values, which the caller leaves as they are; the oldest go."""
        self._kept.append(values)
        self._count += len(values)
        while self._count - len(self._kept[0]) >= self._size:
            self._count -= len(self._kept.popleft())

    def percentiles(self, *percents: float) -> list[float]:
        """Of the values kept; zeros where there are none."""
        kept = np.concatenate(self._kept)[-self._size :]
        return np.percentile(kept, percents).tolist() if len(kept) else [0.0] * len(percents)
