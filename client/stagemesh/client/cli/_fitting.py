"""What fits into the terminal there is."""

from __future__ import annotations

from rich.console import Console, ConsoleOptions, RenderableType, RenderResult
from rich.measure import Measurement

_ANY_WIDTH = 10_000


class Fitting:
    """The first of some views that is not cut at the terminal's width; the last where all would be.

    Args:
        views: From the widest on.
    """

    def __init__(self, *views: RenderableType) -> None:
        self._views = views

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        wide = options.update(max_width=_ANY_WIDTH)
        fitting = (
            view for view in self._views if Measurement.get(console, wide, view).maximum <= options.max_width
        )
        yield next(fitting, self._views[-1])
