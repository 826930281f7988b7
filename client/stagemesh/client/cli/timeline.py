"""`stagemesh timeline`."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Annotated, Any

import typer

from stagemesh.client._defaults import DEFAULT_ADMIN_ADDRESS
from stagemesh.client.cli import _options as shared
from stagemesh.client.cli._admin import Admin
from stagemesh.client.cli._timeline import chrome_trace
from stagemesh.wire.errors import ConfigError


def command() -> Any:
    """The function to run."""
    return _timeline


def _timeline(
    seconds: Annotated[float, typer.Option("--seconds", min=0.1, max=60, help="How long to look.")] = 5.0,
    output: Annotated[
        Path,
        typer.Option("--output", "-o", metavar="FILE", help="Gets the Chrome trace; - is standard output."),
    ] = Path("timeline.json"),
    admin: shared.AdminOption = DEFAULT_ADMIN_ADDRESS,
) -> None:
    """Open the file in Perfetto (ui.perfetto.dev) or chrome://tracing. Clocks of the stages are aligned."""
    with Admin(admin) as router:
        timeline = router.timeline(seconds)
    trace = json.dumps(chrome_trace(timeline))
    if str(output) == "-":
        print(trace)
    else:
        try:
            output.write_text(trace + "\n")
        except OSError as error:
            raise ConfigError(f"--output: cannot write {output}: {error.strerror}") from error
    print(f"{len(timeline.numbers) // 8} steps on {len(timeline.stages)} stages", file=sys.stderr)
    for stage in timeline.stages:
        print(
            f"stage {stage.stage_index}: clock moved by {stage.clock_offset_ns / 1e3:.1f} µs, "
            f"right within {stage.clock_error_ns / 1e3:.1f} µs",
            file=sys.stderr,
        )
