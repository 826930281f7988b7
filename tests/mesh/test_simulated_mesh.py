"""A mesh of simulated engines: it takes the simulator's steps, row for row, and can be measured."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from mesh_processes import wait_for
from running_mesh import CALL_TIMEOUT_S, RunningMesh

from stagemesh.router.scheduler import Step
from stagemesh.router.simulate.simulation import Simulation
from stagemesh.router.simulate.spec import parse
from stagemesh.v1 import inference_pb2 as pb

PROMPT, OUTPUT, STEP_TOKENS = 50, 12, 16
Rows = list[tuple[int, bool]]


def simulated_steps(lookahead: int) -> list[Rows]:
    content = {
        "stages": {"count": 2, "cost": "1ms"},
        "load": {
            "arrivals": "at_once",
            "requests": 1,
            "prompt": {"fixed": PROMPT},
            "output": {"fixed": OUTPUT},
        },
        "lane": {"lookahead": lookahead, "step_tokens": STEP_TOKENS, "max_context": 256},
    }
    simulation = Simulation(parse(content, "test"))
    steps: list[Rows] = []
    next_step = simulation.scheduler.next_step

    def record(now: float) -> Step | None:
        if step := next_step(now):
            steps.append(list(zip(step.counts.tolist(), step.sample.tolist(), strict=True)))
        return step

    simulation.scheduler.next_step = record  # type: ignore[method-assign]
    assert simulation.run().output_tokens == OUTPUT
    return steps


def ask(mesh: RunningMesh) -> list[int]:
    request = pb.GenerateRequest(
        token_ids=pb.TokenIds(ids=range(3, 3 + PROMPT)), max_tokens=OUTPUT, temperature=0.0, ignore_eos=True
    )
    return [token for one in mesh.stub.Generate(request, timeout=CALL_TIMEOUT_S) for token in one.token_ids]


@pytest.mark.parametrize("lookahead", [0, 1])
def test_a_request_takes_the_same_steps(tmp_path: Path, shape: Path, lookahead: int) -> None:
    mesh = RunningMesh(
        tmp_path,
        shape,
        [1, 1],
        stage_flags=("--engine", "sim", "--cost", "1ms"),
        router_flags=("--lookahead", str(lookahead), "--step-tokens", str(STEP_TOKENS)),
    )
    try:
        mesh.wait_ready()
        tokens = ask(mesh)
    finally:
        mesh.close()
    assert len(tokens) == OUTPUT
    lines: list[dict[str, Any]] = [json.loads(line) for line in mesh.step_log.read_text().splitlines()]
    steps = [[(count, sample) for _, count, sample in line["rows"]] for line in lines if "step" in line]
    assert steps == simulated_steps(lookahead)


PLAN_ATTEMPTS = 5


def plan(mesh: RunningMesh) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "stagemesh.client.cli", "plan", "--measure", mesh.admin_listen, "--json"]
    return subprocess.run(command, capture_output=True, text=True, timeout=CALL_TIMEOUT_S, check=False)


def measured_plan(mesh: RunningMesh) -> dict[str, Any]:
    """From the step times of one request, the first of its router."""
    ask(mesh)
    wait_for(lambda: all(stage.step_ms for stage in mesh.lane.stages), "step times of every stage")
    found: dict[str, Any] = json.loads(plan(mesh).stdout)
    return found


def is_as_expected(found: dict[str, Any]) -> bool:
    splits = (found["present_split"], found["split"])
    return bool(splits == ([3, 1], [2, 2]) and found["present_step_ms"][0] >= 30 and found["gain"] > 1)


def test_a_plan_from_the_step_times_of_a_live_mesh(tmp_path: Path, shape: Path) -> None:
    """Three layers that take 30 ms and one that takes 10: two and two is what equalizes them.

    A stall of 50 ms among the 13 steps that teach the costs spoils them; a router that starts knows none, and learns anew.
    """
    mesh = RunningMesh(
        tmp_path,
        shape,
        [1, 1],
        stage_flags=("--engine", "sim"),
        own_flags=(("--layers", "0:3", "--cost", "30ms"), ("--layers", "3:4", "--cost", "10ms")),
    )
    try:
        mesh.wait_ready()
        early = plan(mesh)
        assert early.returncode == 1
        assert "give it some load" in early.stderr
        found = measured_plan(mesh)
        for _ in range(PLAN_ATTEMPTS - 1):
            if is_as_expected(found):
                break
            mesh.restart_router()
            found = measured_plan(mesh)
    finally:
        mesh.close()
    assert is_as_expected(found), found
