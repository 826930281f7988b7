"""`stagemesh doctor` across a real network: from the router's container to a stage's."""

from __future__ import annotations

import json
import time

import pytest
from compose_commands import CommandError
from compose_engine import docker
from compose_project import Project

pytestmark = pytest.mark.compose

_TIMEOUT_S = 20.0


def test_the_doctor_measures_the_way_to_a_stages_container(mesh: Project) -> None:
    serve = ["stagemesh", "doctor", "--serve", "--listen", "0.0.0.0:50060", "--insecure", "--for", "60"]
    docker("exec", "--detach", mesh.container("stage-0"), *serve)
    deadline = time.monotonic() + _TIMEOUT_S
    while True:
        command = [
            "stagemesh",
            "doctor",
            "--role",
            "router",
            "--peers",
            "stage-0",
            "--seconds",
            "0.2",
            "--json",
        ]
        try:
            output = mesh.compose("exec", "-T", "router", *command)
            break
        except CommandError:  # it serves in a moment
            if time.monotonic() > deadline:
                raise
            time.sleep(0.5)
    findings = {finding["check"]: finding for finding in json.loads(output)["findings"]}
    route = findings["stage-0 route"]["values"]
    assert route["interface"].startswith("eth")
    assert route["source"] == mesh.address("router", "mesh")
    assert route["address"] == mesh.address("stage-0", "mesh")
    assert findings["stage-0 version"]["values"]["host"] == "stage-0"
    clock = findings["stage-0 clock"]["values"]
    # One machine, one clock: whatever the way takes, the estimate must cover that.
    assert abs(clock["offset_ms"]) <= clock["error_ms"] + 0.1
    assert findings["stage-0 bandwidth"]["values"]["there_mb_per_s"] > 0
    assert "stagemesh router" in findings["port 50051"]["values"]["owner"]
    assert findings["memory"]["values"]["limit_bytes"] == 1 << 30
