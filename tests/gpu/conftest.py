"""Tests on real GPUs: `python -m pytest -m gpu tests/gpu`, or tools/gpu_tests.sh on a bare GPU machine."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

# The processes and calls of the mesh tests are these tests' too.
sys.path.insert(0, str(Path(__file__).parents[1] / "mesh"))

from gpu_mesh import NUM_GPUS, REHEARSAL, GPUMesh, MeshOf
from gpu_reference import Reference, make_model


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if Path(__file__).parent not in item.path.parents:
            continue
        item.add_marker(pytest.mark.gpu)
        need = item.get_closest_marker("gpus")
        wanted = need.args[0] if need else 1
        if wanted > NUM_GPUS:
            item.add_marker(pytest.mark.skip(reason=f"needs {wanted} GPUs, this machine has {NUM_GPUS}"))


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line("markers", "gpus(n): needs n CUDA devices")


@pytest.fixture(scope="session")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Real width, three layers, bfloat16."""
    return make_model(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="session")
def reference(model: Path) -> Iterator[Reference]:
    """The judge of `model`."""
    yield Reference.load(model, torch.bfloat16)
    if not REHEARSAL:
        torch.cuda.empty_cache()


@pytest.fixture(scope="module")
def mesh_of(model: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[MeshOf]:
    """mesh_of(tps, model=..., **options): a ready mesh, one at a time, since GPUs have room for one; the same one again if
    nothing else came between."""
    default = model
    current: list[tuple[str, GPUMesh]] = []

    def get(tps: tuple[int, ...], *, model: Path = default, **options: Any) -> GPUMesh:
        key = repr((tps, model, sorted(options.items())))
        if current and current[-1][0] == key:
            return current[-1][1]
        while current:
            current.pop()[1].close()
        name = "x".join(map(str, tps))
        mesh = GPUMesh(tmp_path_factory.mktemp(f"mesh-{name}"), model, tps, **options)
        current.append((key, mesh))
        mesh.wait_ready()
        return mesh

    yield get
    while current:
        current.pop()[1].close()
