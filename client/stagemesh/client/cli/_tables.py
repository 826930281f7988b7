"""A mesh as tables. Pure, but for the console."""

from __future__ import annotations

from rich import box
from rich.console import Console, Group, RenderableType
from rich.table import Table

from stagemesh.v1 import admin_pb2 as pb

_PIPE_WIDTH = 240


def make_console() -> Console:
    """A console on standard output; in a pipe it is wide enough that nothing is cut."""
    console = Console(highlight=False, markup=False, emoji=False)
    return (
        console
        if console.is_terminal
        else Console(highlight=False, markup=False, emoji=False, width=_PIPE_WIDTH)
    )


def mesh_view(status: pb.MeshStatus) -> RenderableType:
    """Lanes with their stages, then the counts."""
    parts: list[RenderableType] = []
    for lane in status.lanes:
        parts += [lane_line(lane), stage_table(lane)]
    parts.append(
        f"{status.model_name or 'no model'} · {status.num_running} running, {status.num_waiting} waiting, "
        f"{status.num_finished} finished, {status.num_failed} failed · {status.prompt_tokens} prompt and "
        f"{status.output_tokens} output tokens · up {status.uptime_seconds:.0f} s · "
        f"stagemesh {status.version}"
    )
    return Group(*parts)


def lane_line(lane: pb.LaneStatus) -> str:
    """State, reason, epoch, memory and pace of a lane in one line."""
    state = pb.LaneState.Name(lane.state).removeprefix("LANE_STATE_").lower()
    parts = [
        f"lane {lane.lane_id}: {state}" + (f" ({lane.reason})" if lane.reason else ""),
        f"epoch {lane.epoch}",
    ]
    if lane.num_blocks:
        parts.append(
            f"{lane.num_free_blocks} of {lane.num_blocks} blocks of {lane.block_size} tokens free, "
            f"limited by stage {lane.limiting_stage}"
        )
    parts.append(f"{lane.num_steps} steps, {lane.steps_in_flight} in flight")
    if lane.cycle_ms:
        slowest = lane.stages[lane.slowest_stage]
        parts.append(
            f"stage {slowest.stage_index} limits the pace: {slowest.step_ms:.2f} ms a step, {lane.cycle_ms:.2f} ms a token"
        )
    return " · ".join(parts)


def stage_table(lane: pb.LaneStatus) -> Table:
    """A row for each stage."""
    table = Table(box=box.SIMPLE, pad_edge=False)
    for header in (
        "stage",
        "address",
        "layers",
        "TP",
        "heads/KV",
        "device",
        "blocks",
        "link",
        "busy",
        "bubble",
        "state",
    ):
        table.add_column(header, overflow="fold")
    for stage in lane.stages:
        described = stage.HasField("description")
        about = stage.description
        table.add_row(
            str(stage.stage_index),
            stage.address,
            f"{about.layer_begin}:{about.layer_end} of {about.num_layers}" if described else "-",
            str(len(about.ranks)) if described else "-",
            heads(stage) if described else "-",
            devices(stage) if described else "-",
            str(about.num_blocks) if described else "-",
            stage.link_transport + (f" ({stage.link_reason})" if stage.link_reason else "") or "-",
            f"{stage.busy_share:.0%}" if described else "-",
            f"{stage.bubble_share:.0%}" if described else "-",
            stage.state + (f": {stage.detail}" if stage.detail else ""),
        )
    return table


def heads(stage: pb.StageStatus) -> str:
    """Heads and KV heads of each rank: "6/2 + 3/1"."""
    return " + ".join(f"{rank.num_heads}/{rank.num_kv_heads}" for rank in stage.description.ranks)


def devices(stage: pb.StageStatus) -> str:
    """The devices of the ranks, each once, and the dtype."""
    names = list(dict.fromkeys(rank.device for rank in stage.description.ranks))
    return " + ".join(names) + (f" {stage.description.dtype}" if stage.description.dtype else "")
