"""The files of several hosts, started for real: each "host" is an address of this machine's loopback."""

from __future__ import annotations

from pathlib import Path

import pytest
from compose_mesh import SERVICES, free_port, running
from compose_project import Project
from compose_questions import QUESTION

pytestmark = pytest.mark.compose


def test_a_file_for_each_host_and_one_list_of_addresses(images: dict[str, str], model: Path) -> None:
    addresses = {
        "ROUTER_ADDRESS": f"127.0.0.2:{free_port()}",
        "STAGE_0_ADDRESS": f"127.0.0.3:{free_port()}",
        "STAGE_1_ADDRESS": f"127.0.0.4:{free_port()}",
        "STAGE_2_ADDRESS": f"127.0.0.5:{free_port()}",
        "ROUTER_ADMIN": f"127.0.0.1:{free_port()}",
    }
    files = [f"compose.host-{service}.yaml" for service in SERVICES]
    limits = {"HOST_CPUS": "2", "HOST_MEMORY": "3g", "HOST_KV_MEMORY": "256MiB", "HOST_THREADS": "1"}
    project = Project("stagemesh-hosts", files, {**images, **addresses, **limits, "MODEL": str(model)})
    with running(project, SERVICES):
        command = ["stagemesh", "generate", QUESTION, "--max-tokens", "8", "--temperature", "0"]
        command += ["--address", addresses["ROUTER_ADDRESS"]]
        text = project.compose("exec", "-T", "router", *command).strip()
        assert len(text) > 8
