"""`stagemesh top`."""

from __future__ import annotations

from typing import Annotated, Any

import typer

from stagemesh.client._defaults import DEFAULT_ADMIN_ADDRESS
from stagemesh.client.cli import _options as shared
from stagemesh.client.cli._admin import Admin
from stagemesh.client.cli._tables import make_console
from stagemesh.client.cli._top_view import Rates, top_view


def command() -> Any:
    """The function to run."""
    return _top


def _top(
    admin: shared.AdminOption = DEFAULT_ADMIN_ADDRESS,
    interval: Annotated[float, typer.Option("--interval", min=0.05, help="Seconds between two looks.")] = 1.0,
    count: Annotated[
        int, typer.Option("--count", min=0, help="Looks after which to end; 0: until Ctrl-C.")
    ] = 0,
) -> None:
    """Utilization is the share of the last ten seconds a stage computed; bubble, the part of the time with a
    step in flight in which it had nothing to do. ◀ marks the slowest stage."""
    from rich.live import Live

    console = make_console()
    rates, before, looks = Rates(), None, 0
    try:
        with (
            Admin(admin) as router,
            Live(console=console, auto_refresh=False, screen=console.is_terminal) as live,
        ):
            for status in router.watch(int(interval * 1000)):
                if before is not None:
                    rates = Rates.between(before, status)
                live.update(top_view(status, rates), refresh=True)
                before, looks = status, looks + 1
                if looks == count:
                    break
    finally:
        if looks and not console.is_terminal:
            # Live leaves its last line open there.
            console.print()
