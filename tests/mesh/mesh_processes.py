"""Stages and routers as child processes, each with its log in a file. Every wait has an end."""

from __future__ import annotations

import contextlib
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TypeVar

START_TIMEOUT_S = 90.0
STOP_TIMEOUT_S = 60.0
PATIENCE_S = 30.0
"""How long a stage may be silent: a busy machine keeps it so for longer than the router's default allows."""
POLL_S = 0.02
T = TypeVar("T")


class Service:
    """A `stagemesh` command that serves until it is told to stop.

    Args:
        name: For messages and the log's file name.
        args: Of `stagemesh`.
        folder: Where the log goes.
        prefix: A command that runs the rest of its line in its own place.
    """

    def __init__(self, name: str, args: Sequence[str], folder: Path, prefix: Sequence[str] = ()) -> None:
        self.name = name
        self.log = folder / f"{name}-{time.monotonic_ns()}.log"
        # The children must not outlive the tests, however these end.
        environment = {**os.environ, "STAGEMESH_PDEATHSIG": str(os.getpid())}
        with self.log.open("w") as log:
            self.process = subprocess.Popen(
                [*prefix, sys.executable, "-m", "stagemesh.client.cli", *args],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                env=environment,
            )

    @property
    def pid(self) -> int:
        return self.process.pid

    def children(self) -> list[int]:
        """Process ids of its living children."""
        found = []
        for task in Path(f"/proc/{self.pid}/task").glob("*/children"):
            with contextlib.suppress(OSError):
                found += [int(pid) for pid in task.read_text().split()]
        return found

    def said(self, pattern: str, timeout_s: float = START_TIMEOUT_S) -> re.Match[str]:
        """Wait for a line of the log."""

        def look() -> re.Match[str] | None:
            if match := re.search(pattern, self.log.read_text()):
                return match
            assert self.process.poll() is None, f"{self.name} ended:\n{self.log.read_text()}"
            return None

        return wait_for(look, f"'{pattern}' in the log of {self.name}", timeout_s)

    def signal(self, number: int) -> None:
        self.process.send_signal(number)

    def stop(self) -> int:
        """Ask it to leave, as an operator does; returns the exit code, and prints the log if that is not 0."""
        if self.process.poll() is None:
            self.signal(signal.SIGTERM)
        code = self.process.wait(STOP_TIMEOUT_S)
        if code:
            print(f"{self.name} ended with {code}:\n{self.log.read_text()}")
        return code

    def kill(self) -> None:
        """For the end of a test: no questions asked."""
        self.process.kill()
        self.process.wait(STOP_TIMEOUT_S)


def wait_for(look: Callable[[], T | None], what: str, timeout_s: float = 60.0) -> T:
    """The first result of `look` that is true."""
    deadline = time.monotonic() + timeout_s
    while True:
        if result := look():
            return result
        assert time.monotonic() < deadline, f"{what} did not come within {timeout_s:g} s"
        time.sleep(POLL_S)


def is_alive(pid: int) -> bool:
    """Whether a process runs (a zombie does not)."""
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except OSError:
        return False
    return state not in "ZX"


def start_stage(
    folder: Path,
    model: Path,
    index: int,
    count: int,
    *,
    tp: int = 1,
    listen: str = "127.0.0.1:0",
    flags: Sequence[str] = (),
    prefix: Sequence[str] = (),
) -> Service:
    """`stagemesh stage`; it listens soon, and is ready later."""
    args = [
        "stage",
        "--model",
        str(model),
        "--stage",
        f"{index}/{count}",
        "--tp",
        str(tp),
        "--listen",
        listen,
    ]
    return Service(f"stage{index}", [*args, "--threads", "1", "--shared-cores", *flags], folder, prefix)


def start_router(folder: Path, model: Path, addresses: Sequence[str], flags: Sequence[str] = ()) -> Service:
    """`stagemesh router` on free ports, patient with stages unless the flags say how long to wait for a heartbeat."""
    stages = [part for address in addresses for part in ("--stage", address)]
    ports = ["--listen", "127.0.0.1:0", "--admin", "127.0.0.1:0"]
    heartbeat = () if "--heartbeat-timeout-s" in flags else ("--heartbeat-timeout-s", str(PATIENCE_S))
    return Service("router", ["router", "--model", str(model), *stages, *ports, *heartbeat, *flags], folder)


def address_of(stage: Service) -> str:
    """Where a stage listens."""
    return stage.said(r"listening on (\S+)").group(1)
