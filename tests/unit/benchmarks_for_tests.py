"""The scripts of benchmarks/, which import each other from their own folder."""

from __future__ import annotations

import importlib
from pathlib import Path
from typing import Any

import pytest

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"


def import_benchmark(monkeypatch: pytest.MonkeyPatch, name: str) -> Any:
    """The module; the folder is on the path for as long as the test runs."""
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    return importlib.import_module(name)
