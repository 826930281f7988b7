"""Models and meshes of real processes; each is started once and shared."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from pathlib import Path

import pytest
from mesh_models import LEDGER, SIMULATED, make_model, save_sharded
from mesh_processes import Service, start_stage
from running_mesh import RunningMesh
from transformers import LlamaForCausalLM

ROOT = Path(__file__).parents[2]


def pytest_sessionfinish(session: pytest.Session) -> None:
    """Single divergences are excused where they happen; here, that they are rare."""
    if LEDGER.too_many_excused and session.exitstatus == pytest.ExitCode.OK:
        session.exitstatus = pytest.ExitCode.TESTS_FAILED


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    if LEDGER.num_sequences:
        verdict = " -- FAILED: above 1 % of sequences" if LEDGER.too_many_excused else ""
        terminalreporter.write_line(f"{LEDGER}{verdict}", red=LEDGER.too_many_excused, green=not verdict)


@pytest.fixture(scope="session")
def reference() -> LlamaForCausalLM:
    """The model of `small`, as transformers runs it."""
    return make_model()


@pytest.fixture(scope="session")
def small(reference: LlamaForCausalLM, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Six layers of 96, sharded."""
    return save_sharded(reference, tmp_path_factory.mktemp("small"))


@pytest.fixture
def shape(tmp_path: Path) -> Path:
    """A model for simulated engines."""
    folder = tmp_path / "shape"
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(SIMULATED))
    return folder


@pytest.fixture(scope="session")
def wide(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One layer of 192, twice as wide as `small`."""
    return save_sharded(make_model(hidden_size=192, num_layers=1), tmp_path_factory.mktemp("wide"))


@pytest.fixture(scope="session")
def mesh(small: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[RunningMesh]:
    """Three stages, the middle one with two ranks; prompts go in chunks of 16."""
    folder = tmp_path_factory.mktemp("mesh")
    flags = ("--step-tokens", "16", "--event-log", str(folder / "events.jsonl"))
    running = RunningMesh(folder, small, (1, 2, 1), router_flags=flags)
    running.wait_ready()
    yield running
    running.close()


@pytest.fixture(scope="session")
def single_mesh(small: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[RunningMesh]:
    """One stage."""
    running = RunningMesh(tmp_path_factory.mktemp("single"), small, (1,))
    running.wait_ready()
    yield running
    running.close()


@pytest.fixture(autouse=True)
def ready_and_idle(request: pytest.FixtureRequest) -> Iterator[None]:
    """A test leaves nothing on the shared meshes, but for a stream that several tests share."""
    yield
    if "neighbour" in request.fixturenames:
        return
    for name in ("mesh", "single_mesh", "tight_mesh"):
        if name in request.fixturenames:
            request.getfixturevalue(name).wait_idle()


@pytest.fixture(scope="session")
def tight_mesh(wide: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[RunningMesh]:
    """One stage with room for 2 running and 2 waiting requests, and 20 KV blocks of 16 tokens."""
    folder = tmp_path_factory.mktemp("tight")
    limits = ("--max-sequences", "2", "--max-waiting", "2", "--step-tokens", "512")
    running = RunningMesh(folder, wide, (1,), stage_flags=("--kv-memory", "122880"), router_flags=limits)
    running.wait_ready()
    yield running
    running.close()


@pytest.fixture(scope="session")
def lone_stage(wide: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Service]:
    """A ready stage without a router."""
    stage = start_stage(tmp_path_factory.mktemp("lone"), wide, 0, 1, flags=("--kv-memory", "1MiB"))
    stage.said("loaded in")
    yield stage
    stage.kill()


@pytest.fixture(scope="session")
def demo_model() -> Path:
    """SmolLM2-135M-Instruct, with tokenizer and chat template."""
    name = "SmolLM2-135M-Instruct.Q4_1.gguf"
    given = [Path(path)] if (path := os.environ.get("STAGEMESH_DEMO_MODEL")) else []
    for found in (*given, *(ROOT / ".cache" / "models").rglob(name)):
        if found.is_file():
            return found
    pytest.fail("no demo model: run make model, or set STAGEMESH_DEMO_MODEL to its path")
