"""A real Prometheus on this machine, with the configuration that compose/ ships."""

from __future__ import annotations

import json
import subprocess
import time
import urllib.parse
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from compose_commands import CommandError
from compose_mesh import free_port
from compose_packages import find
from compose_project import FOLDER, Project

NAMES = {"router-mesh": "router", "stage-0": "stage-0", "stage-1": "stage-1", "stage-2": "stage-2"}
"""Hosts of prometheus.yml, and whose container each is: this machine does not know the names of a mesh network."""
_START_TIMEOUT_S = 30.0
_ANSWER_TIMEOUT_S = 10.0


class Prometheus:
    """Asks it. Use `prometheus` to have one."""

    def __init__(self, address: str) -> None:
        self._address = address

    def values(self, expression: str) -> dict[tuple[tuple[str, str], ...], float]:
        """The value of each series, by its labels."""
        answer = self._get("query", query=expression)
        return {
            tuple(sorted(series["metric"].items())): float(series["value"][1]) for series in answer["result"]
        }

    def value(self, expression: str) -> float | None:
        """Of an expression with one series at most."""
        values = self.values(expression)
        assert len(values) <= 1, f"{expression} has {len(values)} series"
        return next(iter(values.values()), None)

    def names(self) -> set[str]:
        """Of every metric it has."""
        found: set[str] = set(self._get("label/__name__/values"))
        return found

    def wait(self, expression: str, right: Callable[[float], bool], timeout_s: float = 30.0) -> float:
        """The value of an expression once it is right; CommandError with the last one if it never is."""
        deadline = time.monotonic() + timeout_s
        while (value := self.value(expression)) is None or not right(value):
            if time.monotonic() > deadline:
                raise CommandError(f"{expression} is {value} after {timeout_s:g} s, and not as expected")
            time.sleep(0.5)
        return value

    def _get(self, path: str, **parameters: str) -> Any:
        url = f"http://{self._address}/api/v1/{path}?{urllib.parse.urlencode(parameters)}"
        with urllib.request.urlopen(url, timeout=_ANSWER_TIMEOUT_S) as answer:
            return json.load(answer)["data"]


@contextmanager
def prometheus(mesh: Project, folder: Path) -> Iterator[Prometheus]:
    """Scrapes the mesh as compose/observability/prometheus.yml says, with addresses in place of names."""
    config = (FOLDER / "observability/prometheus.yml").read_text()
    for name, service in NAMES.items():
        assert f'"{name}:' in config
        config = config.replace(f'"{name}:', f'"{mesh.address(service, "mesh")}:')
    (folder / "prometheus.yml").write_text(config)
    (folder / "alerts.yml").write_text((FOLDER / "observability/alerts.yml").read_text())
    address = f"127.0.0.1:{free_port()}"
    flags = [f"--config.file={folder / 'prometheus.yml'}", f"--storage.tsdb.path={folder / 'data'}"]
    with (folder / "log").open("wb") as log:
        process = subprocess.Popen(
            [find("prometheus") or "prometheus", *flags, f"--web.listen-address={address}"],
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=subprocess.STDOUT,
        )
    try:
        _wait_ready(process, address, folder / "log")
        yield Prometheus(address)
    finally:
        process.terminate()
        try:
            process.wait(20)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


def _wait_ready(process: subprocess.Popen[bytes], address: str, log: Path) -> None:
    deadline = time.monotonic() + _START_TIMEOUT_S
    while time.monotonic() < deadline and process.poll() is None:
        try:
            with urllib.request.urlopen(f"http://{address}/-/ready", timeout=2):
                return
        except OSError:
            time.sleep(0.3)
    raise CommandError(f"prometheus does not start: {log.read_text(errors='replace')[-2000:]}")
