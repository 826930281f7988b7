"""Bars of text. Pure."""

from __future__ import annotations

from collections.abc import Sequence

from rich.text import Text

PARTS = (("queue", "░", "dim"), ("wait", "▒", "yellow"), ("receive", "▓", "cyan"), ("compute", "█", "green"))
"""Name, letter and style of each part of a stage's time, then SEND; legible without colours too."""
SEND = ("send", "▚", "magenta")
ALL_PARTS = (*PARTS, SEND)


def share_bar(share: float, width: int = 20, style: str = "green") -> Text:
    """A share of 1 as a bar and a percentage."""
    filled = round(min(1.0, max(0.0, share)) * width)
    return Text.assemble(("█" * filled, style), ("░" * (width - filled), "dim"), f" {share:4.0%}")


def parts_bar(values: Sequence[float], longest: float, width: int = 60) -> Text:
    """The parts of a stage's time one after the other, `longest` being the whole width."""
    bar = Text()
    position, filled = 0.0, 0
    for value, (_, letter, style) in zip(values, ALL_PARTS, strict=True):
        position += value
        # Rounded at their ends, so that the bar is as long as the sum and not as the rounded parts.
        end = round(position / longest * width) if longest else 0
        bar.append(letter * (end - filled), style)
        filled = max(filled, end)
    return bar


def legend() -> Text:
    """What the letters of `parts_bar` mean."""
    return Text("  ").join(Text(f"{letter} {name}", style) for name, letter, style in ALL_PARTS)
