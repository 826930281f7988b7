"""Facts of a run: when, of which commit, on which GPUs."""

from __future__ import annotations

import subprocess
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent


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
    """Asks git and nvidia-smi; a tree without git may have a COMMIT file instead."""
    commit = _output("git", "-C", str(ROOT), "rev-parse", "HEAD")
    if not commit:
        file = ROOT / "COMMIT"
        commit = file.read_text().strip() if file.exists() else "unknown"
    return Facts(commit=commit, gpus=tuple(_output("nvidia-smi", "-L").splitlines()))


def utc_now() -> str:
    """ISO 8601, seconds."""
    return datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%SZ")


def _output(*command: str) -> str:
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=30)
    except (OSError, subprocess.TimeoutExpired):
        return ""
    return done.stdout.strip() if done.returncode == 0 else ""
