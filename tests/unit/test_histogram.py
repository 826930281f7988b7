"""Histograms in bulk count what one value at a time would."""

from __future__ import annotations

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from stagemesh.wire.telemetry.histogram import BulkHistogram, Recent, Series
from stagemesh.wire.telemetry.names import StageMetric

BOUNDS = (0.001, 0.01, 0.5)
VALUES = st.lists(st.sampled_from((0.0, 0.001, 0.0011, 0.01, 0.2, 0.5, 0.6, 9.0)), max_size=30)


@given(values=VALUES)
def test_bulk_and_single_values_give_the_same_buckets(values: list[float]) -> None:
    bulk, single = Series(BOUNDS, {}), Series(BOUNDS, {})
    bulk.add_all(np.array(values))
    for value in values:
        single.add(value)
    assert bulk.snapshot().bucket_counts == single.snapshot().bucket_counts
    assert bulk.snapshot().count == len(values)
    assert np.isclose(bulk.snapshot().total, sum(values))
    below = sum(value <= 0.01 for value in values)
    assert sum(bulk.snapshot().bucket_counts[:2]) == below, "a bound belongs to the bucket below it"


def test_each_set_of_labels_is_a_series() -> None:
    histogram = BulkHistogram(StageMetric.STEP)
    histogram.of(stage="0", part="send").add(0.1)
    histogram.of(stage="1", part="send").add(0.1)
    histogram.of(stage="0", part="send").add(0.2)
    assert {(s.attributes["stage"], s.count) for s in histogram.snapshots()} == {("0", 2), ("1", 1)}


@given(chunks=st.lists(st.lists(st.floats(0, 10), max_size=7), max_size=8))
def test_recent_values_are_the_last_ones(chunks: list[list[float]]) -> None:
    recent = Recent(5)
    for chunk in chunks:
        recent.add_all(np.array(chunk))
    kept = [value for chunk in chunks for value in chunk][-5:]
    expected = np.percentile(kept, (0, 50, 100)).tolist() if kept else [0.0] * 3
    assert np.allclose(recent.percentiles(0, 50, 100), expected)
