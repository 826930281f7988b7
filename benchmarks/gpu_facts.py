"""Facts of a run: when, of which commit, on which GPUs."""

from __future__ import annotations

import subprocess
from dataclasses import dataclass

from checkout import commit, utc_now


@dataclass(frozen=True, slots=True, kw_only=True)
class Facts:
    """Of the machine and the tree."""

    commit: str
    gpus: tuple[str, ...]
    """As nvidia-smi -L lists them, with their UUIDs: rows of one lease have the same."""

    def told(self) -> dict[str, object]:
        """Commit, time and GPUs, for a report's object."""
        return {"commit": self.commit, "utc": utc_now(), "gpus": list(self.gpus)}


def read_facts() -> Facts:
    """Asks git and nvidia-smi."""
    return Facts(commit=commit() or "unknown", gpus=tuple(_output("nvidia-smi", "-L").splitlines()))


def _output(*command: str) -> str:
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=30)
    except (OSError, subprocess.TimeoutExpired):
        return ""
    return done.stdout.strip() if done.returncode == 0 else ""
