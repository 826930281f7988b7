"""The arithmetic and the picture of benchmarks/scaling.py."""

from __future__ import annotations

import importlib
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"


@pytest.fixture
def scaling(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    return importlib.import_module("scaling")


def test_requests_fill_the_memory_twice(scaling: Any) -> None:
    assert scaling.requests_for(541 * 16) == scaling.MIN_REQUESTS
    assert scaling.requests_for(28_256 * 16) == 2 * (28_256 * 16 // 1152)
    assert scaling.requests_for(10**9) == scaling.MAX_REQUESTS


def test_the_picture_has_every_layout(scaling: Any) -> None:
    points = [
        scaling.Point(layout, 500 * (index + 1), 90.5 * (index + 1), 16)
        for index, layout in enumerate(scaling.LAYOUTS)
    ]
    root = ElementTree.fromstring(scaling.picture(points, ("GPU 0: NVIDIA H200 (UUID: x)",)))
    texts = [element.text or "" for element in root.iter() if element.tag.endswith("text")]
    for layout in scaling.LAYOUTS:
        assert texts.count(layout.name) == 2
    assert any("NVIDIA H200" in text for text in texts)
    widths = [float(element.get("width", 0)) for element in root.iter() if element.get("fill") == "#2f6f9f"]
    assert widths[3] == pytest.approx(4 * widths[0], rel=0.01)
