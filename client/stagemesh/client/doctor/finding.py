"""What a check found."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from enum import StrEnum

Value = str | int | float | bool | None


class Level(StrEnum):
    """How bad it is."""

    OK = "ok"
    WARN = "warn"
    """It will work, and slower or less safely than it could."""
    FAIL = "fail"
    """It will not work."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Finding:
    """One line of the table."""

    check: str
    """What was looked at: "python", "port 50061", "10.0.0.12 clock"."""
    level: Level
    found: str
    """What is the case, with its values."""
    todo: str = ""
    """What to do about it; empty if it is well."""
    values: Mapping[str, Value] = field(default_factory=dict)
    """The same for machines; names end in their unit."""


def worst(findings: Iterable[Finding]) -> Level:
    """The level of the whole."""
    levels = {finding.level for finding in findings}
    return next((level for level in (Level.FAIL, Level.WARN) if level in levels), Level.OK)
