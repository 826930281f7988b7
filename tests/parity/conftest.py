"""Models and meshes of the parity tests, and the line that says what they compared."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from mesh_for_tests import LocalMesh
from models_for_tests import SHAPES, random_model, save_model
from reference import LEDGER, Reference

from stagemesh.model.source import ModelSource, open_model

MeshOf = Callable[..., LocalMesh]


def pytest_configure(config: pytest.Config) -> None:
    # Activations are read where they arrived; the worker's main() says the same.
    config.addinivalue_line("filterwarnings", "ignore:The given buffer is not writable")


def pytest_sessionfinish(session: pytest.Session) -> None:
    """Single divergences are excused where they happen; here, that they are rare."""
    if LEDGER.too_many_excused and session.exitstatus == pytest.ExitCode.OK:
        session.exitstatus = pytest.ExitCode.TESTS_FAILED


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    if LEDGER.num_sequences:
        verdict = " -- FAILED: above 1 % of sequences" if LEDGER.too_many_excused else ""
        terminalreporter.write_line(f"{LEDGER}{verdict}", red=LEDGER.too_many_excused, green=not verdict)


@pytest.fixture(scope="session", autouse=True)
def one_thread() -> Iterator[None]:
    """Products this small are slower on two threads, and the ranks are threads already."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="session")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A folder for each shape."""
    root = tmp_path_factory.mktemp("models")
    return {shape: save_model(random_model(shape), root / shape) for shape in SHAPES}


@pytest.fixture(scope="session")
def references() -> dict[str, Reference]:
    """The judge of each shape."""
    return {shape: Reference(random_model(shape)) for shape in SHAPES}


@pytest.fixture(scope="session")
def sources(folders: dict[str, Path]) -> dict[str, ModelSource]:
    """Each shape as stagemesh reads it."""
    return {shape: open_model(folder) for shape, folder in folders.items()}


@pytest.fixture(scope="session")
def mesh_of(sources: dict[str, ModelSource]) -> Iterator[MeshOf]:
    """mesh_of(shape, tps): one mesh of each kind for the session."""
    meshes: dict[tuple[str, tuple[int, ...], int], LocalMesh] = {}

    def get(shape: str, *tps: int, block_size: int = 8) -> LocalMesh:
        key = (shape, tps, block_size)
        if key not in meshes:
            meshes[key] = LocalMesh(sources[shape], tps, block_size=block_size)
        return meshes[key]

    yield get
    for mesh in meshes.values():
        mesh.close()
