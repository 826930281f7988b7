"""What every benchmark prints: rows for people, and with --json one object."""

from __future__ import annotations

import json
import os
import platform
import shlex
import sys
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from checkout import commit, utc_now


@dataclass(frozen=True, slots=True, kw_only=True)
class Row:
    """One figure."""

    name: str
    value: float | None
    """None if it could not be measured; `reference` says why."""
    unit: str
    target: float | None = None
    """What done needs."""
    stretch: float | None = None
    """Where to go on towards; never judged."""
    met: bool | None = None
    reference: str = ""
    """What it is measured against, with that figure, from the same run."""


@dataclass(slots=True)
class Report:
    """Collects the rows of one run."""

    benchmark: str
    as_json: bool
    rows: list[Row] = field(default_factory=list)
    facts: dict[str, Any] = field(default_factory=dict)
    """What else the object says."""

    def add(
        self,
        name: str,
        value: float | None,
        unit: str,
        *,
        target: float | None = None,
        stretch: float | None = None,
        at_most: bool = False,
        reference: str = "",
    ) -> None:
        """Add a row; `at_most` says that the target is a ceiling."""
        met = None
        if target is not None:
            met = value is not None and bool(value <= target if at_most else value >= target)
        rounded = None if value is None else float(f"{value:.4g}")
        row = Row(
            name=name, value=rounded, unit=unit, target=target, stretch=stretch, met=met, reference=reference
        )
        self._take(row, "" if target is None else f"target {'<=' if at_most else '>='} {target:g}")

    def take(self, row: Mapping[str, Any]) -> None:
        """Add a row of another benchmark, as its JSON has it; it has said it on stderr."""
        self.rows.append(Row(**row))

    def _take(self, row: Row, bound: str) -> None:
        self.rows.append(row)
        mark = {True: "met", False: "MISSED", None: ""}[row.met]
        print(
            f"{row.name:<44} {row.value!s:>9} {row.unit:<6} {bound:<18} {mark:<7} {row.reference}",
            file=sys.stderr,
            flush=True,
        )

    def note(self, text: str) -> None:
        """What is going on, on stderr."""
        print(text, file=sys.stderr, flush=True)

    def text(self) -> str:
        """The JSON object of the rows so far."""
        found = {
            "benchmark": self.benchmark,
            "machine": machine(),
            "command": shlex.join(["python", *sys.argv]),
            "commit": commit(),
            "time": utc_now(),
            **self.facts,
            "results": [asdict(row) for row in self.rows],
        }
        return json.dumps(found, indent=1)

    def finish(self) -> None:
        """Print the JSON object if it was asked for."""
        if self.as_json:
            print(self.text())


def machine() -> str:
    """Processor, cores and memory."""
    model = platform.processor() or platform.machine()
    info = Path("/proc/cpuinfo")
    if info.exists():
        model = next(
            (
                line.partition(":")[2].strip()
                for line in info.read_text().splitlines()
                if line.startswith("model name")
            ),
            model,
        )
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / (1 << 30)
    return f"{model}, {len(os.sched_getaffinity(0))} cores, {memory:.0f} GiB"
