"""docs/observability.md names what there is."""

from __future__ import annotations

from pathlib import Path

import pytest

from stagemesh.wire.telemetry.names import Metric, RouterMetric, StageMetric, metrics_of

DOC = Path(__file__).parents[2] / "docs" / "observability.md"
METRICS = [*metrics_of(RouterMetric), *metrics_of(StageMetric)]


@pytest.mark.parametrize("metric", METRICS, ids=[metric.name for metric in METRICS])
def test_every_metric_is_in_the_table(metric: Metric) -> None:
    assert f"| `{metric.prometheus}` | {metric.kind}. {metric.description} |" in DOC.read_text()


def test_the_pictures_are_there() -> None:
    for name in ("top.svg", "timeline.svg"):
        assert f"(images/{name})" in DOC.read_text()
        assert (DOC.parent / "images" / name).read_text().startswith("<svg")
