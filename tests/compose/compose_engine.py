"""A Docker engine: the one that runs, or one started here and stopped at the end."""

from __future__ import annotations

import os
import signal
import subprocess
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from compose_commands import CommandError, run
from compose_packages import find
from compose_parts import say

_START_TIMEOUT_S = 60.0
_STOP_TIMEOUT_S = 60.0
_ORPHAN_TIMEOUT_S = 20.0
_PID_FILES = {
    Path("/var/run/docker.pid"): "dockerd",
    Path("/var/run/docker/containerd/containerd.pid"): "containerd",
}
# Debian's client and engine fit; a newer client elsewhere on the path may want plugins that are not there.
SEARCH_PATH = "/usr/bin:/usr/sbin:/bin:/sbin"


def docker(*args: str | Path, timeout_s: float = 60.0, check: bool = True) -> str:
    """Standard output of a docker command."""
    env = {"DOCKER_BUILDKIT": "0"}  # what docker-compose 1.29 builds with
    return run([find("docker") or "docker", *args], timeout_s=timeout_s, env=env, check=check).stdout


@contextmanager
def engine() -> Iterator[str]:
    """Yields a line about it."""
    if _answers():
        yield f"the Docker engine that runs here, {_about()}"
        return
    with tempfile.TemporaryDirectory(prefix="stagemesh-dockerd-") as folder:
        process = _start(Path(folder))
        try:
            yield f"a Docker engine of our own, {_about()}"
        finally:
            _stop(process)


def _stop(process: subprocess.Popen[bytes]) -> None:
    process.terminate()
    try:
        process.wait(_STOP_TIMEOUT_S)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()


def _start(folder: Path) -> subprocess.Popen[bytes]:
    """dockerd with the machine's iptables, or with the legacy ones where the kernel wants those."""
    _clear_after_a_kill()
    errors = []
    for path in (SEARCH_PATH, f"{_legacy_iptables(folder)}:{SEARCH_PATH}"):
        log = folder / "dockerd.log"
        with log.open("wb") as sink:
            process = subprocess.Popen(
                [find("dockerd") or "dockerd"],
                stdin=subprocess.DEVNULL,
                stdout=sink,
                stderr=subprocess.STDOUT,
                env={**os.environ, "PATH": path},
                start_new_session=True,  # a Ctrl-C ends the containers first, and then it
            )
        deadline = time.monotonic() + _START_TIMEOUT_S
        while time.monotonic() < deadline and process.poll() is None:
            if _answers():
                return process
            time.sleep(0.3)
        _stop(process)
        errors.append("\n".join(log.read_text(errors="replace").splitlines()[-15:]))
        say(f"dockerd did not start with PATH={path}")
    raise CommandError(
        "dockerd does not start; its last lines, with either iptables:\n" + "\n\n".join(errors)
    )


def _clear_after_a_kill() -> None:
    """Forget an engine that was killed: its files name processes that are gone, or whose number another has now."""
    for file, program in _PID_FILES.items():
        pid = file.read_text().strip() if file.exists() else ""
        if not pid.isdigit():
            continue
        try:
            name = Path("/proc", pid, "comm").read_text().strip()
        except OSError:
            name = ""
        if name != program:
            file.unlink()
        elif program == "containerd":  # its engine is gone and cannot end it any more
            os.kill(int(pid), signal.SIGTERM)
            deadline = time.monotonic() + _ORPHAN_TIMEOUT_S
            while Path("/proc", pid).exists() and time.monotonic() < deadline:
                time.sleep(0.1)


def _legacy_iptables(folder: Path) -> Path:
    tools = folder / "legacy"
    tools.mkdir()
    for name in ("iptables", "iptables-save", "iptables-restore", "ip6tables"):
        legacy = find(name.replace("tables", "tables-legacy", 1))
        if legacy:
            (tools / name).symlink_to(legacy)
    return tools


def _answers() -> bool:
    return run([find("docker") or "docker", "info"], timeout_s=20.0, check=False).returncode == 0


def _about() -> str:
    return docker(
        "info", "--format", "{{.ServerVersion}}, storage {{.Driver}}, cgroup v{{.CgroupVersion}}"
    ).strip()
