"""A child process of `stagemesh up`."""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
from collections import deque
from collections.abc import Callable, Mapping
from dataclasses import dataclass

_LINES_KEPT = 10
_DRAIN_S = 0.5


@dataclass(frozen=True, slots=True, kw_only=True)
class ChildSpec:
    """What to start."""

    name: str
    """Before its lines: "stage 1", "router"."""
    args: tuple[str, ...]
    """The command line."""


class Child:
    """One run of a command, in a session and process group of its own: a Ctrl-C here does not reach it.

    Start it from the main thread; the kernel takes that thread's end for ours (`die_with_parent`).
    """

    def __init__(
        self, spec: ChildSpec, process: asyncio.subprocess.Process, on_line: Callable[[str, str], None]
    ) -> None:
        self.spec = spec
        self.last_lines: deque[str] = deque(maxlen=_LINES_KEPT)
        self._process = process
        self._on_line = on_line
        self._pump = asyncio.create_task(self._read_lines())

    @classmethod
    async def start(
        cls, spec: ChildSpec, *, env: Mapping[str, str], on_line: Callable[[str, str], None]
    ) -> Child:
        """Start it; `on_line(name, line)` gets what it writes to either stream."""
        process = await asyncio.create_subprocess_exec(
            *spec.args,
            stdin=asyncio.subprocess.DEVNULL,
            stdout=asyncio.subprocess.PIPE,
            stderr=asyncio.subprocess.STDOUT,
            start_new_session=True,
            env=env,
        )
        return cls(spec, process, on_line)

    @property
    def pid(self) -> int:
        """Its process id, and that of its group."""
        return self._process.pid

    @property
    def ending(self) -> str:
        """How it ended: "exited with code 1", "was killed by SIGKILL"."""
        code = self._process.returncode
        if code is None:
            return "runs"
        if code < 0:
            with contextlib.suppress(ValueError):
                return f"was killed by {signal.Signals(-code).name}"
        return f"exited with code {code}"

    async def wait(self) -> None:
        """Until it ended and its last lines are read (a grandchild may hold the pipe: not for ever)."""
        await self._process.wait()
        await asyncio.wait([self._pump], timeout=_DRAIN_S)

    def terminate(self) -> None:
        """Ask it to end; it ends its own children."""
        if self._process.returncode is None:
            with contextlib.suppress(ProcessLookupError):
                self._process.terminate()

    def kill(self) -> None:
        """End it and its whole group, now."""
        if self._process.returncode is None:  # not reaped, so the id is still its own
            with contextlib.suppress(ProcessLookupError):
                os.killpg(self.pid, signal.SIGKILL)

    async def _read_lines(self) -> None:
        stream = self._process.stdout
        assert stream is not None  # asked for in start
        rest = b""
        while data := await stream.read(1 << 16):
            *lines, rest = (rest + data).split(b"\n")
            for line in lines:
                self._emit(line)
        if rest:
            self._emit(rest)

    def _emit(self, line: bytes) -> None:
        text = line.decode(errors="replace").rstrip("\r")
        if text:
            self.last_lines.append(text)
            self._on_line(self.spec.name, text)
