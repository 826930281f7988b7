"""The mesh at a glance. Pure."""

from __future__ import annotations

from dataclasses import dataclass

from rich import box
from rich.console import Group, RenderableType
from rich.panel import Panel
from rich.table import Table
from rich.text import Text

from stagemesh.client.cli._bars import share_bar
from stagemesh.client.cli._fitting import Fitting
from stagemesh.client.cli._tables import devices, lane_line
from stagemesh.v1 import admin_pb2 as pb


@dataclass(frozen=True, slots=True, kw_only=True)
class Rates:
    """Tokens and requests per second between two looks."""

    output_tokens: float = 0.0
    prompt_tokens: float = 0.0
    requests: float = 0.0
    steps: float = 0.0

    @classmethod
    def between(cls, before: pb.MeshStatus, now: pb.MeshStatus) -> Rates:
        """Zeros where no time passed."""
        seconds = now.uptime_seconds - before.uptime_seconds
        if seconds <= 0:
            return cls()
        return cls(
            output_tokens=(now.output_tokens - before.output_tokens) / seconds,
            prompt_tokens=(now.prompt_tokens - before.prompt_tokens) / seconds,
            requests=(now.num_finished - before.num_finished) / seconds,
            steps=max(0, _steps(now) - _steps(before)) / seconds,
        )


def top_view(status: pb.MeshStatus, rates: Rates) -> RenderableType:
    """Requests and latencies, memory, then the stages of each lane."""
    parts: list[RenderableType] = [_requests(status, rates)]
    for lane in status.lanes:
        parts += [
            _memory(lane),
            Fitting(_stages(lane), _stages(lane, narrow=True)),
            Text(lane_line(lane), "dim"),
        ]
    title = f"{status.model_name or 'no model'} · stagemesh {status.version} · up {_duration(status.uptime_seconds)}"
    return Panel(Group(*parts), title=title, title_align="left")


def _requests(status: pb.MeshStatus, rates: Rates) -> Table:
    table = Table(box=None, pad_edge=False, show_header=False, padding=(0, 3, 0, 0))
    table.add_row(
        Text.assemble(
            "running ", (f"{status.num_running}", "bold"), " · waiting ", (f"{status.num_waiting}", "bold")
        ),
        Text.assemble("output ", (f"{rates.output_tokens:,.0f}", "bold green"), " tok/s"),
        Text.assemble("prompt ", (f"{rates.prompt_tokens:,.0f}", "bold"), " tok/s"),
        f"{rates.requests:,.1f} requests/s · {rates.steps:,.0f} steps/s",
    )
    table.add_row(
        f"finished {status.num_finished} · failed {status.num_failed}",
        _pair("first token", status.ttft_p50_ms, status.ttft_p99_ms),
        _pair("inter-token", status.inter_token_p50_ms, status.inter_token_p99_ms),
        f"preemptions {status.num_preemptions} · prefix hits {_hit_rate(status):.0%}",
    )
    return table


def _memory(lane: pb.LaneStatus) -> Text:
    used = lane.num_blocks - lane.num_free_blocks
    share = used / lane.num_blocks if lane.num_blocks else 0.0
    bar = share_bar(share, 40, "blue")
    return Text.assemble(
        "\nKV ", bar, f" · {used} of {lane.num_blocks} blocks, limited by stage {lane.limiting_stage}"
    )


_NUMBERS = ("bubble", "step p50 ms", "p99 ms", "wait ms", "compute ms")
_HEADERS = ("stage", "layers", "TP", "device", "utilization", *_NUMBERS, "link", "state")
_NARROW_HEADERS = {
    "stage": "stage",
    "utilization": "use",
    "bubble": "bubble",
    "step p50 ms": "step p50",
    "p99 ms": "p99",
    "wait ms": "wait",
    "compute ms": "compute",
    "link": "link",
    "state": "state",
}
"""In 80 columns; times are milliseconds."""


def _stages(lane: pb.LaneStatus, *, narrow: bool = False) -> Table:
    headers = _NARROW_HEADERS if narrow else dict(zip(_HEADERS, _HEADERS, strict=True))
    table = Table(box=box.SIMPLE, pad_edge=False, padding=(0, int(not narrow)))
    for header, name in headers.items():
        table.add_column(name, justify="right" if header in _NUMBERS else "left")
    for stage in lane.stages:
        cells = _cells(lane, stage, bar_width=0 if narrow else 20)
        table.add_row(*(cells[header] for header in headers))
    return table


def _cells(lane: pb.LaneStatus, stage: pb.StageStatus, bar_width: int) -> dict[str, RenderableType]:
    about = stage.description
    slowest = len(lane.stages) > 1 and lane.num_steps > 0 and stage.stage_index == lane.slowest_stage
    return {
        "stage": f"{stage.stage_index}" + (" ◀" if slowest else ""),
        "layers": f"{about.layer_begin}:{about.layer_end}",
        "TP": str(len(about.ranks) or "-"),
        "device": devices(stage),
        "utilization": share_bar(stage.busy_share, bar_width, "red" if slowest else "green"),
        "bubble": f"{stage.bubble_share:.0%}",
        "step p50 ms": f"{stage.busy_p50_ms:.2f}",
        "p99 ms": f"{stage.busy_p99_ms:.2f}",
        "wait ms": f"{stage.mean_wait_ms:.2f}",
        "compute ms": f"{stage.mean_compute_ms:.2f}",
        "link": stage.link_transport or "-",
        "state": Text(
            stage.state + (f": {stage.detail}" if stage.detail else ""),
            "" if stage.state == "ready" else "red",
        ),
    }


def _pair(name: str, p50_ms: float, p99_ms: float) -> str:
    return f"{name} p50 {p50_ms:.1f} · p99 {p99_ms:.1f} ms"


def _hit_rate(status: pb.MeshStatus) -> float:
    return status.cached_tokens / status.queried_tokens if status.queried_tokens else 0.0


def _steps(status: pb.MeshStatus) -> int:
    return sum(lane.num_steps for lane in status.lanes)


def _duration(seconds: float) -> str:
    minutes, seconds = divmod(int(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{seconds:02}"
