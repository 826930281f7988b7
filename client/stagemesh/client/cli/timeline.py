"""`stagemesh timeline`."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any, TextIO

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
    with _opened(output) as file, Admin(admin) as router:
        epochs = {lane.lane_id: lane.epoch for lane in router.status().lanes}
        timeline = router.timeline(seconds)
        if file is not sys.stdout and output.is_file():
            file.truncate(0)
        print(json.dumps(chrome_trace(timeline)), file=file)
    print(f"{len(timeline.numbers) // 8} steps on {len(timeline.stages)} stages", file=sys.stderr)
    if timeline.epoch != epochs.get(timeline.lane_id, timeline.epoch):
        print("the lane was lost and formed again meanwhile: steps before that are left out", file=sys.stderr)
    for stage in timeline.stages:
        print(
            f"stage {stage.stage_index}: clock moved by {stage.clock_offset_ns / 1e3:.1f} µs, "
            f"right within {stage.clock_error_ns / 1e3:.1f} µs",
            file=sys.stderr,
        )


@contextmanager
def _opened(output: Path) -> Iterator[TextIO]:
    """Before the recording, which would be lost if it could not be written; what the file has is left in it, and no new one
    stays if nothing comes of the recording."""
    if str(output) == "-":
        yield sys.stdout
        return
    try:
        is_new = not output.exists()
        with output.open("a") as file:
            try:
                yield file
            except BaseException:
                if is_new:
                    output.unlink()
                raise
    except OSError as error:
        raise ConfigError(f"--output: cannot write {output}: {error.strerror}") from error
