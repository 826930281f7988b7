"""The override for GPUs, as far as a machine without them can tell: what docker-compose makes of it."""

from __future__ import annotations

from typing import Any

import pytest
import yaml
from compose_project import Project

pytestmark = pytest.mark.compose


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
    assert len(stage["tmpfs"]) == 2, "the scratch of compose.yaml stays, and another comes"
    assert stage["read_only"] is True
    assert "deploy" not in services["router"]
