"""What router and stages agree on beside the messages: the version of the contract, and a metadata key."""

from __future__ import annotations

MAJOR = 1
MINOR = 0
EPOCH_KEY = "stagemesh-epoch"
"""Metadata of an Execute call: the epoch of the lane whose steps it carries."""


def compatible(major: int, minor: int) -> bool:
    """Whether a peer of that version can be worked with: one minor version apart at most."""
    return major == MAJOR and abs(minor - MINOR) <= 1
