"""The arithmetic and the picture of benchmarks/scaling.py."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest
from benchmarks_for_tests import import_benchmark

from stagemesh.stage.gpus import Gpu


@pytest.fixture
def scaling(monkeypatch: pytest.MonkeyPatch) -> Any:
    return import_benchmark(monkeypatch, "scaling")


def test_requests_fill_the_memory_twice(scaling: Any) -> None:
    assert scaling.requests_for(541 * 16) == scaling.MIN_REQUESTS
    assert scaling.requests_for(28_256 * 16) == 2 * (28_256 * 16 // 1152)
    assert scaling.requests_for(10**9) == scaling.MAX_REQUESTS


def test_the_picture_has_every_layout(scaling: Any) -> None:
    points = [
        scaling.Point(layout, 500 * (index + 1), 90.5 * (index + 1), 16)
        for index, layout in enumerate(scaling.LAYOUTS)
    ]
    shape = scaling.shape_of("llama-3.1-70b", Path("unused"))
    root = ElementTree.fromstring(scaling.picture(points, ("GPU 0: NVIDIA H200 (UUID: x)",), shape))
    texts = [element.text or "" for element in root.iter() if element.tag.endswith("text")]
    for layout in scaling.LAYOUTS:
        assert texts.count(layout.name) == 2
    assert any("NVIDIA H200" in text for text in texts)
    widths = [float(element.get("width", 0)) for element in root.iter() if element.get("fill") == "#2f6f9f"]
    assert widths[3] == pytest.approx(4 * widths[0], rel=0.01)


@pytest.mark.parametrize(
    ("gib", "whole"), [pytest.param(79.18, False, id="H100"), pytest.param(139.8, True, id="H200")]
)
def test_a_gpu_gets_as_many_layers_as_it_holds(
    gib: float, whole: bool, scaling: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    gpu = Gpu(0, "a GPU", int(gib * (1 << 30)))
    monkeypatch.setattr("stagemesh.stage.plan.list_gpus", lambda: (gpu,))
    shape = scaling.barely_fitting("llama-3.1-70b", tmp_path, share=0.975, step_tokens=2048)
    blocks = scaling.blocks_of(shape, share=0.975, step_tokens=2048)
    assert (shape.layers == 80) == whole
    if whole:
        return
    assert blocks >= scaling.CUT_BLOCKS
    assert f"cut to {shape.layers} of 80 layers" in shape.told
    assert json.loads((shape.folder / "config.json").read_text())["num_hidden_layers"] == shape.layers
    one_more = scaling.shape_of("llama-3.1-70b", tmp_path, layers=shape.layers + 1)
    assert scaling.blocks_of(one_more, share=0.975, step_tokens=2048) < scaling.CUT_BLOCKS
