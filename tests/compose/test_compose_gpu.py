"""The override for GPUs, as far as a machine without them can tell: what docker-compose makes of it."""

from __future__ import annotations

from typing import Any

import pytest
import yaml
from compose_engine import docker
from compose_mesh import TAG
from compose_project import Project

pytestmark = pytest.mark.compose


def test_a_host_gives_its_stage_all_of_its_gpus(images: dict[str, str]) -> None:
    addresses = {
        name: f"10.0.0.1{index}:50061"
        for index, name in enumerate(("ROUTER_ADDRESS", *(f"STAGE_{stage}_ADDRESS" for stage in range(3))))
    }
    host = {"NCCL_SOCKET_IFNAME": "bond0", "HOST_CPUS": "16", "HOST_MEMORY": "60g"}
    files = ["compose.host-stage-1.gpu.yaml"]
    project = Project("stagemesh-gpu", files, {**images, **addresses, **host})
    services: dict[str, Any] = yaml.safe_load(project.compose("config"))["services"]
    stage = services["stage-1"]
    [device] = stage["deploy"]["resources"]["reservations"]["devices"]
    assert (device["driver"], device["count"], device["capabilities"]) == ("nvidia", "all", ["gpu"])
    assert stage["environment"]["NCCL_SOCKET_IFNAME"] == "bond0"
    assert stage["environment"]["STAGEMESH_DEVICE"] == "cuda"
    assert stage["environment"]["STAGEMESH_LISTEN"] == addresses["STAGE_1_ADDRESS"]
    assert (stage["network_mode"], stage["shm_size"], stage["read_only"]) == ("host", "8g", True)
    assert stage["healthcheck"]


def test_the_override_for_gpus_merges(images: dict[str, str]) -> None:
    project = Project("stagemesh-gpu", ["compose.yaml", "compose.gpu.yaml"], {**images, "STAGE_2_GPU": "7"})
    services: dict[str, Any] = yaml.safe_load(project.compose("config"))["services"]
    devices = {
        name: service["deploy"]["resources"]["reservations"]["devices"][0]
        for name, service in services.items()
        if name.startswith("stage-")
    }
    assert {name: device["device_ids"] for name, device in devices.items()} == {
        "stage-0": ["0"],
        "stage-1": ["1", "2"],
        "stage-2": ["7"],
    }
    assert all((d["driver"], d["capabilities"]) == ("nvidia", ["gpu"]) for d in devices.values())
    stage = services["stage-1"]
    assert stage["environment"]["STAGEMESH_DEVICE"] == "cuda"
    assert stage["environment"]["STAGEMESH_TP"] in (2, "2")
    assert stage["environment"]["NCCL_SOCKET_IFNAME"] == "eth0"
    assert stage["build"]["args"]["EXTRA"] == "cuda"
    assert stage["image"].endswith("-cuda")
    assert stage["shm_size"] == "8g"
    assert stage["ulimits"] == {"memlock": -1, "stack": 67108864}
    assert stage["build"]["args"]["BASE_IMAGE"] == "stagemesh-gpu-base"
    assert len(stage["tmpfs"]) == 2, "the scratch of compose.yaml stays, and another comes"
    assert len(stage["volumes"]) == 2, "the model stays, and kernels are kept"
    assert stage["read_only"] is True
    assert "deploy" not in services["router"]


def test_compiled_kernels_outlive_their_container(images: dict[str, str]) -> None:
    """The volume for them, in the image for stages: its user writes there, and runs what lies there the next time."""
    volume, image = "stagemesh-gpu-test_kernels", f"stagemesh-stage:{TAG}"
    container = ["run", "--rm", "--read-only", "--user", "10001:10001", "--cap-drop", "ALL"]
    container += ["--volume", f"{volume}:/var/cache/stagemesh", "--entrypoint", "sh", image, "-c"]
    try:
        docker(*container, "cd /var/cache/stagemesh && echo 'echo kept' > kernel && chmod +x kernel")
        assert docker(*container, "/var/cache/stagemesh/kernel").split() == ["kept"]
    finally:
        docker("volume", "rm", volume)
