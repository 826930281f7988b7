"""The version of the contract between router and stages."""

from __future__ import annotations

MAJOR = 1
MINOR = 0


def compatible(major: int, minor: int) -> bool:
    """Whether a peer of that version can be worked with: one minor version apart at most."""
    return major == MAJOR and abs(minor - MINOR) <= 1
