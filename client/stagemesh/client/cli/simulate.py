"""`stagemesh simulate`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from stagemesh.client.cli import _options as shared
from stagemesh.client.cli._extras import missing_extra

if TYPE_CHECKING:
    from rich.table import Table

    from stagemesh.router.simulate.result import SimulationResult


def command() -> Any:
    """The function to run."""
    return _simulate


def _simulate(
    file: Annotated[Path, typer.Argument(metavar="FILE", help="YAML of stages, links and load.")],
    what_if: Annotated[
        list[str] | None,
        typer.Option(
            "--what-if",
            metavar="KEY=VALUE[,...]",
            help="A variant beside those of the file, such as stages.count=5 or link.latency=5ms. Repeatable.",
        ),
    ] = None,
    as_json: shared.JsonOption = False,
) -> None:
    """The router's scheduler runs over simulated stages and the variants of `what_if` beside them."""
    try:
        from stagemesh.router.simulate.run import run_file
    except ModuleNotFoundError as error:
        raise missing_extra(error, "simulate") from error
    results = run_file(file, what_if or [])
    if as_json:
        print(json.dumps([result.as_dict() for result in results], indent=2))
        return
    from stagemesh.client.cli._tables import make_console

    console = make_console()
    console.print(_figures(results))
    console.print(_stages(results))
    for line in _remarks(results):
        console.print(line, markup=False, highlight=False, soft_wrap=True)


def _figures(results: list[SimulationResult]) -> Table:
    """A row for each figure, a column for each run."""
    table = _table("", *(result.name for result in results))
    rows: list[tuple[str, list[str]]] = [
        ("output tokens/s", [f"{one.output_tokens_per_s:,.1f}" for one in results]),
        ("prompt tokens/s", [f"{one.prompt_tokens_per_s:,.1f}" for one in results]),
        *(
            (f"{label} {name}, ms", [f"{getattr(getattr(one, column), name):,.1f}" for one in results])
            for label, column in (("TTFT", "ttft_ms"), ("inter-token", "inter_token_ms"))
            for name in ("p50", "p90", "p99")
        ),
        ("limiting stage", [str(one.limiting_stage) for one in results]),
        ("bubble share, mean", [f"{_mean_bubble(one):.1%}" for one in results]),
        ("requests finished / refused", [f"{one.num_finished} / {one.num_refused}" for one in results]),
        ("steps, rows a step", [f"{one.num_steps:,}, {one.mean_rows:.1f}" for one in results]),
        ("preemptions, ignored rows", [f"{one.num_preemptions}, {one.num_ignored_rows}" for one in results]),
        ("virtual s, real s", [f"{one.virtual_s:,.1f}, {one.real_s:.1f}" for one in results]),
    ]
    for name, values in rows:
        table.add_row(name, *values)
    return table


def _stages(results: list[SimulationResult]) -> Table:
    """A row for each stage: its layers, and the share of the time it is idle while the lane has work."""
    table = _table("stage", *(f"{result.name}: layers, busy, bubble" for result in results))
    for index in range(max(len(result.stages) for result in results)):
        cells = []
        for result in results:
            stage = result.stages[index] if index < len(result.stages) else None
            cells.append(
                f"{stage.layers or '-'}, {stage.busy_share:.1%}, {stage.bubble_share:.1%}" if stage else ""
            )
        table.add_row(str(index), *cells)
    return table


def _remarks(results: list[SimulationResult]) -> list[str]:
    """What of the load was not run as the file asks for it, run by run."""
    lines = []
    for one in results:
        if one.refused:
            reasons = ", ".join(f"{count:,} {reason}" for reason, count in sorted(one.refused.items()))
            lines.append(f"{one.name}: refused: {reasons}")
        if one.num_cut:
            lines.append(
                f"{one.name}: {one.num_cut:,} of {one.num_requests:,} requests were longer than lane.max_context and cut"
            )
    return lines


def _mean_bubble(result: SimulationResult) -> float:
    return sum(stage.bubble_share for stage in result.stages) / len(result.stages)


def _table(first: str, *others: str) -> Table:
    from rich import box
    from rich.table import Table

    table = Table(box=box.SIMPLE, pad_edge=False)
    table.add_column(first)
    for name in others:
        table.add_column(name, justify="right")
    return table
