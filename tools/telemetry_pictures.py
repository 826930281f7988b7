"""The pictures of docs/observability.md, from a mesh that runs: docs/images/top.svg and timeline.svg.

stagemesh up MODEL --stages 3 &      # and some load on it
python tools/telemetry_pictures.py --admin 127.0.0.1:50052
"""

from __future__ import annotations

import argparse
import re
import time
from html import escape
from pathlib import Path
from typing import Any

from rich.console import Console

from stagemesh.client.cli._admin import Admin
from stagemesh.client.cli._timeline import chrome_trace
from stagemesh.client.cli._top_view import Rates, top_view

IMAGES = Path(__file__).parent.parent / "docs" / "images"
WIDTH, LEFT, ROW, GAP = 1200, 150, 30, 12
COLOURS = {"receive": "#17a2b8", "compute": "#2e9e4f", "send": "#b05cc7", "wait for upstream": "#e8c35a"}


def main() -> None:
    """Look, and draw."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--admin", default="127.0.0.1:50052")
    parser.add_argument("--milliseconds", type=float, default=200.0, help="of the timeline that is drawn")
    options = parser.parse_args()
    IMAGES.mkdir(parents=True, exist_ok=True)
    with Admin(options.admin) as admin:
        before = admin.status()
        time.sleep(1.0)
        now = admin.status()
        console = Console(record=True, width=150, file=Path("/dev/null").open("w"))  # noqa: SIM115 - ends with us
        console.print(top_view(now, Rates.between(before, now)))
        picture = console.export_svg(title="stagemesh top")
        # Rich names a font on another host; a picture in a repository asks nobody.
        (IMAGES / "top.svg").write_text(re.sub(r"@font-face \{.*?\}\s*", "", picture, flags=re.DOTALL))
        trace = chrome_trace(admin.timeline(2.0))
    (IMAGES / "timeline.svg").write_text(draw(trace["traceEvents"], options.milliseconds))


def draw(events: list[dict[str, Any]], milliseconds: float) -> str:
    """The stages' tracks of the middle of a Chrome trace."""
    slices = [event for event in events if event["ph"] == "X"]
    names = {e["pid"]: e["args"]["name"] for e in events if e["name"] == "process_name" and e["pid"]}
    middle = max(event["ts"] for event in slices) / 2
    begin, scale = middle, (WIDTH - LEFT - 10) / (milliseconds * 1e3)
    height = len(names) * (2 * ROW + GAP) + 50
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {height}" font-family="monospace" '
        f'font-size="12"><rect width="{WIDTH}" height="{height}" fill="#fff"/>'
    ]
    for row, pid in enumerate(sorted(names)):
        top = 10 + row * (2 * ROW + GAP)
        parts.append(f'<text x="8" y="{top + 20}">{escape(names[pid].partition(" (")[0])}</text>')
        parts.append(f'<text x="8" y="{top + ROW + 18}" fill="#888">waits</text>')
        for event in sorted(slices, key=lambda event: event["name"] not in COLOURS):
            if (
                event["pid"] == pid
                and begin <= event["ts"] + event["dur"]
                and event["ts"] <= begin + milliseconds * 1e3
            ):
                parts.append(_rectangle(event, begin, scale, top))
    for index, (name, colour) in enumerate(COLOURS.items()):
        x = LEFT + index * 170
        parts.append(f'<rect x="{x}" y="{height - 32}" width="14" height="14" fill="{colour}"/>')
        parts.append(f'<text x="{x + 20}" y="{height - 20}">{name}</text>')
    parts.append(f'<text x="{WIDTH - 170}" y="{height - 20}">{milliseconds:g} ms across</text></svg>')
    return "\n".join(parts) + "\n"


def _rectangle(event: dict[str, Any], begin: float, scale: float, top: int) -> str:
    x = max(LEFT, LEFT + (event["ts"] - begin) * scale)
    end = min(WIDTH - 10, LEFT + (event["ts"] + event["dur"] - begin) * scale)
    name = event["name"]
    if name == "wait for upstream":
        y, height = top + ROW + 6, ROW // 2
    elif name in COLOURS:
        y, height = top + 8, ROW - 8
    else:  # the step itself: a line over its parts, with its name where there is room
        label = escape(name) if end - x > 8 * len(name) else ""
        line = f'<rect x="{x:.1f}" y="{top}" width="{max(0.5, end - x - 1):.1f}" height="6" fill="#444"/>'
        return line + (f'<text x="{x + 3:.1f}" y="{top + 22}" fill="#fff">{label}</text>' if label else "")
    return f'<rect x="{x:.1f}" y="{y}" width="{max(0.5, end - x):.1f}" height="{height}" fill="{COLOURS[name]}"/>'


if __name__ == "__main__":
    main()
