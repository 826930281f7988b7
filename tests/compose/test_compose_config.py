"""Every combination of files that the docs name, read by docker-compose 1.29 and, where there is one, by compose v2."""

from __future__ import annotations

import os
from functools import cache
from typing import Any

import pytest
import yaml
from compose_commands import CommandError
from compose_packages import find
from compose_project import Project

pytestmark = pytest.mark.compose

MESH = {"router", "stage-0", "stage-1", "stage-2"}
CLIENT, SCREENS = {"client"}, {"collector", "jaeger", "prometheus", "grafana"}
GIVEN = {
    "ROUTER_ADDRESS": "10.0.0.10:50051",
    "STAGE_0_ADDRESS": "10.0.0.11:50061",
    "STAGE_1_ADDRESS": "10.0.0.12:50061",
    "STAGE_2_ADDRESS": "10.0.0.13:50061",
    "NCCL_SOCKET_IFNAME": "bond0",
    "HOST_CPUS": "16",
    "HOST_MEMORY": "60g",
}
COMBINATIONS = {
    "one host": (["compose.yaml"], MESH | CLIENT | SCREENS),
    "one host with GPUs": (["compose.yaml", "compose.gpu.yaml"], MESH | CLIENT | SCREENS),
    **{f"host of {name}": ([f"compose.host-{name}.yaml"], {name}) for name in sorted(MESH)},
    **{
        f"host of {name} with GPUs": ([f"compose.host-{name}.gpu.yaml"], {name})
        for name in sorted(MESH - {"router"})
    },
}
SAME = ("user", "read_only", "cap_drop", "security_opt", "tmpfs", "image", "restart", "hostname", "command")
"""What both versions write alike, if they read it alike."""


@cache
def compose_v2() -> str | None:
    """A program of compose v2: STAGEMESH_COMPOSE_V2, or docker's plugin."""
    if given := os.environ.get("STAGEMESH_COMPOSE_V2"):
        return given
    for folder in ("/usr/libexec", "/usr/local/libexec", "/usr/lib", "/usr/local/lib"):
        if os.access(plugin := f"{folder}/docker/cli-plugins/docker-compose", os.X_OK):
            return plugin
    return None


def config(program: str, files: list[str], *flags: str) -> dict[str, Any]:
    """The services as that program reads them."""
    project = Project("stagemesh-config", files, GIVEN)
    output = project.compose(*flags, "config", program=program)
    services: dict[str, Any] = yaml.safe_load(output)["services"]
    return services


@pytest.mark.parametrize("name", COMBINATIONS)
def test_docker_compose_1_29_reads_it(docker_engine: str, name: str) -> None:
    files, services = COMBINATIONS[name]
    assert set(config(find("docker-compose") or "docker-compose", files)) == services


@pytest.mark.parametrize("name", COMBINATIONS)
def test_compose_v2_reads_the_same(docker_engine: str, name: str) -> None:
    program = compose_v2()
    if program is None:
        pytest.skip("no compose v2 here; STAGEMESH_COMPOSE_V2 may name one")
    files, services = COMBINATIONS[name]
    profiles = ("--profile", "client", "--profile", "observability")
    new = config(program, files, *profiles)
    old = config(find("docker-compose") or "docker-compose", files)
    assert set(new) == services
    for service, content in new.items():
        assert {key: content.get(key) for key in SAME} == {key: old[service].get(key) for key in SAME}, (
            service
        )
        assert environment(content) == environment(old[service]), service
        assert set(content.get("networks") or ()) == set(old[service].get("networks") or ())


@pytest.mark.parametrize("suffix", ["", ".gpu"])
def test_a_stage_of_several_hosts_has_the_limits_and_metrics_it_is_given(
    docker_engine: str, suffix: str
) -> None:
    given = {**GIVEN, "STAGE_1_METRICS": "10.0.0.12:9464", "HOST_KV_MEMORY": "8GiB", "TRACE_RANKS": "1"}
    project = Project("stagemesh-config", [f"compose.host-stage-1{suffix}.yaml"], given)
    stage = yaml.safe_load(project.compose("config"))["services"]["stage-1"]
    assert (float(stage["cpus"]), stage["mem_limit"]) == (16.0, "60g")
    told = environment(stage)
    assert told["STAGEMESH_METRICS"] == "10.0.0.12:9464"
    assert (told["STAGEMESH_THREADS"], told["STAGEMESH_KV_MEMORY"], told["STAGEMESH_TRACE_RANKS"]) == (
        "0",
        "8GiB",
        "1",
    )


@pytest.mark.parametrize("version", ["1.29", "v2"])
def test_a_missing_address_is_named(docker_engine: str, version: str) -> None:
    program = compose_v2() if version == "v2" else find("docker-compose")
    if program is None:
        pytest.skip("no compose v2 here; STAGEMESH_COMPOSE_V2 may name one")
    given = {name: address for name, address in GIVEN.items() if name != "STAGE_1_ADDRESS"}
    project = Project("stagemesh-config", ["compose.host-stage-1.yaml"], given)
    with pytest.raises(CommandError, match=r"STAGE_1_ADDRESS|an address of this host with a port"):
        project.compose("config", program=program)


def environment(service: dict[str, Any]) -> dict[str, str]:
    found: dict[str, Any] = service.get("environment") or {}
    return {name: "" if value is None else str(value) for name, value in found.items()}
