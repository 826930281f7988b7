"""Which tree a run is of, and when it was."""

from __future__ import annotations

import subprocess
from datetime import UTC, datetime
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent


def commit(folder: Path = ROOT) -> str:
    """Of the checkout that holds `folder`, "+" after it where tracked files have changed; without git what a COMMIT file in it
    says; empty where there is neither."""
    try:
        head = _git(folder, "rev-parse", "--short", "HEAD")
        return head + ("+" if _git(folder, "status", "--porcelain", "--untracked-files=no") else "")
    except (OSError, subprocess.CalledProcessError):
        file = folder / "COMMIT"
        return file.read_text().strip() if file.exists() else ""


def utc_now() -> str:
    """ISO 8601, seconds."""
    return datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%SZ")


def _git(folder: Path, *args: str) -> str:
    done = subprocess.run(["git", *args], cwd=folder, capture_output=True, text=True, check=True)
    return done.stdout.strip()
