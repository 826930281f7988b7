"""What can be said of compose/ without an engine; make compose-test starts it for real."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import yaml

COMPOSE = Path(__file__).parents[2] / "compose"
FILES = sorted(COMPOSE.glob("*.yaml"))
DOCKERFILES = [COMPOSE / f"Dockerfile.{name}" for name in ("router", "stage", "client")]


def read(file: Path) -> dict[str, Any]:
    content: dict[str, Any] = yaml.safe_load(file.read_text())
    return content


def requirements(*extras: str) -> list[str]:
    command = [sys.executable, str(COMPOSE / "requirements.py"), *extras]
    lines = subprocess.run(command, check=True, capture_output=True, text=True).stdout.splitlines()
    return [re.split(r"[<>=\[]", line)[0] for line in lines]


def test_router_and_client_install_no_torch() -> None:
    assert "torch" in requirements("stage")
    assert {"torch", "cupy-cuda13x"} <= set(requirements("cuda"))
    assert "grpcio" in requirements()
    assert "torch" not in requirements()
    assert "torch" not in requirements("router")


def test_an_unknown_extra_is_named() -> None:
    command = [sys.executable, str(COMPOSE / "requirements.py"), "nothing"]
    done = subprocess.run(command, check=False, capture_output=True, text=True)
    assert done.returncode == 1
    assert "no extra 'nothing'" in done.stderr


def test_every_variable_is_in_the_example_and_no_other() -> None:
    """With its default: what the example says in a comment is what happens without it."""
    used: dict[str, set[str]] = {}
    for file in FILES:
        for name, operator, default in re.findall(r"\$\{(\w+)(:[-?])?([^}]*)\}", file.read_text()):
            used.setdefault(name, set()).update({default} if operator == ":-" and default else set())
    documented = dict(re.findall(r"^#?([A-Z][A-Z0-9_]+)=(.*)$", (COMPOSE / ".env.example").read_text(), re.M))
    assert set(used) == set(documented)
    assert {name: values for name, values in used.items() if values and values != {documented[name]}} == {}


def test_only_the_router_is_on_both_networks() -> None:
    services = read(COMPOSE / "compose.yaml")["services"]
    networks = {name: set(service["networks"]) for name, service in services.items()}
    for name in ("router", "client", "stage-0", "stage-1", "stage-2"):
        edge, mesh = name in ("router", "client"), name != "client"
        assert networks[name] == ({"edge"} if edge else set()) | ({"mesh"} if mesh else set())
    assert read(COMPOSE / "compose.yaml")["networks"]["mesh"] == {"internal": True}


def test_the_dockerfiles_share_their_first_stage() -> None:
    """Word for word, so that the engine builds it once."""
    heads = {
        file.read_text().partition("ARG BASE_IMAGE")[2].partition(" AS requirements")[0]
        for file in DOCKERFILES
    }
    assert len(heads) == 1
