"""The Prometheus of the profile observability, with Debian's program in its image."""

from __future__ import annotations

import json
import shutil
import tempfile
import time
import urllib.parse
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from compose_commands import CommandError
from compose_engine import docker
from compose_packages import find
from compose_project import Project

IMAGE = "stagemesh-prometheus:compose-test"
_DOCKERFILE = """
FROM BASE
COPY prometheus promtool /bin/
RUN mkdir -p /prometheus && chown nobody:nogroup /prometheus
USER nobody
WORKDIR /prometheus
ENTRYPOINT ["/bin/prometheus"]
CMD ["--config.file=/etc/prometheus/prometheus.yml", "--storage.tsdb.path=/prometheus"]
"""
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
def prometheus(mesh: Project) -> Iterator[Prometheus]:
    """The service of the profile observability, with its own configuration, in the mesh's networks; asked on the port that
    compose.yaml publishes."""
    mesh.compose("up", "--detach", "--no-build", "--no-deps", "prometheus")
    address = f"127.0.0.1:{mesh.variables['PROMETHEUS_PORT']}"
    try:
        _wait_ready(address)
        yield Prometheus(address)
    finally:
        mesh.compose("rm", "--stop", "--force", "prometheus")


def prometheus_image(base: str) -> str:
    """Debian's program in the place of prom/prometheus: same paths, same user."""
    with tempfile.TemporaryDirectory(prefix="stagemesh-prometheus-") as folder:
        for program in ("prometheus", "promtool"):
            shutil.copy(find(program) or program, Path(folder, program))
        Path(folder, "Dockerfile").write_text(_DOCKERFILE.replace("BASE", base))
        docker("build", "--quiet", "--tag", IMAGE, folder, timeout_s=120)
    return IMAGE


def _wait_ready(address: str) -> None:
    deadline = time.monotonic() + _START_TIMEOUT_S
    while time.monotonic() < deadline:
        try:
            with urllib.request.urlopen(f"http://{address}/-/ready", timeout=2):
                return
        except OSError:
            time.sleep(0.3)
    raise CommandError(f"prometheus is not ready within {_START_TIMEOUT_S:g} s")
