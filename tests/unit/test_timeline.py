"""The Chrome trace of a timeline: slices where they belong, nested, and arrows between the stages."""

from __future__ import annotations

import json

from stagemesh.client.cli._timeline import chrome_trace
from stagemesh.v1 import admin_pb2 as pb
from stagemesh.wire.columns import U64, pack

MS = 1_000_000
BEGIN = 1_795_571_585_000_000_000


def timeline() -> pb.GetTimelineResponse:
    """Two steps on two stages: 2 ms of compute each, half a millisecond before and after."""
    response = pb.GetTimelineResponse(
        lane_id="lane-0",
        epoch=5,
        numbers=pack([7, 8], U64),
        sent_unix_ns=pack([BEGIN, BEGIN + MS], U64),
        done_unix_ns=pack([BEGIN + 9 * MS, 0], U64),
        rows=pack([1, 4], U64),
        tokens=pack([64, 4], U64),
        prefill_tokens=pack([64, 0], U64),
    )
    for index in range(2):
        response.stages.add(
            stage_index=index,
            address=f"host-{index}:1",
            numbers=pack([7, 8], U64),
            arrival_unix_ns=pack([BEGIN + MS, BEGIN + 2 * MS], U64),
            queue_ns=pack([0, 5 * MS], U64),
            wait_ns=pack([3 * MS * index, MS], U64),
            receive_ns=pack([MS // 2] * 2, U64),
            compute_ns=pack([2 * MS] * 2, U64),
            send_ns=pack([MS // 2] * 2, U64),
            clock_offset_ns=-1500 * index,
            clock_error_ns=20_000,
        )
    return response


def test_it_is_a_chrome_trace_that_nests() -> None:
    trace = json.loads(json.dumps(chrome_trace(timeline())))
    events = trace["traceEvents"]
    processes = {e["pid"]: e["args"]["name"] for e in events if e["name"] == "process_name"}
    assert processes == {0: "router", 1: "stage 0 (host-0:1)", 2: "stage 1 (host-1:1)"}
    slices = [e for e in events if e["ph"] == "X" and e["tid"] == 1]
    for pid in (1, 2):
        steps = [e for e in slices if e["pid"] == pid and "args" in e]
        assert [(e["name"], e["args"]["step"]) for e in steps] == [("prefill 64", 7), ("decode 4", 8)]
        assert steps[0]["ts"] + steps[0]["dur"] <= steps[1]["ts"], "steps of a stage overlap"
        parts = [e for e in slices if e["pid"] == pid and "args" not in e]
        assert [e["name"] for e in parts] == ["receive", "compute", "send"] * 2
        for step, mine in zip(steps, (parts[:3], parts[3:]), strict=True):
            assert mine[0]["ts"] == step["ts"]
            assert sum(part["dur"] for part in mine) == step["dur"]
    first = min(e["ts"] for e in events if "ts" in e)
    assert first == 0, "times count from the first event"
    assert "right within 20.0 µs" in trace["otherData"]["stage 1 clock"]


def test_a_reader_that_cuts_off_after_the_nanosecond_gets_every_time_back() -> None:
    """As Perfetto does: microseconds times a thousand, without what is behind the point."""
    lengths = [(7919 * number) % 99_991 for number in range(2_000)]
    begins = [BEGIN + sum(lengths[:number]) for number in range(len(lengths))]
    zeros, receive = [0] * len(lengths), [length // 3 for length in lengths]
    compute = [length - part for length, part in zip(lengths, receive, strict=True)]
    response = pb.GetTimelineResponse(lane_id="lane-0")
    response.stages.add(
        numbers=pack(range(1, len(lengths) + 1), U64),
        arrival_unix_ns=pack(begins, U64),
        queue_ns=pack(zeros, U64),
        wait_ns=pack(zeros, U64),
        receive_ns=pack(receive, U64),
        compute_ns=pack(compute, U64),
        send_ns=pack(zeros, U64),
    )
    events = json.loads(json.dumps(chrome_trace(response)))["traceEvents"]
    found = [
        (e["name"], int(e["ts"] * 1e3), int(e["dur"] * 1e3))
        for e in events
        if e["ph"] == "X" and e["name"] in ("step", "compute")
    ]
    expected = []
    for begin, length, part in zip(begins, lengths, receive, strict=True):
        at = begin - BEGIN
        expected += [("step", at, length), ("compute", at + part, length - part)]
    assert found == expected


def test_arrows_follow_a_step_and_the_router_shows_what_was_answered() -> None:
    events = chrome_trace(timeline())["traceEvents"]
    flows = [(e["ph"], e["id"], e["pid"]) for e in events if e["ph"] in "stf" and e.get("cat") == "step"]
    assert flows == [("s", 7, 1), ("s", 8, 1), ("f", 7, 2), ("f", 8, 2)]
    shown = [(e["ph"], e["id"], e["ts"]) for e in events if e["ph"] in "be"]
    assert shown == [("b", 7, 0.0), ("e", 7, 9000.0)], "a step without an answer is not drawn as done"


def test_an_idle_mesh_has_an_empty_timeline() -> None:
    trace = chrome_trace(pb.GetTimelineResponse(lane_id="lane-0"))
    assert [event["ph"] for event in trace["traceEvents"]] == ["M", "M", "M"]
