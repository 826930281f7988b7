"""Where the time of one request went, as a table and a bar for each stage. Pure."""

from __future__ import annotations

from collections.abc import Mapping

from rich import box
from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from stagemesh.client.cli._bars import legend, parts_bar
from stagemesh.client.cli._fitting import Fitting
from stagemesh.v1 import admin_pb2 as pb

_HEADERS = (
    *("steps", "queue ms", "wait ms", "receive ms", "compute ms", "send ms"),
    *("step p50 ms", "step p99 ms", "transfer ms", "bubble"),
)
_NARROW_HEADERS = {
    "steps": "steps",
    "queue ms": "queue",
    "wait ms": "wait",
    "compute ms": "compute",
    "step p50 ms": "p50",
    "step p99 ms": "p99",
    "transfer ms": "transfer",
    "bubble": "bubble",
}
"""In 80 columns: receive and send are in transfer, and all times are milliseconds."""


def trace_view(trace: pb.GetRequestTraceResponse) -> RenderableType:
    """One line on the request, a row for each stage and phase, and a bar for each stage."""
    line = (
        f"request {trace.request_id}: {trace.state} · {trace.prompt_tokens} prompt and "
        f"{trace.output_tokens} output tokens · queue {trace.queue_ms:.1f} ms, "
        f"first token {trace.ttft_ms:.1f} ms, total {trace.total_ms:.1f} ms"
    )
    parts: list[RenderableType] = [line]
    if trace.trace_id:
        parts.append(f"trace {trace.trace_id}")
    parts.append(
        Fitting(_table(trace, dict(zip(_HEADERS, _HEADERS, strict=True))), _table(trace, _NARROW_HEADERS))
    )
    if any(_whole(stage) for stage in trace.stages):
        longest = max(sum(_whole(stage)) for stage in trace.stages)
        parts += [
            Text.assemble(f"stage {stage.stage_index}  ", parts_bar(_whole(stage), longest))
            for stage in trace.stages
        ]
        parts += [legend(), _limiting(trace)]
    return Group(*parts)


def _table(trace: pb.GetRequestTraceResponse, headers: Mapping[str, str]) -> Table:
    """With these of _HEADERS, under these names."""
    table = Table(box=box.SIMPLE, pad_edge=False, padding=(0, int(len(headers) == len(_HEADERS))))
    for header in ("stage", "phase"):
        table.add_column(header)
    for header in headers.values():
        table.add_column(header, justify="right")
    for stage in trace.stages:
        for name, phase in (("prefill", stage.prefill), ("decode", stage.decode)):
            if phase.num_steps:
                cells = dict(zip(_HEADERS, _cells(phase), strict=True))
                table.add_row(str(stage.stage_index), name, *(cells[header] for header in headers))
    return table


def _cells(phase: pb.PhaseTrace) -> tuple[str, ...]:
    """Of _HEADERS."""
    return (
        str(phase.num_steps),
        *(f"{time:.1f}" for time in _times(phase)),
        f"{phase.busy_p50_ms:.2f}",
        f"{phase.busy_p99_ms:.2f}",
        f"{phase.receive_ms + phase.send_ms:.1f}",
        f"{phase.bubble_share:.0%}",
    )


def _times(phase: pb.PhaseTrace) -> tuple[float, ...]:
    return (phase.queue_ms, phase.wait_ms, phase.receive_ms, phase.compute_ms, phase.send_ms)


def _whole(stage: pb.StageTrace) -> list[float]:
    return [sum(pair) for pair in zip(_times(stage.prefill), _times(stage.decode), strict=True)]


def _limiting(trace: pb.GetRequestTraceResponse) -> str:
    stage = trace.stages[trace.limiting_stage]
    _, wait, *busy = _whole(stage)
    others = [sum(_whole(other)[2:]) for other in trace.stages if other is not stage]
    beside = f", the next one {max(others):.1f} ms" if others else ""
    return (
        f"stage {stage.stage_index} limits: its steps kept it busy for {sum(busy):.1f} ms{beside}; "
        f"it waited {wait:.1f} ms for its neighbour"
    )
