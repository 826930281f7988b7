"""Commands of this machine: run with a deadline, and again where the network may be at fault."""

from __future__ import annotations

import os
import signal
import subprocess
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

from compose_parts import say

_LINES_SHOWN = 40
_PAUSE_S = 10.0


class CommandError(Exception):
    """A command failed; the message has the last lines it wrote."""


def run(
    command: Sequence[str | Path],
    *,
    timeout_s: float,
    env: Mapping[str, str] | None = None,
    cwd: Path | None = None,
    check: bool = True,
) -> subprocess.CompletedProcess[str]:
    """Run it to its end; CommandError if it fails (unless `check` is off) or takes too long."""
    words = [str(word) for word in command]
    process = subprocess.Popen(
        words,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        errors="replace",
        env={**os.environ, **(env or {})},
        cwd=cwd,
        start_new_session=True,
    )
    try:
        stdout, stderr = process.communicate(timeout=timeout_s)
    except BaseException as error:
        # All of its group: what it started holds the pipes, and would be waited for.
        os.killpg(process.pid, signal.SIGKILL)
        stdout, stderr = process.communicate()
        if not isinstance(error, subprocess.TimeoutExpired):
            raise
        raise CommandError(_failure(words, f"took longer than {timeout_s:g} s", stdout + stderr)) from error
    if check and process.returncode != 0:
        raise CommandError(_failure(words, f"exited with code {process.returncode}", stdout + stderr))
    return subprocess.CompletedProcess(words, process.returncode, stdout, stderr)


def run_again(
    command: Sequence[str | Path],
    *,
    timeout_s: float,
    env: Mapping[str, str] | None = None,
    tries: int = 3,
) -> subprocess.CompletedProcess[str]:
    """As `run`, for what fetches something: tried again after a pause."""
    for attempt in range(1, tries + 1):
        try:
            return run(command, timeout_s=timeout_s, env=env)
        except CommandError as error:
            if attempt == tries:
                raise
            say(f"{error}\n(try {attempt} of {tries}; again in {_PAUSE_S:g} s)")
            time.sleep(_PAUSE_S)
    raise AssertionError("tries is at least 1")


def _failure(words: Sequence[str], what: str, written: str) -> str:
    return "\n".join([f"{' '.join(words)} {what}", *written.splitlines()[-_LINES_SHOWN:]])
