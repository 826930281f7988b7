"""Flags, variables, mesh.yaml and defaults; the layout that `up` plans; what is imported when."""

from __future__ import annotations

import json
import logging
import os
import subprocess
import sys
import types
from pathlib import Path
from typing import Any

import pytest

from stagemesh.client._defaults import DEFAULT_ADDRESS, DEFAULT_ADMIN_ADDRESS
from stagemesh.client.cli import main
from stagemesh.client.cli._plan import command_line, plan_mesh
from stagemesh.client.cli._sizes import format_size, parse_size
from stagemesh.router.config import MeshFile, RouterConfig
from stagemesh.stage.config import StageConfig
from stagemesh.wire.errors import ConfigError
from stagemesh.wire.logs import setup_logging

MESH = """
model: /models/file
max_context: 100
router: {listen: "127.0.0.1:7000", admin: "127.0.0.1:7001"}
stages:
  - {address: "127.0.0.1:7010", tp: 2}
  - {address: "127.0.0.1:7011", layers: "10:20"}
"""


@pytest.fixture
def mesh_file(tmp_path: Path) -> str:
    path = tmp_path / "mesh.yaml"
    path.write_text(MESH)
    return str(path)


def config_of(monkeypatch: pytest.MonkeyPatch, *args: str) -> Any:
    """The settings that `stagemesh stage|router ...` would run with."""
    got: list[Any] = []
    module = types.ModuleType(f"stagemesh.{args[0]}.serve")
    module.run = got.append  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, module.__name__, module)
    with pytest.raises(SystemExit) as caught:
        main(args)
    assert not caught.value.code, caught.value.code
    return got[0]


def error_of(capsys: pytest.CaptureFixture[str], *args: str) -> str:
    """The one line of a command that is refused with code 2."""
    with pytest.raises(SystemExit) as caught:
        main(args)
    assert caught.value.code == 2
    err = capsys.readouterr().err
    assert err.count("\n") == 1
    return err


def test_without_anything_else_the_models_defaults_hold(monkeypatch: pytest.MonkeyPatch) -> None:
    assert config_of(monkeypatch, "stage", "--model", "m") == StageConfig(model="m")
    router = config_of(monkeypatch, "router", "--model", "m", "--stage", "a:1")
    assert router == RouterConfig(model="m", stages=("a:1",))


def test_flag_beats_variable_beats_file_beats_default(
    monkeypatch: pytest.MonkeyPatch, mesh_file: str
) -> None:
    args = ("stage", "--config", mesh_file, "--index", "1")
    config = config_of(monkeypatch, *args)
    assert (config.model, config.listen, config.layers) == ("/models/file", "127.0.0.1:7011", "10:20")
    assert (config.stage, config.tp, config.max_context, config.block_size) == ("1/2", 1, 100, 16)
    monkeypatch.setenv("STAGEMESH_MAX_CONTEXT", "50")
    assert config_of(monkeypatch, *args).max_context == 50
    assert config_of(monkeypatch, *args, "--max-context", "25").max_context == 25


def test_the_index_may_come_from_stage(monkeypatch: pytest.MonkeyPatch, mesh_file: str) -> None:
    assert config_of(monkeypatch, "stage", "--config", mesh_file, "--stage", "0/2").listen == "127.0.0.1:7010"


def test_the_router_reads_the_file_too(monkeypatch: pytest.MonkeyPatch, mesh_file: str) -> None:
    config = config_of(monkeypatch, "router", "--config", mesh_file)
    assert config.stages == ("127.0.0.1:7010", "127.0.0.1:7011")
    assert (config.listen, config.admin, config.model) == ("127.0.0.1:7000", "127.0.0.1:7001", "/models/file")


def test_stages_as_a_list_or_one_by_one(monkeypatch: pytest.MonkeyPatch) -> None:
    config = config_of(monkeypatch, "router", "--model", "m", "--stages", "a:1,b:2", "--stage", "c:3")
    assert config.stages == ("a:1", "b:2", "c:3")
    monkeypatch.setenv("STAGEMESH_STAGES", "d:4,e:5")
    assert config_of(monkeypatch, "router", "--model", "m").stages == ("d:4", "e:5")


@pytest.mark.parametrize("args", [("stage",), ("router", "--stage", "a:1")])
def test_an_empty_variable_is_none(monkeypatch: pytest.MonkeyPatch, args: tuple[str, ...]) -> None:
    """As a compose file gives it to whom .env says nothing."""
    monkeypatch.setenv("STAGEMESH_METRICS", "")
    assert config_of(monkeypatch, *args, "--model", "m").metrics is None


def test_sizes_and_switches(monkeypatch: pytest.MonkeyPatch) -> None:
    config = config_of(monkeypatch, "stage", "--model", "m", "--kv-memory", "512MiB", "--shared-cores")
    assert (config.kv_memory, config.shared_cores) == (512 << 20, True)
    monkeypatch.setenv("STAGEMESH_KV_MEMORY", "2GiB")
    assert config_of(monkeypatch, "stage", "--model", "m").kv_memory == 2 << 30


@pytest.mark.parametrize(
    ("args", "words"),
    [
        (("stage",), "--model is missing"),
        (("stage", "--model", "m", "--kv-memory", "much"), "--kv-memory: 'much' is not a size"),
        (("stage", "--model", "m", "--dtype", "int3"), "--dtype: Input should be 'auto'"),
        (
            ("stage", "--model", "m", "--memory-share", "2"),
            "--memory-share: Input should be less than or equal to 1",
        ),
        (("stage", "--index", "0"), "--index: counts the stages of --config"),
        (("router", "--model", "m"), "--stages is missing"),
        (("up", "m", "--stages", "3", "--tp", "1,2"), "--tp: '1,2' has 2 entries for 3 stages"),
        (("up", "m", "--tp", "0"), "--tp: '0' is not a list of rank counts"),
        (("up",), "--model is missing"),
    ],
)
def test_a_wrong_setting_is_named_in_one_line(
    capsys: pytest.CaptureFixture[str], args: tuple[str, ...], words: str
) -> None:
    assert words in error_of(capsys, *args)


def test_faults_of_the_file_are_named(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, mesh_file: str
) -> None:
    assert "has no stage 2; it has 2" in error_of(capsys, "stage", "--config", mesh_file, "--index", "2")
    assert "--index: say which stage" in error_of(capsys, "stage", "--config", mesh_file)
    bad = tmp_path / "bad.yaml"
    bad.write_text("modell: x\n")
    assert "unknown key 'modell'" in error_of(capsys, "router", "--config", str(bad))


def plan(tp: str | None = None, num_stages: int | None = None, num_cores: int = 8, **given: Any) -> Any:
    file = given.pop("file", MeshFile())
    return plan_mesh(
        given, model="m", num_stages=num_stages, tp=tp, stage_port=None, file=file, num_cores=num_cores
    )


def test_the_layout_of_up() -> None:
    mesh = plan(tp="1,2,1", num_cores=8)
    assert mesh.layout == "3 stages, TP 1·2·1"
    assert [stage.listen for stage in mesh.stages] == [f"127.0.0.1:{port}" for port in (50061, 50062, 50063)]
    assert [stage.stage for stage in mesh.stages] == ["0/3", "1/3", "2/3"]
    assert [stage.threads for stage in mesh.stages] == [8, 4, 8]
    assert mesh.router.stages == tuple(stage.listen for stage in mesh.stages)
    assert [stage.tp for stage in plan(tp="2", num_stages=2).stages] == [2, 2]
    assert plan().layout == "1 stage, TP 1"


def test_cores_are_shared_when_all_threads_together_are_more_than_the_cores() -> None:
    assert plan(num_cores=8).stages[0].shared_cores is False
    assert plan(tp="1,1", threads=4, num_cores=8).stages[0].shared_cores is False
    assert plan(tp="1,1", num_cores=8).stages[0].shared_cores is True
    assert plan(tp="3", num_cores=2).stages[0].shared_cores is True
    assert plan(tp="3", num_cores=2).stages[0].threads == 1
    assert plan(threads=16, num_cores=8).stages[0].shared_cores is True
    assert plan(tp="1,1", shared_cores=False).stages[0].shared_cores is False


def test_stages_that_share_a_gpu_share_its_memory() -> None:
    def shares(gpus: str, **given: Any) -> list[float]:
        return [stage.memory_share for stage in plan(tp="1,2,1", device="cuda", gpus=gpus, **given).stages]

    assert shares("0,1,2,3") == [0.9, 0.9, 0.9]
    assert shares("0,1,2,1") == [0.9, 0.45, 0.45]
    assert shares("0,0,1,0") == pytest.approx([0.3, 0.3, 0.3])
    assert shares("0,0,1,0", memory_share=0.2) == [0.2, 0.2, 0.2]
    assert [stage.memory_share for stage in plan(tp="1,1", device="cpu").stages] == [0.9, 0.9]


def test_up_reads_the_file_and_refuses_another_count(mesh_file: str) -> None:
    file = MeshFile.read(mesh_file)
    mesh = plan(file=file)
    assert [(stage.tp, stage.layers, stage.max_context) for stage in mesh.stages] == [
        (2, None, 100),
        (1, "10:20", 100),
    ]
    assert mesh.router.listen == "127.0.0.1:7000"
    with pytest.raises(ConfigError, match="--stages: 3 does not agree with the 2"):
        plan(file=file, num_stages=3)


def test_a_command_line_gives_the_settings_back(monkeypatch: pytest.MonkeyPatch) -> None:
    stage = StageConfig(
        model="m", stage="1/2", layers="3:4", kv_memory=12345, shared_cores=True, log_json=True
    )
    assert config_of(monkeypatch, *command_line("stage", stage)[3:]) == stage
    router = RouterConfig(
        model="m", stages=("a:1", "b:2"), lookahead=0, step_timeout_s=1.5, served_model_name="x"
    )
    assert config_of(monkeypatch, *command_line("router", router)[3:]) == router


@pytest.mark.parametrize(
    ("text", "num_bytes"),
    [("512MiB", 512 << 20), ("1.5GiB", 3 << 29), ("2GB", 2 * 10**9), ("7", 7), ("1 kib", 1024)],
)
def test_sizes(text: str, num_bytes: int) -> None:
    assert parse_size(text) == num_bytes


@pytest.mark.parametrize("num_bytes", [1, 1024, 1 << 30, 3 << 29, 512 << 20])
def test_sizes_go_round(num_bytes: int) -> None:
    assert parse_size(format_size(num_bytes)) == num_bytes


def test_the_clients_addresses_are_the_routers() -> None:
    assert RouterConfig.model_fields["listen"].default == DEFAULT_ADDRESS
    assert RouterConfig.model_fields["admin"].default == DEFAULT_ADMIN_ADDRESS


# Not pydantic: newer versions of typer bring and use it.
HEAVY = {"torch", "numpy", "yaml", "zmq", "uvloop", "tokenizers", "gguf"}


def run_without(modules: set[str], *args: str) -> subprocess.CompletedProcess[str]:
    """The command in a process where importing one of these modules fails as if it were not installed."""
    code = (
        "import sys\n"
        f"for name in {sorted(modules)!r}: sys.modules[name] = None\n"
        "from stagemesh.client.cli import main\n"
        f"main({list(args)!r})\n"
    )
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=30)


@pytest.mark.parametrize(
    "args", [("--help",), ("--version",), ("generate", "--help"), ("chat", "--help"), ("status", "--help")]
)
def test_these_need_no_extra(args: tuple[str, ...]) -> None:
    done = run_without(HEAVY, *args)
    assert (done.returncode, done.stderr) == (0, "")
    assert "stagemesh" in done.stdout


def test_the_client_library_needs_no_extra() -> None:
    unwanted = {*HEAVY, "pydantic", "typer", "rich"}
    code = f"import sys, stagemesh.client; print(sorted({unwanted!r} & sys.modules.keys()))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert (done.stdout, done.stderr) == ("[]\n", "")


@pytest.mark.parametrize(
    ("command", "extra"), [("stage", "stage"), ("router", "router"), ("up", "router,stage")]
)
def test_a_missing_extra_is_one_line(command: str, extra: str) -> None:
    done = run_without({"yaml"}, command, "--help")
    assert done.returncode == 1
    expected = f"error: stagemesh {command} needs packages that are not installed (found no 'yaml'): "
    assert done.stderr == f"{expected}pip install 'stagemesh[{extra}]'\n"


@pytest.mark.parametrize("module", ["torch", "safetensors"])
def test_an_engine_that_is_not_installed_is_missed_before_anything_starts(module: str) -> None:
    """Its workers would find out, each with a traceback."""
    done = run_without({module}, "stage", "--model", "/nowhere", "--listen", "127.0.0.1:0")
    expected = f"error: stagemesh stage needs packages that are not installed (found no '{module}'): "
    assert (done.returncode, done.stderr) == (1, f"{expected}pip install 'stagemesh[stage]'\n")


@pytest.mark.parametrize("command", ["stage", "router"])
@pytest.mark.parametrize("module", ["grpc_reflection", "prometheus_client"])
def test_what_a_server_imports_late_is_one_line_too(command: str, module: str, tmp_path: Path) -> None:
    shape = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_size": 16,
        "intermediate_size": 32,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "vocab_size": 100,
        "max_position_embeddings": 64,
        "rms_norm_eps": 1e-5,
    }
    (tmp_path / "config.json").write_text(json.dumps(shape))
    port = "127.0.0.1:0"
    flags = {"stage": ("--engine", "sim"), "router": ("--stages", "127.0.0.1:9", "--admin", port)}[command]
    common = ("--model", str(tmp_path), "--listen", port, "--metrics", port)
    done = run_without({module}, command, *common, *flags)
    expected = f"error: stagemesh {command} needs packages that are not installed (found no '{module}'): "
    assert (done.returncode, done.stderr) == (1, f"{expected}pip install 'stagemesh[{command}]'\n")


def test_logs_have_one_format(capsys: pytest.CaptureFixture[str]) -> None:
    root = logging.getLogger()
    level, handlers = root.level, list(root.handlers)
    try:
        setup_logging("info", False, "stage 1")
        setup_logging("info", False, "stage 1")
        logging.getLogger("x").info("hello %s", "you")
        logging.getLogger("x").debug("unseen")
        [line] = capsys.readouterr().err.splitlines()
        assert line.endswith(" INFO stage 1: hello you")
        setup_logging("debug", True, "router")
        logging.getLogger("x.y").debug("hi")
        record = json.loads(capsys.readouterr().err)
        assert (record["level"], record["name"], record["logger"], record["message"]) == (
            "debug",
            "router",
            "x.y",
            "hi",
        )
        with pytest.raises(ConfigError, match="--log-level: 'loud'"):
            setup_logging("loud", False, "router")
    finally:
        root.setLevel(level)
        root.handlers[:] = handlers


LOGS_UNTIL_THE_END = """
import atexit, time
atexit.register(time.sleep, 0.1)  # after what `logging` registers
import io, logging, os, sys, threading
from stagemesh.wire.logs import StderrHandler, setup_logging

class Slow(io.RawIOBase):
    def writable(self):
        return True

    def write(self, data):
        time.sleep(0.2)
        return os.write(2, data)

def log():
    while True:
        logging.getLogger().warning("a line")
        inside.set()

sys.stderr = io.TextIOWrapper(io.BufferedWriter(Slow()), line_buffering=True)
{handler}
inside = threading.Event()
threading.Thread(target=log, daemon=True).start()
inside.wait()
"""


@pytest.mark.parametrize(
    "handler",
    [
        pytest.param("setup_logging('info', False, 'stage 1')", id="services"),
        pytest.param("logging.lastResort = StderrHandler()", id="clients"),
    ],
)
def test_a_thread_that_logs_to_the_end_does_not_abort_the_process(handler: str) -> None:
    """OpenTelemetry's exporters retry in daemon threads, and say so."""
    done = subprocess.run(
        [sys.executable, "-c", LOGS_UNTIL_THE_END.format(handler=handler)], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    assert "a line" in done.stderr


def test_die_with_parent_ends_an_orphan_at_once() -> None:
    code = "from stagemesh.wire.process import die_with_parent; die_with_parent(1 << 22); print('alive')"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (-9, "")


def test_die_with_parent_leaves_the_child_of_a_living_parent() -> None:
    code = (
        f"from stagemesh.wire.process import die_with_parent; die_with_parent({os.getpid()}); print('alive')"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (0, "alive\n")
