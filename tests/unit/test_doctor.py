"""`stagemesh doctor`: each check with something wrong in front of it, and a real peer in this process."""

from __future__ import annotations

import json
import os
import re
import socket
import sysconfig
import time
import tomllib
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import grpc
import pytest
from scripted_router import WAIT_S, ScriptedRouter

from stagemesh.client.cli import main
from stagemesh.client.doctor import echo_server, gpus, limits, peer, route, versions
from stagemesh.client.doctor.echo import clock_sample
from stagemesh.client.doctor.echo_server import EchoServer
from stagemesh.client.doctor.examine import DEFAULT_PORTS, examine
from stagemesh.client.doctor.finding import Finding, Level, worst
from stagemesh.client.doctor.ports import check_port
from stagemesh.router.config import RouterConfig
from stagemesh.stage.config import StageConfig
from stagemesh.v1 import doctor_pb2 as pb
from stagemesh.v1 import doctor_pb2_grpc
from stagemesh.wire import cgroup
from stagemesh.wire.errors import ConfigError


@pytest.fixture(autouse=True)
def patient(monkeypatch: pytest.MonkeyPatch) -> None:
    """A peer on a busy machine takes its time; no test here is of the limits."""
    monkeypatch.setattr("stagemesh.client.doctor.peer._TIMEOUT_S", WAIT_S)
    monkeypatch.setattr("stagemesh.client.doctor.echo._CALL_TIMEOUT_S", WAIT_S)


@pytest.fixture
def echo() -> Iterator[EchoServer]:
    with EchoServer("127.0.0.1:0") as server:
        yield server


def only(findings: list[Finding], word: str) -> Finding:
    [found] = [finding for finding in findings if word in finding.check]
    return found


def run(*args: str, capsys: pytest.CaptureFixture[str]) -> tuple[int, str]:
    with pytest.raises(SystemExit) as caught:
        main(("doctor", *args))
    return int(caught.value.code or 0), capsys.readouterr().out


# ── the node ────────────────────────────────────────────────────────────────────────────────────────────────


def test_this_environment_has_what_a_stage_and_a_router_need() -> None:
    assert versions.guess_role() == "stage"
    for role in versions.ROLES:
        assert worst(versions.check_versions(role)) is Level.OK
    assert {"torch", "grpcio"} <= set(versions.needed_packages("stage"))
    assert "torch" not in versions.needed_packages("router")
    assert "numpy" not in versions.needed_packages("client")


def test_a_missing_package_fails_with_the_extra_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    real = versions.installed_version
    monkeypatch.setattr(versions, "installed_version", lambda name: None if name == "torch" else real(name))
    finding = only(versions.check_versions("stage"), "packages")
    assert finding.level is Level.FAIL
    assert "not installed: torch" in finding.found
    assert finding.todo == "pip install 'stagemesh[stage]'"
    assert versions.guess_role() == "router"


def test_the_pythons_it_accepts_are_those_of_the_project(monkeypatch: pytest.MonkeyPatch) -> None:
    project = tomllib.loads((Path(__file__).parents[2] / "pyproject.toml").read_text())["project"]
    low, high = re.findall(r"3\.(\d+)", project["requires-python"])
    for minor, level in (
        (int(low) - 1, "fail"),
        (int(low), "ok"),
        (int(high) - 1, "ok"),
        (int(high), "fail"),
    ):
        monkeypatch.setattr(versions.sys, "version_info", (3, minor, 0))
        assert only(versions.check_versions("client"), "python").level == level


def fake_smi(folder: Path, monkeypatch: pytest.MonkeyPatch, script: str) -> None:
    program = folder / "nvidia-smi"
    program.write_text(f"#!/bin/sh\n{script}\n")
    program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{folder}:/usr/bin:/bin")


def test_gpus_are_listed_and_a_busy_one_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rows = "0, NVIDIA H100, 81559, 1, 580.1\n1, NVIDIA H100, 81559, 40000, 580.1"
    fake_smi(tmp_path, monkeypatch, f"echo '{rows}'")
    finding = only(gpus.check_gpus("stage", wanted=True), "GPUs")
    assert finding.level is Level.WARN
    assert "0: NVIDIA H100 81559 MiB (1 used)" in finding.found
    assert finding.values["busy"] == "1"
    assert gpus.check_gpus("router", wanted=False) == []


def test_no_gpu_fails_only_where_one_is_wanted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fake_smi(tmp_path, monkeypatch, "echo 'No devices were found'; exit 6")
    assert only(gpus.check_gpus("stage", wanted=False), "GPUs").level is Level.OK
    finding = only(gpus.check_gpus("stage", wanted=True), "GPUs")
    assert (finding.level, finding.found) == (Level.FAIL, "nvidia-smi fails: No devices were found")


@pytest.mark.parametrize(
    ("programs", "flashinfer", "level", "said"),
    [
        (("gcc", "c++", "nvcc", "ninja"), "0.6.12", Level.OK, "FlashInfer 0.6.12; "),
        (("gcc", "c++", "nvcc", "ninja"), None, Level.WARN, "no FlashInfer"),
        (("gcc", "c++", "ninja"), "0.6.12", Level.WARN, "there is not nvcc"),
        (("nvcc", "c++", "ninja"), "0.6.12", Level.FAIL, "there is not a C compiler"),
    ],
)
def test_what_compiles_kernels_is_looked_for(
    programs: tuple[str, ...],
    flashinfer: str | None,
    level: Level,
    said: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    fake_smi(tmp_path, monkeypatch, "echo '0, NVIDIA H100, 81559, 1, 580.1'")
    for name in programs:
        (tmp_path / name).symlink_to("/bin/true")
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setenv("CUDA_HOME", str(tmp_path / "toolkit"))
    if "nvcc" in programs:
        (tmp_path / "toolkit" / "bin").mkdir(parents=True)
        (tmp_path / "toolkit" / "bin" / "nvcc").symlink_to("/bin/true")
    monkeypatch.setattr(sysconfig, "get_path", lambda name, scheme: str(tmp_path))
    (tmp_path / "Python.h").touch()
    monkeypatch.setattr(gpus, "installed_version", {"flashinfer-python": flashinfer}.get)
    finding = only(gpus.check_gpus("stage", wanted=True), "kernels")
    assert finding.level is level
    assert said in finding.found


def test_an_interface_of_nccl_that_does_not_exist_fails(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fake_smi(tmp_path, monkeypatch, "echo '0, NVIDIA H100, 81559, 1, 580.1'")
    for value, level in (("nosuch0", Level.FAIL), ("lo", Level.OK), ("=l", Level.FAIL)):
        monkeypatch.setenv("NCCL_SOCKET_IFNAME", value)
        assert only(gpus.check_gpus("stage", wanted=True), "interface").level is level


@pytest.mark.parametrize(
    ("files", "quota", "memory", "threads"),
    [
        ({"cpu.max": "150000 100000", "memory.max": "1073741824"}, 1.5, 1 << 30, 1),
        ({"cpu.max": "max 100000", "memory.max": "max"}, None, None, 8),
        ({"cpu.max": "600000 100000"}, 6.0, None, 6),
        ({"cpu.max": "1600000 100000"}, 16.0, None, 8),
        (
            {
                "cpu/cpu.cfs_quota_us": "50000",
                "cpu/cpu.cfs_period_us": "100000",
                "memory/memory.limit_in_bytes": "9223372036854771712",
            },
            0.5,
            None,
            1,
        ),
        ({"cpu/cpu.cfs_quota_us": "-1", "cpu/cpu.cfs_period_us": "100000"}, None, None, 8),
    ],
)
def test_limits_of_a_container_are_seen(
    files: dict[str, str],
    quota: float | None,
    memory: int | None,
    threads: int,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    for name, text in files.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(text + "\n")
    monkeypatch.setattr(cgroup, "ROOT", tmp_path)
    monkeypatch.setattr(limits.os, "sched_getaffinity", lambda _: set(range(8)))
    findings = limits.check_limits("stage", gpus=False)
    cores = only(findings, "cores")
    [found_memory] = [finding for finding in findings if finding.check == "memory"]
    assert cores.values["quota"] == quota
    assert cores.level is (Level.WARN if quota == 0.5 else Level.OK), "less than a core"
    assert StageConfig(model="m").num_threads == threads
    assert StageConfig(model="m", tp=2).num_threads == max(1, threads // 2)
    assert StageConfig(model="m", threads=5).num_threads == 5
    assert found_memory.values["limit_bytes"] == memory
    assert found_memory.level is (Level.OK if memory is None else Level.WARN)


def test_a_port_in_use_names_who_has_it() -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        address = f"127.0.0.1:{listener.getsockname()[1]}"
        finding = check_port(address)
        assert finding.level is not Level.OK
        assert str(finding.values["owner"]).startswith(f"{os.getpid()} ")
    assert check_port(address).level is Level.OK
    assert check_port("192.0.2.1:50061").level is Level.FAIL, "an address that this machine does not have"
    assert check_port("nowhere").level is Level.FAIL


def test_the_default_ports_are_those_of_the_settings() -> None:
    defaults = {name: field.default for name, field in RouterConfig.model_fields.items()}
    assert DEFAULT_PORTS["router"] == (defaults["listen"], defaults["admin"])
    assert DEFAULT_PORTS["stage"] == (StageConfig.model_fields["listen"].default,)


# ── peers ───────────────────────────────────────────────────────────────────────────────────────────────────


def test_a_peer_is_measured(echo: EchoServer) -> None:
    findings = peer.check_peer(echo.address, seconds=0.1)
    assert [finding.check.partition(" ")[2] for finding in findings] == [
        "route",
        "version",
        "latency",
        "clock",
        "bandwidth",
    ]
    assert only(findings, "route").values["interface"] == "lo"
    assert only(findings, "version").values["host"] == socket.gethostname()
    assert float(str(only(findings, "latency").values["median_ms"])) > 0
    bandwidth = only(findings, "bandwidth").values
    assert float(str(bandwidth["there_mb_per_s"])) > 0
    assert float(str(bandwidth["back_mb_per_s"])) > 0


@pytest.mark.parametrize("offset_s", [5.0, -3.0])
def test_a_clock_that_is_off_is_found_within_its_stated_error(
    echo: EchoServer, offset_s: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    clock = SimpleNamespace(time_ns=lambda: time.time_ns() + int(offset_s * 1e9))
    monkeypatch.setattr(echo_server, "time", clock)
    finding = only(peer.check_peer(echo.address, seconds=0), "clock")
    values = {name: float(str(value)) for name, value in finding.values.items()}
    assert finding.level is Level.WARN
    # The rounding of the values is on top of the error.
    assert abs(values["offset_ms"] - offset_s * 1000) <= values["error_ms"] + 0.001


def test_the_offset_of_one_round_trip() -> None:
    """Left at 100, there at 1,130, off at 1,150, back 60 later: 40 on the way, and 1,000 ahead if both ways are 20."""
    assert clock_sample(100, 60, 1_120, 1_140) == (20.0, 1_000.0)
    error, offset = clock_sample(100, 60, 1_135, 1_155)  # 35 there and 5 back
    assert abs(offset - 1_000) <= error


def test_a_protocol_that_does_not_fit_fails(echo: EchoServer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(echo_server, "MAJOR", 9)
    assert only(peer.check_peer(echo.address, seconds=0), "version").level is Level.FAIL


def test_nothing_there_a_name_that_is_none_and_a_router() -> None:
    finding = only(peer.check_peer("127.0.0.1:1", seconds=0), "answer")
    assert finding.level is Level.FAIL
    assert "stagemesh doctor --serve" in finding.todo
    assert worst(peer.check_peer("no-such-host.invalid", seconds=0)) is Level.FAIL
    with ScriptedRouter() as router:
        finding = only(peer.check_peer(router.address, seconds=0), "answer")
    assert finding.level is Level.WARN
    assert "a router or a stage answers" in finding.found


def test_the_way_to_a_peer() -> None:
    assert route.find_route("127.0.0.9", 50060).interface == "lo"
    assert route.interface_of("::1") in ("lo", "")
    assert route.interface_of("192.0.2.1") == ""
    assert peer.peer_address("stage-1") == "stage-1:50060"
    assert peer.peer_address("[::1]") == "[::1]:50060"
    assert peer.peer_address("stage-1:7") == "stage-1:7"


def test_the_server_is_bounded_and_on_loopback_unless_told(echo: EchoServer) -> None:
    with pytest.raises(ConfigError, match="--insecure"):
        EchoServer("0.0.0.0:0")
    with grpc.insecure_channel(echo.address) as channel, pytest.raises(grpc.RpcError) as caught:
        doctor_pb2_grpc.DoctorServiceStub(channel).Echo(pb.EchoRequest(reply_bytes=1 << 30), timeout=WAIT_S)
    assert caught.value.code() is grpc.StatusCode.INVALID_ARGUMENT


# ── the command ─────────────────────────────────────────────────────────────────────────────────────────────


def test_the_command_exits_with_1_on_a_failure_alone(
    echo: EchoServer, capsys: pytest.CaptureFixture[str]
) -> None:
    flags = ("--role", "client", "--seconds", "0", "--json", "--peers")
    code, out = run(*flags, echo.address, capsys=capsys)
    result = json.loads(out)
    assert (code, result["level"] == "fail") == (0, False)
    assert {finding["check"] for finding in result["findings"]} >= {"python", f"{echo.address} clock"}
    code, out = run(*flags, "127.0.0.1:1", capsys=capsys)
    assert (code, json.loads(out)["level"]) == (1, "fail")
    assert all(finding["todo"] for finding in json.loads(out)["findings"] if finding["level"] != "ok")


def test_the_table_says_what_to_do(capsys: pytest.CaptureFixture[str]) -> None:
    _, out = run("--role", "client", "--peers", "127.0.0.1:1", capsys=capsys)
    assert re.search(r"127\.0\.0\.1:1 answer +fail +no connection to 127\.0\.0\.1:1", out)
    assert "stagemesh doctor --serve" in out


def test_serve_ends_by_itself_and_bad_values_are_named(capsys: pytest.CaptureFixture[str]) -> None:
    code, out = run("--serve", "--listen", "127.0.0.1:0", "--for", "0.1", capsys=capsys)
    assert code == 0
    assert out.startswith("answering on 127.0.0.1:")
    with pytest.raises(SystemExit) as caught:
        main(("doctor", "--role", "king"))
    assert caught.value.code == 2
    assert "--role: 'king'" in capsys.readouterr().err


def test_a_whole_node_is_examined_without_a_peer() -> None:
    checks = {finding.check for finding in examine("stage", device="cpu", listen=["127.0.0.1:0"])}
    assert checks == {"python", "packages", "cores", "memory", "shared memory", "open files", "port 0"}
