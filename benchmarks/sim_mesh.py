"""A mesh of simulated stages for a benchmark: real leaders, workers, links and router; engines that sleep."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path

import grpc
from grpc_health.v1 import health_pb2, health_pb2_grpc

from stagemesh.wire.polling import with_polling

START_TIMEOUT_S = 120.0
STOP_TIMEOUT_S = 15.0
SERVICE = "stagemesh.v1.InferenceService"
COMMAND = ("-m", "stagemesh.client.cli")
SHAPE = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 64,
    "num_attention_heads": 4,
    "num_key_value_heads": 1,
    "vocab_size": 32000,
    "max_position_embeddings": 4096,
    "rms_norm_eps": 1e-5,
    "rope_theta": 10000.0,
    "eos_token_id": 2,
}
"""Of the model whose shape the stages have; 256 bytes of activations a position in float32."""


@dataclass(frozen=True, slots=True, kw_only=True)
class SimMesh:
    """Where it listens and who it is."""

    listen: str
    admin: str
    router_pid: int
    stage_pids: tuple[int, ...]
    """Leaders."""
    costs: tuple[str, ...] = ()
    """Of the stages."""


@contextmanager
def sim_mesh(
    costs: Sequence[str],
    *,
    router: Sequence[str] = (),
    stage: Sequence[str] = (),
    model: Path | None = None,
    result_delay_s: float | None = None,
    command: Sequence[str] = COMMAND,
) -> Iterator[SimMesh]:
    """Start a stage for each cost expression and a router; stop them at the end.

    Args:
        costs: As of `stagemesh stage --cost`.
        router: Further flags of the router.
        stage: Further flags of every stage.
        model: Whose shape and tokenizer to use; None: SHAPE, without a tokenizer.
        result_delay_s: Put a proxy before the last stage that holds back what it answers by this long; None: no
            proxy.
        command: Arguments of Python that start `stagemesh`.
    """
    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        (folder / "config.json").write_text(json.dumps(SHAPE))
        served = str(model or folder)
        processes = []
        for index, cost in enumerate(costs):
            place = ["--stage", f"{index}/{len(costs)}", "--listen", "127.0.0.1:0", "--threads", "1"]
            engine = ["--engine", "sim", "--cost", cost, *stage]
            processes.append(
                _start(
                    stack, folder, f"stage{index}", [*command, "stage", "--model", served, *place, *engine]
                )
            )
        addresses = [_address(process, log) for process, log in processes]
        if result_delay_s is not None:
            proxy = [str(Path(__file__).with_name("delay_proxy.py")), addresses[-1], str(result_delay_s)]
            addresses[-1] = _address(*_start(stack, folder, "proxy", proxy))
        ports = ["--listen", "127.0.0.1:0", "--admin", "127.0.0.1:0"]
        stages = [part for address in addresses for part in ("--stage", address)]
        process, log = _start(
            stack, folder, "router", [*command, "router", "--model", served, *stages, *ports, *router]
        )
        listen = _address(process, log)
        _wait_ready(listen, process, log)
        yield SimMesh(
            listen=listen,
            admin=_match(process, log, r"admin on ([\w.:]+)"),
            router_pid=process.pid,
            stage_pids=tuple(child.pid for child, _ in processes),
            costs=tuple(costs),
        )


Child = tuple["subprocess.Popen[bytes]", Path]


def _start(stack: ExitStack, folder: Path, name: str, args: Sequence[str]) -> Child:
    log = folder / f"{name}.log"
    environment = with_polling({**os.environ, "STAGEMESH_PDEATHSIG": str(os.getpid())})
    with log.open("w") as out:
        process = subprocess.Popen(
            [sys.executable, *args],
            stdout=out,
            stderr=out,
            env=environment,
        )
    stack.callback(_stop, process)
    return process, log


def _stop(process: subprocess.Popen[bytes]) -> None:
    process.terminate()
    try:
        process.wait(STOP_TIMEOUT_S)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()


def _address(process: subprocess.Popen[bytes], log: Path) -> str:
    return _match(process, log, r"listening on ([\w.:]+)")


def _match(process: subprocess.Popen[bytes], log: Path, pattern: str) -> str:
    deadline = time.monotonic() + START_TIMEOUT_S
    while not (found := re.search(pattern, log.read_text())):
        if process.poll() is not None or time.monotonic() > deadline:
            raise RuntimeError(f"'{pattern}' is not in {log.name}:\n{log.read_text()[-4000:]}")
        time.sleep(0.05)
    return found[1]


def _wait_ready(listen: str, process: subprocess.Popen[bytes], log: Path) -> None:
    deadline = time.monotonic() + START_TIMEOUT_S
    with grpc.insecure_channel(listen) as channel:
        stub = health_pb2_grpc.HealthStub(channel)
        while True:
            try:
                answer = stub.Check(health_pb2.HealthCheckRequest(service=SERVICE), timeout=5.0)
                if answer.status == health_pb2.HealthCheckResponse.SERVING:
                    return
            except grpc.RpcError:
                pass  # not listening yet; the deadline below ends the wait
            if process.poll() is not None or time.monotonic() > deadline:
                raise RuntimeError(f"the mesh did not get ready:\n{log.read_text()[-4000:]}")
            time.sleep(0.05)
