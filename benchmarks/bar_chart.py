"""Bar charts as SVG, without a plotting library: a benchmark runs where there is none."""

from __future__ import annotations

from dataclasses import dataclass
from html import escape

WIDTH, MARGIN, LABELS, BAR, GAP, HEAD = 720, 20, 150, 22, 8, 34
COLOUR = "#2f6f9f"


@dataclass(frozen=True, slots=True)
class Bar:
    """One bar."""

    label: str
    value: float


def bar_chart(title: str, panels: list[tuple[str, list[Bar]]]) -> str:
    """An SVG document: a title, and for each panel (heading, bars) horizontal bars from zero, values beside them."""
    parts: list[str] = []
    y = MARGIN + 16
    parts.append(_text(MARGIN, y, title, size=16, weight="bold"))
    for heading, bars in panels:
        y += HEAD
        parts.append(_text(MARGIN, y, heading, size=13))
        y += 10
        largest = max((bar.value for bar in bars), default=0) or 1
        room = WIDTH - 2 * MARGIN - LABELS - 90
        for bar in bars:
            length = room * bar.value / largest
            x = MARGIN + LABELS
            parts.append(_text(x - 8, y + BAR - 6, bar.label, anchor="end"))
            parts.append(
                f'<rect x="{x}" y="{y}" width="{max(1.0, length):.1f}" height="{BAR}" fill="{COLOUR}"/>'
            )
            parts.append(_text(x + length + 6, y + BAR - 6, f"{bar.value:,.0f}"))
            y += BAR + GAP
    height = y + MARGIN
    body = "\n".join(parts)
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{WIDTH}" height="{height}" '
        f'viewBox="0 0 {WIDTH} {height}" font-family="sans-serif">\n'
        f'<rect width="{WIDTH}" height="{height}" fill="white"/>\n{body}\n</svg>\n'
    )


def _text(
    x: float, y: float, text: str, *, size: int = 12, anchor: str = "start", weight: str = "normal"
) -> str:
    return (
        f'<text x="{x:.1f}" y="{y:.1f}" font-size="{size}" text-anchor="{anchor}" font-weight="{weight}" '
        f'fill="#222">{escape(text)}</text>'
    )
