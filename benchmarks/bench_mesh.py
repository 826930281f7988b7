"""A mesh on this machine for a benchmark: `stagemesh up` as a child process."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

START_TIMEOUT_S = 180.0
STOP_TIMEOUT_S = 30.0


@dataclass(frozen=True, slots=True, kw_only=True)
class RunningMesh:
    """Where it listens, and how long it took."""

    listen: str
    admin: str
    up_pid: int
    ready_s: float
    """Seconds from the command to ready."""


@contextmanager
def running_mesh(
    model: str, *options: str, log: Path | None = None, start_timeout_s: float = START_TIMEOUT_S
) -> Iterator[RunningMesh]:
    """Start `stagemesh up MODEL OPTIONS` on free ports; stop it at the end. What it says goes to `log`."""
    with tempfile.TemporaryDirectory() as folder:
        ready = Path(folder) / "ready.json"
        log = log or Path(folder) / "log"
        command = [sys.executable, "-m", "stagemesh.client.cli", "up", model, "--ready-file", str(ready)]
        ports = ["--listen", "127.0.0.1:0", "--admin", "127.0.0.1:0", "--stage-port", "0"]
        began = time.monotonic()
        with log.open("w") as out:
            process = subprocess.Popen([*command, *ports, *options], stdout=out, stderr=out)
        try:
            while not ready.exists():
                if process.poll() is not None or time.monotonic() - began > start_timeout_s:
                    raise RuntimeError(f"the mesh did not start:\n{log.read_text()[-4000:]}")
                time.sleep(0.05)
            ready_s = time.monotonic() - began
            facts = json.loads(ready.read_text())
            yield RunningMesh(
                listen=facts["listen"], admin=facts["admin"], up_pid=process.pid, ready_s=ready_s
            )
        finally:
            process.send_signal(signal.SIGINT)
            try:
                process.wait(STOP_TIMEOUT_S)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
