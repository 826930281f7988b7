"""`stagemesh up` as a real process, with children whose serve.run is a script: who lives, and who dies."""

from __future__ import annotations

import asyncio
import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from scripted_router import WAIT_S

from stagemesh.client.cli._child import ChildSpec
from stagemesh.client.cli._supervisor import Supervisor
from stagemesh.wire.cgroup import usable_cores
from stagemesh.wire.errors import StartupError

CHILD = """
import json, os, signal, sys, threading, types

def log(**line):
    with open(os.environ["FAKE_LOG"], "a") as file:
        file.write(json.dumps(line) + "\\n")

def serve(name, config):
    stop = threading.Event()
    def on_signal(signum, frame):
        log(event="stop", name=name, signal=signum)
        stop.set()
    signal.signal(signal.SIGTERM, on_signal)
    signal.signal(signal.SIGINT, on_signal)
    secrets = [key for key in os.environ if key == "STAGEMESH_PDEATHSIG" or key == "STAGEMESH_KV_MEMORY"]
    log(event="start", name=name, pid=os.getpid(), config=config.model_dump(), secrets=secrets)
    print(name, "speaks", flush=True)
    return stop

def run_stage(config):
    from stagemesh.wire.errors import ModelError
    if os.environ.get("FAKE_BAD_STAGE") == config.stage:
        raise ModelError("model.gguf: truncated")
    serve("stage " + config.stage.partition("/")[0], config).wait()

def run_router(config):
    from scripted_router import ScriptedRouter
    port = lambda address: int(address.rpartition(":")[2])
    stop = serve("router", config)
    if os.environ.get("FAKE_SLOW_ROUTER"):
        stop.wait()
        return
    with ScriptedRouter(port=port(config.listen)), ScriptedRouter(port=port(config.admin)):
        stop.wait()

for package, run in (("stage", run_stage), ("router", run_router)):
    module = types.ModuleType(f"stagemesh.{package}.serve")
    module.run = run
    sys.modules[module.__name__] = module

from stagemesh.client.cli import main
main()
"""
DRIVER = """
import sys
from stagemesh.client.cli import main, up

real = up.command_line
up.check_stages = lambda plan: None  # there is no model
up.command_line = lambda name, config: (sys.executable, {child!r}, *real(name, config)[3:])
main()
"""


class Mesh:
    """One `stagemesh up`, in a session of its own, and what its children logged."""

    def __init__(self, folder: Path) -> None:
        (folder / "child.py").write_text(CHILD)
        (folder / "driver.py").write_text(DRIVER.format(child=str(folder / "child.py")))
        self._folder = folder
        self._log = folder / "log"
        self._log.touch()
        self.process: subprocess.Popen[str] | None = None

    def start(self, *args: str, **env: str) -> subprocess.Popen[str]:
        path = os.pathsep.join([str(Path(__file__).parent), *sys.path])
        self.process = subprocess.Popen(
            [sys.executable, str(self._folder / "driver.py"), "up", "model.gguf", *args],
            env={**os.environ, "PYTHONPATH": path, "FAKE_LOG": str(self._log), **env},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            start_new_session=True,
        )
        return self.process

    def events(self, event: str) -> list[dict[str, Any]]:
        lines = [
            json.loads(line) for line in self._log.read_text().splitlines(keepends=True) if line[-1] == "\n"
        ]
        return [line for line in lines if line["event"] == event]

    def wait_for_starts(self, count: int) -> list[dict[str, Any]]:
        wait_until(lambda: len(self.events("start")) >= count)
        return self.events("start")

    def pids(self) -> list[int]:
        return [line["pid"] for line in self.events("start")]

    def finish(self) -> tuple[int, str, str]:
        assert self.process is not None
        out, err = self.process.communicate(timeout=WAIT_S)
        return self.process.returncode, out, err


ANY_PORTS = ("--stage-port", "0", "--listen", "127.0.0.1:0", "--admin", "127.0.0.1:0")


@pytest.fixture
def mesh(tmp_path: Path) -> Iterator[Mesh]:
    mesh = Mesh(tmp_path)
    yield mesh
    if mesh.process is not None:
        mesh.process.kill()
        mesh.process.communicate()
    for pid in mesh.pids():
        if is_alive(pid):
            os.kill(pid, signal.SIGKILL)


def is_alive(pid: int) -> bool:
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except OSError:  # also ProcessLookupError: it may go between open and read
        return False
    return state not in "ZX"


def wait_until(condition: Any, timeout_s: float = WAIT_S) -> None:
    deadline = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < deadline, "waited in vain"
        time.sleep(0.02)


def test_up_serves_and_ctrl_c_stops_all_of_it_and_nothing_else(mesh: Mesh, tmp_path: Path) -> None:
    ready_file = tmp_path / "ready.json"
    options = ("--tp", "1,2,1", "--kv-memory", "1GiB", "--step-tokens", "64", "--ready-file", str(ready_file))
    process = mesh.start(*options, *ANY_PORTS, STAGEMESH_KV_MEMORY="7KiB")
    assert process.stdout is not None
    line = process.stdout.readline()
    found = re.fullmatch(
        r"stagemesh ready on (127\.0\.0\.1:\d+) \(3 stages, TP 1·2·1, model scripted, \d+\.\d s\)\n", line
    )
    assert found, line
    ready = json.loads(ready_file.read_text())
    # The scripted router is ready whether or not its stages have come that far.
    starts = {start["name"]: start for start in mesh.wait_for_starts(4)}
    assert set(starts) == {"stage 0", "stage 1", "stage 2", "router"}
    router, stage = starts["router"]["config"], starts["stage 1"]["config"]
    assert router["stages"] == ready["stages"] == [starts[f"stage {n}"]["config"]["listen"] for n in range(3)]
    assert (router["listen"], router["step_tokens"]) == (found[1], 64) == (ready["listen"], 64)
    assert (stage["stage"], stage["tp"], stage["shared_cores"], stage["threads"]) == (
        "1/3",
        2,
        True,
        max(1, usable_cores() // 2),
    )
    # The flag, although it is the default, beats the variable; and no child sees either variable.
    assert stage["kv_memory"] == 1 << 30
    assert all(start["secrets"] == [] for start in starts.values())

    bystander = subprocess.Popen(["sleep", "60"])
    os.killpg(process.pid, signal.SIGINT)  # as a terminal does it
    code, out, err = mesh.finish()
    assert (code, out) == (0, "")
    assert "stage 1 | stage 1 speaks" in err
    assert "up | 3 stages, TP 1·2·1: 4 workers, threads of each " in err
    stops = mesh.events("stop")
    assert [stop["signal"] for stop in stops] == [signal.SIGTERM] * 4
    assert stops[0]["name"] == "router"
    assert not any(is_alive(pid) for pid in mesh.pids())
    assert is_alive(bystander.pid)
    bystander.kill()
    bystander.wait()


def test_a_stage_that_cannot_start_ends_everything_with_its_words(mesh: Mesh) -> None:
    # A router without its stages is never ready; the scripted one would be, and before a slow stage has failed.
    mesh.start("--stages", "2", *ANY_PORTS, FAKE_BAD_STAGE="1/2", FAKE_SLOW_ROUTER="1")
    code, out, err = mesh.finish()
    assert (code, out) == (1, "")
    assert (
        err.splitlines()[-1]
        == "error: stage 1 exited with code 1 before the mesh was ready: model.gguf: truncated"
    )
    assert not any(is_alive(pid) for pid in mesh.pids())


def test_ctrl_c_before_ready_stops_all(mesh: Mesh) -> None:
    process = mesh.start("--stages", "1", *ANY_PORTS, FAKE_SLOW_ROUTER="1")
    mesh.wait_for_starts(2)
    process.send_signal(signal.SIGTERM)
    code, out, _ = mesh.finish()
    assert (code, out) == (0, "")
    assert not any(is_alive(pid) for pid in mesh.pids())


def test_a_lost_stage_is_started_again_and_a_lost_router_ends_all(mesh: Mesh) -> None:
    process = mesh.start("--stages", "1", *ANY_PORTS)
    assert process.stdout is not None
    assert "ready" in process.stdout.readline()
    pids = {start["name"]: start["pid"] for start in mesh.wait_for_starts(2)}
    os.kill(pids["stage 0"], signal.SIGKILL)
    starts = mesh.wait_for_starts(3)
    assert starts[-1]["name"] == "stage 0"
    assert starts[-1]["config"] == next(start["config"] for start in starts if start["name"] == "stage 0")
    os.kill(pids["router"], signal.SIGKILL)
    code, _, err = mesh.finish()
    assert code == 1
    assert "up | stage 0 was killed by SIGKILL; starting it again in 0.5 s" in err
    assert err.splitlines()[-1].startswith("error: the router was killed by SIGKILL")
    assert not any(is_alive(pid) for pid in mesh.pids())


def test_children_die_with_an_up_that_is_killed(mesh: Mesh) -> None:
    process = mesh.start("--stages", "2", *ANY_PORTS, FAKE_SLOW_ROUTER="1")
    mesh.wait_for_starts(3)
    process.kill()
    wait_until(lambda: not any(is_alive(pid) for pid in mesh.pids()))
    assert mesh.events("stop") == []


@pytest.mark.parametrize(
    ("flag", "port_of"),
    [("--listen", "127.0.0.1:{}"), ("--admin", "127.0.0.1:{}"), ("--stage-port", "{}")],
)
def test_a_port_in_use_is_named_and_nothing_starts(mesh: Mesh, flag: str, port_of: str) -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port = listener.getsockname()[1]
        mesh.start(*ANY_PORTS, flag, port_of.format(port))
        code, out, err = mesh.finish()
    assert (code, out) == (1, "")
    advice = f"stop what listens there or give another {flag}"
    assert err == f"error: {flag}: port {port} on 127.0.0.1 is in use; {advice}\n"
    assert mesh.pids() == []


def test_an_open_address_needs_insecure(mesh: Mesh) -> None:
    mesh.start(*ANY_PORTS, "--listen", "0.0.0.0:0")
    code, _, err = mesh.finish()
    assert code == 2
    assert err.startswith("error: --listen: 0.0.0.0:0 is reachable from other machines")


class Quiet:
    def __init__(self) -> None:
        self.notes: list[str] = []

    def child_line(self, name: str, line: str) -> None:
        if line == "up":
            os.kill(os.getpid(), signal.SIGTERM)

    def note(self, text: str) -> None:
        self.notes.append(text)


async def never() -> None:
    await asyncio.Event().wait()


async def test_a_child_that_will_not_end_is_killed_with_its_group() -> None:
    stubborn = (
        "import signal, subprocess; signal.signal(signal.SIGTERM, signal.SIG_IGN);"
        "child = subprocess.Popen(['sleep', '60']); print(child.pid, flush=True); print('up', flush=True);"
        "signal.pause()"
    )
    seen: list[str] = []

    class Display(Quiet):
        def child_line(self, name: str, line: str) -> None:
            seen.append(line)
            super().child_line(name, line)

    display = Display()
    supervisor = Supervisor(
        [],
        ChildSpec(name="router", args=(sys.executable, "-c", stubborn)),
        until_ready=never,
        on_ready=never,
        display=display,
        grace_s=0.3,
    )
    await supervisor.run()
    assert display.notes == ["router did not end within 0.3 s; killing it"]
    wait_until(lambda: not is_alive(int(seen[0])))


async def test_a_failing_probe_is_an_error_and_stops_the_children() -> None:
    async def failing() -> None:
        raise StartupError("not a router")

    spec = ChildSpec(name="router", args=("sleep", "60"))
    supervisor = Supervisor([], spec, until_ready=failing, on_ready=never, display=Quiet())
    with pytest.raises(StartupError, match="not a router"):
        await asyncio.wait_for(supervisor.run(), WAIT_S)
