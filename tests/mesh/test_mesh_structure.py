"""What the mesh is made of: steps, bytes, ranks, shard files."""

from __future__ import annotations

import json
import shutil
from itertools import pairwise
from pathlib import Path

from mesh_calls import generate, make_prompt, make_request, read_answer, start
from mesh_processes import address_of, start_router, start_stage, wait_for
from running_mesh import CALL_TIMEOUT_S, RunningMesh

from stagemesh.router.scheduler.event_log import replay
from stagemesh.v1 import admin_pb2, inference_pb2


def test_a_request_that_comes_while_another_decodes_is_in_the_very_next_step(mesh: RunningMesh) -> None:
    """The step log says when B's first row was sent; A's tokens say what had been sent when B came."""
    running = start(mesh, request_id="struct-a", max_tokens=1900)
    before = mesh.lane.num_steps
    answer = generate(mesh, make_prompt(3, 5), 4, request_id="struct-b")
    after = mesh.lane.num_steps
    running.cancel()
    steps = {step["step"]: {row[0] for row in step["rows"]} for step in mesh.steps()}
    first = mesh.steps_of("struct-b")[0]
    assert before < first <= after
    assert len(answer.token_ids) == 4
    # A decodes all along, and B joins it: A is in the step before B's first, and in B's first or the one after.
    assert "struct-a" in steps[first - 1]
    assert "struct-a" in steps[first] | steps[first + 1]
    assert mesh.steps_of("struct-a")[-1] > first


def test_requests_that_come_together_are_in_one_step_formed_next(mesh: RunningMesh) -> None:
    """Through a session, which hands over both in one turn: nothing is formed between them."""
    starts = [make_request(make_prompt(4, seed), 5, request_id=f"pair-{seed}") for seed in range(2)]
    requests = iter([inference_pb2.SessionRequest(start=starts)])
    for _ in mesh.stub.Session(requests, timeout=CALL_TIMEOUT_S):
        pass
    assert mesh.steps_of("pair-0")[0] == mesh.steps_of("pair-1")[0]


def bytes_of_steps(mesh: RunningMesh) -> list[tuple[int, list[list[object]]]]:
    """(bytes, rows) of the steps of the same requests on a fresh epoch: four that go in step with each other."""
    mesh.restart_router()
    starts = [make_request(make_prompt(30, seed), 40, request_id=f"b{seed}") for seed in range(4)]
    requests = iter([inference_pb2.SessionRequest(start=starts)])
    for _ in mesh.stub.Session(requests, timeout=CALL_TIMEOUT_S):
        pass
    return [(step["bytes"], step["rows"]) for step in mesh.steps()]


def test_the_routers_bytes_do_not_grow_with_the_hidden_size(
    single_mesh: RunningMesh, wide: Path, tmp_path: Path
) -> None:
    """Activations never pass through the router: steps of a model twice as wide are as long."""
    wide_mesh = RunningMesh(tmp_path, wide, (1,))
    try:
        wide_mesh.wait_ready()
        found = [
            (mesh.lane.stages[0].description.hidden_size, bytes_of_steps(mesh))
            for mesh in (single_mesh, wide_mesh)
        ]
    finally:
        wide_mesh.close()
    (hidden, narrow_steps), (double, wide_steps) = found
    assert double == 2 * hidden
    assert len(narrow_steps) >= 40
    assert [num_bytes for num_bytes, _ in narrow_steps] == [num_bytes for num_bytes, _ in wide_steps]
    assert [rows for _, rows in narrow_steps] == [rows for _, rows in wide_steps]
    # Four rows go on without a change: that costs next to nothing.
    assert min(num_bytes for num_bytes, _ in narrow_steps) < 32


def test_status_shows_the_deal_of_the_heads_and_the_links(mesh: RunningMesh) -> None:
    lane = mesh.lane
    assert lane.state == admin_pb2.LANE_STATE_READY
    assert not lane.reason
    heads = [
        [(rank.num_heads, rank.num_kv_heads) for rank in stage.description.ranks] for stage in lane.stages
    ]
    assert heads == [[(6, 3)], [(4, 2), (2, 1)], [(6, 3)]]
    assert [stage.state for stage in lane.stages] == ["ready"] * 3
    assert [stage.link_transport for stage in lane.stages] == ["unix"] * 3
    assert all("nccl" in stage.link_reason for stage in lane.stages)
    bounds = [(stage.description.layer_begin, stage.description.layer_end) for stage in lane.stages]
    assert bounds[0][0] == 0
    assert bounds[-1][1] == 6
    assert all(one[1] == other[0] for one, other in pairwise(bounds))
    pids = [pid for stage in mesh.worker_pids() for pid in stage]
    assert len(set(pids)) == 4


def test_the_status_watch_and_the_trace_of_a_request(mesh: RunningMesh) -> None:
    answer = generate(mesh, make_prompt(40), 6, request_id="traced")
    watch = mesh.admin.WatchStatus(admin_pb2.WatchStatusRequest(interval_ms=50), timeout=CALL_TIMEOUT_S)
    one, other = next(watch).status, next(watch).status
    watch.cancel()
    assert other.uptime_seconds > one.uptime_seconds
    trace = mesh.admin.GetRequestTrace(
        admin_pb2.GetRequestTraceRequest(request_id="traced"), timeout=CALL_TIMEOUT_S
    )
    assert (trace.prompt_tokens, trace.output_tokens) == (40, len(answer.token_ids))
    assert 0 < trace.ttft_ms <= trace.total_ms
    assert [stage.stage_index for stage in trace.stages] == [0, 1, 2]


def test_a_stage_starts_with_every_shard_file_but_its_own_deleted(small: Path, tmp_path: Path) -> None:
    """Both stages of the model, each from a folder that lacks what it does not need, and they make a lane."""
    index = json.loads((small / "model.safetensors.index.json").read_text())["weight_map"]
    folders = []
    for stage, layers in enumerate((range(3), range(3, 6))):
        folder = shutil.copytree(small, tmp_path / f"own{stage}")
        own = [f"model.layers.{layer}." for layer in layers]
        own += ["model.embed_tokens."] if stage == 0 else ["model.norm.", "lm_head."]
        needed = {name for tensor, name in index.items() if tensor.startswith(tuple(own))}
        for shard in folder.glob("*.safetensors"):
            if shard.name not in needed:
                shard.unlink()
        assert 0 < len(needed) < len(set(index.values()))
        folders.append(folder)
    layers_flags = ("--layers", "0:3"), ("--layers", "3:6")
    stages = [
        start_stage(tmp_path, folder, stage, 2, flags=("--kv-memory", "16MiB", *layers_flags[stage]))
        for stage, folder in enumerate(folders)
    ]
    try:
        router = start_router(tmp_path, small, [address_of(stage) for stage in stages])
        try:
            router.said("lane ready: 2 stages")
        finally:
            router.kill()
    finally:
        for stage in stages:
            stage.kill()


def test_a_live_event_log_replayed_makes_the_steps_that_were_sent(mesh: RunningMesh) -> None:
    """Of everything that this mesh has done so far."""
    calls = [
        mesh.stub.Generate(make_request(make_prompt(length, 3), 20), timeout=CALL_TIMEOUT_S)
        for length in (5, 40, 23, 5)
    ]
    for call in calls:
        read_answer(call)
    sent = mesh.wait_idle().num_steps

    def look() -> list[str] | None:
        lines = (mesh.folder / "events.jsonl").read_text().splitlines(keepends=True)
        whole = [line for line in lines if line.endswith("\n")]
        made = sum('"event":"step"' in line and '"step":""' not in line for line in whole)
        return whole if made >= sent else None

    steps = [step for step in replay(wait_for(look, "the log")) if step.logged]
    assert len(steps) >= sent > 0
    assert all(step.made == step.logged for step in steps)
