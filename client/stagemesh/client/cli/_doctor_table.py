"""The findings of `stagemesh doctor` as a table."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

from rich import box
from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from stagemesh.client.doctor.finding import Finding, Level

_STYLES = {Level.OK: "green", Level.WARN: "yellow", Level.FAIL: "bold red"}


def findings_view(findings: Sequence[Finding]) -> RenderableType:
    """A row for each, then how many of each level."""
    table = Table(box=box.SIMPLE, pad_edge=False)
    for header in ("check", "", "found", "what to do"):
        table.add_column(header, overflow="fold")
    for finding in findings:
        level = Text(finding.level, style=_STYLES[finding.level])
        table.add_row(finding.check, level, finding.found, finding.todo)
    counts = Counter(finding.level for finding in findings)
    return Group(table, ", ".join(f"{counts[level]} {level}" for level in Level if counts[level]))
