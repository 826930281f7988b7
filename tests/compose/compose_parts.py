"""Parts of the run with their times, printed as they happen and once more at the end."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager

_times: list[tuple[str, float]] = []


def say(text: str) -> None:
    """A line past pytest's capture, so that a long run shows where it is."""
    print(text, file=sys.__stdout__, flush=True)


@contextmanager
def part(name: str) -> Iterator[None]:
    """Everything within counts as this part."""
    say(f"-- {name}")
    begin = time.monotonic()
    try:
        yield
    finally:
        _times.append((name, time.monotonic() - begin))
        say(f"-- {name}: {_times[-1][1]:.1f} s")


def summary() -> list[str]:
    """A line for each part."""
    return [f"{name}: {seconds:.1f} s" for name, seconds in _times]
