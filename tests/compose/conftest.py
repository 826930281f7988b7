"""An engine, the images, and the mesh of compose/compose.yaml: each made once, taken down whatever happens."""

from __future__ import annotations

import shutil
import signal
from collections.abc import Iterator
from pathlib import Path
from types import FrameType

import pytest
from compose_engine import engine
from compose_images import base_image, build_image, size_mb
from compose_mesh import IMAGES, MODEL, SERVICES, TAG, free_port, running, take_running
from compose_packages import install_missing
from compose_parts import part, say, summary
from compose_project import Project
from compose_prometheus import prometheus_image


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    for line in summary():
        terminalreporter.write_line(line)


@pytest.hookimpl(hookwrapper=True)
def pytest_runtest_makereport(item: pytest.Item, call: pytest.CallInfo[None]) -> Iterator[None]:
    """What the containers said, under the first failure."""
    outcome = yield
    report = outcome.get_result()  # type: ignore[attr-defined]
    if report.failed:
        for project in take_running():
            report.sections.append((f"containers of {project.name}", project.logs()))


FOLDER = Path(__file__).parent


@pytest.fixture(scope="session")
def docker_engine() -> Iterator[str]:
    def interrupt(number: int, frame: FrameType | None) -> None:
        raise KeyboardInterrupt

    # A plain kill takes everything down too, as Ctrl-C does.
    signal.signal(signal.SIGTERM, interrupt)
    with part("Debian packages"):
        installed = install_missing()
    say(f"installed {', '.join(installed)}" if installed else "all were there")
    with engine() as about:
        say(about)
        yield about


@pytest.fixture(scope="session")
def images(docker_engine: str) -> dict[str, str]:
    """The bases, as variables of the compose files; the three images are built."""
    with part("base image (debootstrap)"):
        base = base_image()
    with part("wheels and the image to build on"):
        build = build_image(base)
    variables = {"BASE_IMAGE": base, "BUILD_IMAGE": build, "STAGEMESH_TAG": TAG}
    for name in IMAGES:
        with part(f"build of {name}"):
            service = "stage-0" if name == "stage" else name
            Project("stagemesh-build", ["compose.yaml"], variables).compose("build", service, timeout_s=900)
        say(f"stagemesh-{name}: {size_mb(f'stagemesh-{name}:{TAG}'):.0f} MB")
    return variables


@pytest.fixture(scope="session")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The demo model, readable by the containers' user."""
    if MODEL.stat().st_mode & 0o004:
        return MODEL
    copy = tmp_path_factory.mktemp("model") / MODEL.name
    shutil.copyfile(MODEL, copy)
    copy.chmod(0o644)
    return copy


@pytest.fixture(scope="session")
def mesh(images: dict[str, str], model: Path) -> Iterator[Project]:
    """compose.yaml as it is shipped, up and healthy; the receiver of traces beside it."""
    variables = {**images, "MODEL": str(model), "ROUTER_PORT": str(free_port())}
    variables["OTLP_ENDPOINT"] = "http://receiver:4317"
    variables["PROMETHEUS_PORT"] = str(free_port())
    variables["PROMETHEUS_IMAGE"] = prometheus_image(images["BASE_IMAGE"])
    project = Project("stagemesh-test", ["compose.yaml", FOLDER / "receiver.yaml"], variables)
    with running(project, SERVICES):
        yield project
