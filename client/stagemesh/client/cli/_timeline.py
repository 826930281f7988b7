"""The steps of a mesh as a Chrome trace, which Perfetto (ui.perfetto.dev) and chrome://tracing open. Pure.

A process for the router and one for each stage. On a stage, a slice is a step from its first input to its output,
with receive, compute and send within it; waits for the neighbour are on a track below. Arrows follow a step
from stage to stage.
"""

from __future__ import annotations

import math
import struct
from collections.abc import Sequence
from typing import Any

from stagemesh.v1 import admin_pb2 as pb

Event = dict[str, Any]
_STEPS, _WAITS = 1, 2
"""Tracks of a stage."""


def chrome_trace(timeline: pb.GetTimelineResponse) -> dict[str, Any]:
    """The whole file."""
    arrivals = (_u64(stage.arrival_unix_ns) for stage in timeline.stages)
    begins = [times[0] for times in (_u64(timeline.sent_unix_ns), *arrivals) if times]
    origin = min(begins, default=0)
    labels = _labels(timeline)
    events = _router_events(timeline, labels, origin)
    for stage in timeline.stages:
        events += _stage_events(stage, labels, origin, last=stage is timeline.stages[-1])
    return {
        "traceEvents": events,
        "displayTimeUnit": "ms",
        "otherData": {
            "lane": timeline.lane_id,
            "epoch": str(timeline.epoch),
            "begins_unix_ns": str(origin),
            **{
                f"stage {stage.stage_index} clock": f"moved by {stage.clock_offset_ns / 1e3:.1f} µs, "
                f"right within {stage.clock_error_ns / 1e3:.1f} µs"
                for stage in timeline.stages
            },
        },
    }


def _labels(timeline: pb.GetTimelineResponse) -> dict[int, tuple[str, Event]]:
    """By step: what a slice is called, and its arguments."""
    columns = (timeline.rows, timeline.tokens, timeline.prefill_tokens)
    labels: dict[int, tuple[str, Event]] = {}
    for number, rows, tokens, prefill in zip(_u64(timeline.numbers), *map(_u64, columns), strict=True):
        kind = f"decode {rows}" if not prefill else f"prefill {prefill}"
        mixed = f" + {tokens - prefill} decode" if prefill and tokens > prefill else ""
        arguments = {"step": number, "rows": rows, "tokens": tokens, "prefill_tokens": prefill}
        labels[number] = (kind + mixed, arguments)
    return labels


def _router_events(
    timeline: pb.GetTimelineResponse, labels: dict[int, tuple[str, Event]], origin: int
) -> list[Event]:
    events = _names(0, "router", {0: "steps in flight"})
    times = zip(_u64(timeline.numbers), _u64(timeline.sent_unix_ns), _u64(timeline.done_unix_ns), strict=True)
    for number, sent, done in times:
        name, arguments = labels[number]
        if done:
            # Several are in flight at once: asynchronous events, each on a line of its own.
            common = {"cat": "step", "id": number, "pid": 0, "tid": 0, "name": name}
            events.append({**common, "ph": "b", "ts": _us(sent - origin), "args": arguments})
            events.append({**common, "ph": "e", "ts": _us(done - origin)})
    return events


def _stage_events(
    stage: pb.StageTimeline, labels: dict[int, tuple[str, Event]], origin: int, *, last: bool
) -> list[Event]:
    pid = stage.stage_index + 1
    events = _names(pid, f"stage {stage.stage_index} ({stage.address})", {_STEPS: "steps", _WAITS: "waits"})
    columns = (stage.numbers, stage.arrival_unix_ns, stage.queue_ns, stage.wait_ns, stage.receive_ns)
    ends = (stage.compute_ns, stage.send_ns)
    for number, arrival, queue, wait, receive, compute, send in zip(
        *map(_u64, (*columns, *ends)), strict=True
    ):
        name, arguments = labels.get(number, ("step", {"step": number}))
        begin = arrival + queue + wait

        def slice_(what: str, at: int, length: int, tid: int = _STEPS, **more: Any) -> Event:
            ts, dur = _us(at - origin), _us(length)
            return {"ph": "X", "name": what, "pid": pid, "tid": tid, "ts": ts, "dur": dur, **more}

        events.append(slice_(name, begin, receive + compute + send, args=arguments))
        for what, at, length in (
            ("receive", begin, receive),
            ("compute", begin + receive, compute),
            ("send", begin + receive + compute, send),
        ):
            events.append(slice_(what, at, length))
        if wait:
            events.append(slice_("wait for upstream", begin - wait, wait, _WAITS, args={"step": number}))
        flow = {"cat": "step", "name": "step", "id": number, "pid": pid, "tid": _STEPS}
        if stage.stage_index:
            events.append({**flow, "ph": "t" if not last else "f", "bp": "e", "ts": _us(begin - origin)})
        else:
            events.append({**flow, "ph": "s", "ts": _us(begin - origin)})
    return events


def _names(pid: int, name: str, tracks: dict[int, str]) -> list[Event]:
    events: list[Event] = [
        {"ph": "M", "name": "process_name", "pid": pid, "tid": 0, "args": {"name": name}},
        {"ph": "M", "name": "process_sort_index", "pid": pid, "tid": 0, "args": {"sort_index": pid}},
    ]
    for tid, track in tracks.items():
        events.append({"ph": "M", "name": "thread_name", "pid": pid, "tid": tid, "args": {"name": track}})
    return events


def _us(ns: int) -> float:
    """Microseconds from which a reader that cuts off after the nanosecond, as Perfetto does, gets back what it was: slices
    that overlap by one would not nest."""
    us = ns / 1e3
    return us if int(us * 1e3) == ns else math.nextafter(us, math.copysign(math.inf, us))


def _u64(column: bytes) -> Sequence[int]:
    """The client has no numpy."""
    return struct.unpack(f"<{len(column) // 8}Q", column)
