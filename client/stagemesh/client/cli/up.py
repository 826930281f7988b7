"""`stagemesh up`."""

from __future__ import annotations

import asyncio
import json
import os
import time
from pathlib import Path
from typing import Annotated, Any

import typer

from stagemesh.client.cli._child import ChildSpec
from stagemesh.client.cli._display import UpDisplay
from stagemesh.client.cli._extras import require_engine
from stagemesh.client.cli._plan import (
    ROUTER_OPTIONS,
    SHARED_OPTIONS,
    STAGE_OPTIONS,
    MeshPlan,
    command_line,
    plan_mesh,
    settings_variables,
)
from stagemesh.client.cli._ports import Ports
from stagemesh.client.cli._probe import MeshProbe
from stagemesh.client.cli._settings import options_of, with_options
from stagemesh.client.cli._supervisor import Supervisor
from stagemesh.router.config import MeshFile, RouterConfig
from stagemesh.stage.config import StageConfig
from stagemesh.stage.gpus import list_gpus
from stagemesh.wire.address import check_listen
from stagemesh.wire.cgroup import usable_cores
from stagemesh.wire.errors import ConfigError
from stagemesh.wire.logs import level_number


def command() -> Any:
    """The function to run, with options of both settings models."""
    router = options_of(RouterConfig, (*ROUTER_OPTIONS, *SHARED_OPTIONS))
    return with_options(_up, [*router, *options_of(StageConfig, STAGE_OPTIONS)])


def _up(
    model: Annotated[
        str | None,
        typer.Argument(envvar="STAGEMESH_MODEL", help="Path of a Hugging Face folder or a GGUF file."),
    ] = None,
    num_stages: Annotated[
        int | None, typer.Option("--stages", min=1, help="How many; else as --config or --tp says, else 1.")
    ] = None,
    tp: Annotated[
        str | None,
        typer.Option(
            "--tp", envvar="STAGEMESH_TP", metavar="N[,N...]", help="Ranks of every stage, or of each: 1,2,1."
        ),
    ] = None,
    stage_port: Annotated[
        int | None,
        typer.Option(
            "--stage-port", min=0, max=65535, help="Port of stage 0; the others count up. 0: any free ones."
        ),
    ] = None,
    config: Annotated[
        str | None,
        typer.Option("--config", envvar="STAGEMESH_CONFIG", metavar="FILE", help="mesh.yaml of the mesh."),
    ] = None,
    ready_file: Annotated[
        Path | None,
        typer.Option(
            "--ready-file", metavar="FILE", help="Gets addresses and process ids as JSON when it is ready."
        ),
    ] = None,
    **given: Any,
) -> None:
    """Ctrl-C stops what it started, and nothing else. Port 0 takes a free port."""
    begin = time.monotonic()
    plan = plan_mesh(
        given,
        model=model,
        num_stages=num_stages,
        tp=tp,
        stage_port=stage_port,
        file=MeshFile.read(config) if config else MeshFile(),
        num_cores=usable_cores(),
        num_gpus=len(list_gpus()),
    )
    level_number(plan.router.log_level)
    with Ports() as ports:
        stage_key = "--config" if config and stage_port is None else "--stage-port"
        plan = with_ports(plan, ports, stage_key=stage_key)
        check_stages(plan)
        if ready_file is not None:
            _prepare_ready_file(ready_file)
        with UpDisplay() as display:
            threads = "·".join(str(stage.threads) for stage in plan.stages)
            display.note(f"{plan.layout}: {plan.num_workers} workers, threads of each {threads}")
            asyncio.run(_supervise(plan, display, begin, ready_file))


def check_stages(plan: MeshPlan) -> None:
    """Raise what any stage would end with before it loads, instead of starting them all to hear it from each."""
    from stagemesh.stage.plan import plan_stage

    for stage in plan.stages:
        require_engine(stage.engine, "up")
        plan_stage(stage)


def with_ports(plan: MeshPlan, ports: Ports, *, stage_key: str) -> MeshPlan:
    """The plan with port 0 made real; raises if a port is taken, or open to the world unmeant."""
    keys = {"listen": "--listen", "admin": "--admin"}
    if plan.router.metrics:
        keys["metrics"] = "--metrics"
    wanted = [*((getattr(plan.router, name), key) for name, key in keys.items())]
    wanted += [(stage.listen, stage_key) for stage in plan.stages]
    wanted += [(stage.metrics, "--metrics") for stage in plan.stages if stage.metrics]
    addresses: list[str] = []
    for address, key in wanted:
        check_listen(address, insecure=plan.router.insecure, key=key)
        addresses.append(ports.take(address, key=key))
    router = dict(zip(keys, addresses, strict=False))
    stages = addresses[len(keys) : len(keys) + len(plan.stages)]
    metrics = iter(addresses[len(keys) + len(plan.stages) :])
    return MeshPlan(
        stages=tuple(
            stage.model_copy(update={"listen": address, "metrics": next(metrics) if stage.metrics else None})
            for stage, address in zip(plan.stages, stages, strict=True)
        ),
        router=plan.router.model_copy(update={**router, "stages": tuple(stages)}),
    )


async def _supervise(plan: MeshPlan, display: UpDisplay, begin: float, ready_file: Path | None) -> None:
    probe = MeshProbe(plan.router.listen, plan.router.admin, display.progress)

    async def on_ready() -> None:
        if ready_file is not None:
            _write_ready_file(ready_file, plan, probe.model_name)
        seconds = time.monotonic() - begin
        display.ready(
            f"stagemesh ready on {plan.router.listen} "
            f"({plan.layout}, model {probe.model_name}, {seconds:.1f} s)"
        )

    supervisor = Supervisor(
        [
            ChildSpec(name=f"stage {index}", args=command_line("stage", stage))
            for index, stage in enumerate(plan.stages)
        ],
        ChildSpec(name="router", args=command_line("router", plan.router)),
        until_ready=probe.until_ready,
        on_ready=on_ready,
        display=display,
        hidden_variables=settings_variables(),
    )
    await supervisor.run()


def _prepare_ready_file(path: Path) -> None:
    """None of an earlier mesh is left; ConfigError if there will be none of this one."""
    try:
        path.unlink(missing_ok=True)
        _partial(path).touch()
        _partial(path).unlink()
    except OSError as error:
        raise ConfigError(f"--ready-file: {path} cannot be written: {error.strerror}") from error


def _partial(path: Path) -> Path:
    return path.with_name(path.name + ".partial")


def _write_ready_file(path: Path, plan: MeshPlan, model_name: str) -> None:
    """All at once, so that who waits for the file never reads half of it."""
    content = {
        "listen": plan.router.listen,
        "admin": plan.router.admin,
        "stages": [stage.listen for stage in plan.stages],
        "metrics": [
            address for address in (plan.router.metrics, *(one.metrics for one in plan.stages)) if address
        ],
        "model": model_name,
        "pid": os.getpid(),
    }
    partial = _partial(path)
    partial.write_text(json.dumps(content) + "\n")
    partial.replace(path)
