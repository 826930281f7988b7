"""The shipped compose.yaml in a Docker engine: limits, networks, an answer, a stage that comes back."""

from __future__ import annotations

import json

import pytest
from compose_engine import docker
from compose_mesh import IMAGES, SERVICES, TAG
from compose_parts import part, say
from compose_project import Project
from compose_questions import QUESTION, ask

pytestmark = pytest.mark.compose

STAGES = SERVICES[1:]
GIB = 1 << 30
CONNECT = """
import socket, sys
for target in sys.argv[1:]:
    host, port = target.split(":")
    try:
        socket.create_connection((host, int(port)), timeout=3).close()
        print(target, "open")
    except OSError as error:
        print(target, "closed", type(error).__name__)
"""


@pytest.mark.parametrize("name", IMAGES)
def test_only_a_stage_has_torch(images: dict[str, str], name: str) -> None:
    code = "import importlib.util, os; print(importlib.util.find_spec('torch') is not None, os.getuid())"
    image = f"stagemesh-{name}:{TAG}"
    output = docker("run", "--rm", "--network", "none", "--entrypoint", "python", image, "-c", code)
    assert output.split() == [str(name == "stage"), "10001"]


@pytest.mark.parametrize("service", SERVICES)
def test_limits_are_those_of_the_file(mesh: Project, service: str) -> None:
    """The engine's own word on it: docker-compose 1.29 passes over what it does not know."""
    container = mesh.inspect(service)
    host, config = container["HostConfig"], container["Config"]
    assert host["Memory"] == (1 if service == "router" else 3) * GIB
    assert host["NanoCpus"] == 2_000_000_000
    assert host["PidsLimit"] > 0
    assert host["ReadonlyRootfs"]
    assert config["User"] == "10001:10001"
    assert config["Hostname"] == service
    assert host["CapDrop"] == ["ALL"]
    assert "no-new-privileges:true" in host["SecurityOpt"]
    assert host["RestartPolicy"]["Name"] == "unless-stopped"
    assert list(host["Tmpfs"]) == ["/tmp"]
    [mount] = container["Mounts"]
    assert (mount["Destination"], mount["RW"]) == ("/models/model.gguf", False)


@pytest.mark.parametrize("service", SERVICES)
def test_nothing_can_be_written_but_scratch(mesh: Project, service: str) -> None:
    code = """
import os
for path in ("/new", "/opt/stagemesh/new", "/models/model.gguf", "/tmp/new"):
    try:
        open(path, "ab").close()
        print(path, "writable")
    except OSError as error:
        print(path, "refused")
print(os.getuid())
"""
    lines = mesh.python(service, code).split("\n")[:5]
    assert lines == [
        "/new refused",
        "/opt/stagemesh/new refused",
        "/models/model.gguf refused",
        "/tmp/new writable",
        "10001",
    ]


def test_an_answer_streams_to_a_client_on_the_edge(mesh: Project) -> None:
    answer = ask(mesh, "first")
    say(f"> {QUESTION}{answer.text}")
    assert len(answer.token_ids) == 24
    assert answer.num_chunks > 4, "the answer came in lumps: it was not streamed"
    status = json.loads(mesh.compose("exec", "-T", "router", "stagemesh", "status", "--json"))
    ranks = [len(stage["description"]["ranks"]) for stage in status["lanes"][0]["stages"]]
    assert ranks == [1, 2, 1]


def test_a_stage_is_out_of_reach_of_clients(mesh: Project) -> None:
    """By name and by address; from the router, which is on both networks, each is in reach."""
    addresses = [mesh.address(stage, "mesh") for stage in STAGES]
    targets = [f"{host}:50061" for host in (*STAGES, *addresses)]
    from_router = mesh.python("router", CONNECT, *targets)
    assert from_router.split("\n")[:6] == [f"{target} open" for target in targets]
    router = f"{mesh.address('router', 'mesh')}:50051"
    from_client = mesh.client_python(CONNECT, "router:50051", router, *targets).split("\n")
    assert from_client[0] == "router:50051 open"
    assert [line.split()[:2] for line in from_client[1:8]] == [
        [target, "closed"] for target in (router, *targets)
    ]


def test_a_stage_has_no_way_out(mesh: Project) -> None:
    """`mesh` is internal: from a stage, the router's address on the other network is unreachable."""
    edge = f"{mesh.address('router', 'edge')}:50051"
    for stage in STAGES:
        assert mesh.python(stage, CONNECT, edge).split()[:2] == [edge, "closed"]


def test_a_restarted_stage_gives_the_same_answer(mesh: Project) -> None:
    before = ask(mesh, "before-restart")
    with part("stage-1 stopped and started"):
        pid = mesh.inspect("stage-1")["State"]["Pid"]
        mesh.compose("stop", "--timeout", "15", "stage-1")
        assert mesh.inspect("stage-1")["State"]["Status"] == "exited"
        assert mesh.inspect("stage-1")["State"]["ExitCode"] == 0, (
            "it did not end by itself when it was asked to"
        )
        mesh.compose("start", "stage-1")
        mesh.wait_healthy(*SERVICES, timeout_s=120)
        assert mesh.inspect("stage-1")["State"]["Pid"] != pid
    mesh.compose("exec", "-T", "router", "stagemesh", "health", "127.0.0.1:50051")
    after = ask(mesh, "after-restart")
    assert after.token_ids == before.token_ids
    assert len(after.token_ids) == 24
