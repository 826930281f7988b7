"""A mesh of containers, from `up` to `down`."""

from __future__ import annotations

import socket
from collections.abc import Iterator
from contextlib import contextmanager

from compose_images import ROOT
from compose_parts import part, say
from compose_project import Project

SERVICES = ("router", "stage-0", "stage-1", "stage-2")
IMAGES = ("router", "stage", "client")
TAG = "compose-test"
MODEL = ROOT / ".cache/models/SmolLM2-135M-Instruct.Q4_1.gguf"
UP_TIMEOUT_S = 240.0
_running: list[Project] = []


@contextmanager
def running(project: Project, services: tuple[str, ...]) -> Iterator[Project]:
    """A project from `up` to `down`, which comes also when something fails between."""
    project.down()
    assert project.running() == []
    _running.append(project)
    try:
        with part(f"{project.name}: up until healthy"):
            project.compose("up", "--detach", "--no-build", timeout_s=UP_TIMEOUT_S)
            project.wait_healthy(*services, timeout_s=UP_TIMEOUT_S)
        yield project
    except BaseException:
        say(project.logs())
        raise
    finally:
        with part(f"{project.name}: down"):
            project.down()
        if project in _running:
            _running.remove(project)
    assert project.running() == []


def free_port() -> int:
    """A port of this machine that nothing listens on now."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        return int(listener.getsockname()[1])


def take_running() -> list[Project]:
    """The projects that are up, each once: the logs of a failure are shown with the first one only."""
    taken = list(_running)
    _running.clear()
    return taken
