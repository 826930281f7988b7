"""The mesh of compose/ as a project of its own: other containers of this engine are left alone."""

from __future__ import annotations

import json
import os
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from compose_commands import CommandError, run
from compose_engine import SEARCH_PATH, docker
from compose_images import ROOT
from compose_packages import find

FOLDER = ROOT / "compose"


class Project:
    """docker-compose with the same files, name and variables each time.

    Args:
        name: Of the project; containers are NAME_SERVICE_1.
        files: In compose/, or paths.
        variables: What .env would say.
    """

    def __init__(self, name: str, files: Sequence[str | Path], variables: Mapping[str, str]) -> None:
        self.name = name
        self.variables = dict(variables)
        self._files = [FOLDER / file for file in files]
        # In place of compose/.env, which is the developer's own.
        self._no_env = tempfile.NamedTemporaryFile(prefix="stagemesh-", suffix=".env")  # noqa: SIM115 - lives as long as this
        self._env = {
            **dict.fromkeys(_variables_in_environment(), ""),
            **variables,
            "PATH": SEARCH_PATH,
            "COMPOSE_DOCKER_CLI_BUILD": "0",
            "COMPOSE_HTTP_TIMEOUT": "180",
        }

    def compose(
        self, *args: str, timeout_s: float = 120.0, check: bool = True, program: str | None = None
    ) -> str:
        """Standard output of a docker-compose command; of Debian's 1.29, or `program`."""
        command: list[str | Path] = [
            program or find("docker-compose") or "docker-compose",
            "--env-file",
            self._no_env.name,
        ]
        command += ["--project-directory", FOLDER, "--project-name", self.name]
        for file in self._files:
            command += ["--file", file]
        return run([*command, *args], timeout_s=timeout_s, env=self._env, check=check).stdout

    def down(self) -> None:
        """Stop and remove its containers and networks, whatever state they are in."""
        self.compose(
            "--profile",
            "client",
            "--profile",
            "observability",
            "down",
            "--timeout",
            "10",
            "--volumes",
            "--remove-orphans",
        )

    def running(self) -> list[str]:
        """Names of its containers that run."""
        label = f"label=com.docker.compose.project={self.name}"
        return docker("ps", "--filter", label, "--format", "{{.Names}}").split()

    def container(self, service: str) -> str:
        """The id of a service's container."""
        return self.compose("ps", "--quiet", service).strip()

    def inspect(self, service: str) -> dict[str, Any]:
        """What the engine knows of it."""
        found: dict[str, Any] = json.loads(docker("inspect", self.container(service)))[0]
        return found

    def address(self, service: str, network: str) -> str:
        """Its IP address on a network."""
        networks = self.inspect(service)["NetworkSettings"]["Networks"]
        return str(networks[f"{self.name}_{network}"]["IPAddress"])

    def run_client(self, *args: str, timeout_s: float = 120.0) -> str:
        """Run a command of the client image on the network of clients; its standard output."""
        return self.compose("run", "--rm", "-T", "client", *args, timeout_s=timeout_s)

    def python(self, service: str, code: str, *args: str, timeout_s: float = 60.0) -> str:
        """Run Python in a service's container; its standard output."""
        return docker("exec", self.container(service), "python", "-c", code, *args, timeout_s=timeout_s)

    def client_python(self, code: str, *args: str, timeout_s: float = 60.0) -> str:
        """Run Python in a client's container."""
        flags = ("run", "--rm", "-T", "--entrypoint", "python", "client", "-c", code)
        return self.compose(*flags, *args, timeout_s=timeout_s)

    def wait_healthy(self, *services: str, timeout_s: float) -> None:
        """Until the engine calls each of them healthy; CommandError with the state they are in."""
        deadline = time.monotonic() + timeout_s
        while states := {name: state for name in services if (state := self._health(name)) != "healthy"}:
            if time.monotonic() > deadline:
                raise CommandError(f"not healthy within {timeout_s:g} s: {states}")
            time.sleep(1.0)

    def logs(self, lines: int = 60) -> str:
        """The last lines of every container, those that ended too; not the receiver's thousands of spans."""
        written = self.compose("logs", "--no-color", "--tail", str(lines), check=False)
        return "\n".join(line for line in written.splitlines() if not line.startswith("receiver"))

    def _health(self, service: str) -> str:
        state = self.inspect(service)["State"]
        return str(state["Health"]["Status"] if state["Running"] and "Health" in state else state["Status"])


def _variables_in_environment() -> list[str]:
    """Those of compose/.env.example that this shell has set: they are not meant for the test."""
    lines = (FOLDER / ".env.example").read_text().splitlines()
    names = {line.lstrip("#").partition("=")[0] for line in lines if "=" in line}
    return sorted(names & set(os.environ))
