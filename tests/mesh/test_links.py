"""Which transport the links of a mesh get, and that another is taken where it cannot be had."""

from __future__ import annotations

import shutil
import subprocess
import tempfile
from pathlib import Path

import pytest
from mesh_calls import generate, make_prompt
from running_mesh import RunningMesh

SIM = ("--engine", "sim", "--cost", "1ms")
ELSEWHERE = (
    "unshare",
    "--map-root-user",
    "--mount",
    "sh",
    "-c",
    'mount -t tmpfs none "$TMPDIR" && exec "$@"',
    "sh",
)
"""Runs a command that sees another $TMPDIR than everybody else."""


def test_a_socket_that_cannot_be_made_and_a_transport_that_is_forced(
    shape: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The stages' folder for sockets has a path that is too long for one, which nobody knows before trying."""
    long = tmp_path / ("x" * 100)
    long.mkdir()
    with monkeypatch.context() as patch:
        patch.setenv("TMPDIR", str(long))
        mesh = RunningMesh(tmp_path, shape, (1, 1), stage_flags=SIM)
    try:
        lane = mesh.wait_ready()
        assert [stage.link_transport for stage in lane.stages] == ["grpc"] * 2
        assert all("unix failed: cannot listen on" in stage.link_reason for stage in lane.stages)
        mesh.router.said("no unix link: cannot listen on")
        expected = generate(mesh, make_prompt(5), 8, seed=3).token_ids
        assert len(expected) == 8

        assert mesh.router.stop() == 0
        mesh.router_flags = ("--link-transport", "unix")
        mesh.start_router()
        assert "cannot listen on" in mesh.wait_reason("opening the lane failed")
    finally:
        mesh.close()

    mesh = RunningMesh(tmp_path, shape, (1, 1), stage_flags=SIM)
    try:
        lane = mesh.wait_ready()
        assert [stage.link_transport for stage in lane.stages] == ["unix"] * 2
        assert generate(mesh, make_prompt(5), 8, seed=3).token_ids == expected
    finally:
        mesh.close()


def test_stages_that_share_a_host_and_no_folder(
    shape: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As two containers do: the same boot id, sockets that only one of them can see."""
    sockets = tempfile.mkdtemp(dir="/tmp")  # tmp_path is too long for a socket
    monkeypatch.setenv("TMPDIR", sockets)
    if not shutil.which("unshare") or subprocess.run([*ELSEWHERE, "true"], check=False).returncode:
        pytest.skip("no namespaces may be made here")
    mesh = RunningMesh(tmp_path, shape, (1, 1), stage_flags=SIM, own_prefix=((), ELSEWHERE))
    try:
        lane = mesh.wait_ready()
        assert [stage.link_transport for stage in lane.stages] == ["grpc"] * 2
        for stage in lane.stages:
            assert "cannot be opened here: No such file or directory" in stage.link_reason
        assert len(generate(mesh, make_prompt(5), 8).token_ids) == 8
    finally:
        mesh.close()
        shutil.rmtree(sockets)
