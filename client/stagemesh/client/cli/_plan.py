"""What `stagemesh up` starts: the settings of each stage and of the router, and their command lines. Pure."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from pydantic import BaseModel

from stagemesh.client.cli._settings import flag, make_config, variable
from stagemesh.router.config import MeshFile, RouterConfig
from stagemesh.stage.config import StageConfig
from stagemesh.wire.address import split_address
from stagemesh.wire.errors import ConfigError

STAGE_OPTIONS = (
    "trace_ranks",
    "device",
    "dtype",
    "block_size",
    "kv_memory",
    "memory_share",
    "gpus",
    "head_share",
    "max_step_tokens",
    "max_graph_rows",
    "cuda_graphs",
    "pdl",
    "symmetric_memory",
    "fused_all_reduce",
    "nccl_links",
    "max_slots",
    "threads",
    "shared_cores",
    "load_format",
    "linears",
)
"""Fields of StageConfig that `up` takes and gives to every stage."""
ROUTER_OPTIONS = (
    "listen",
    "admin",
    "api_workers",
    "served_model_name",
    "max_sequences",
    "max_waiting",
    "step_tokens",
    "lookahead",
    "prefix_cache",
    "max_in_flight",
    "itl_target_ms",
    "step_timeout_s",
    "link_timeout_s",
    "link_transport",
    "heartbeat_timeout_s",
    "trace",
    "metrics",
    "debug_logits",
    "event_log",
    "step_log",
)
"""Fields of RouterConfig that `up` takes."""
SHARED_OPTIONS = ("max_context", "insecure", "log_level", "log_json")
"""Fields of both."""

GPU_HEAD_SHARE = 0.3
"""On GPUs, which compute prompts and many rows at once, the head of an 8B model weighs 0.7 of a layer; by its
weights it would be 2.4."""


@dataclass(frozen=True, slots=True, kw_only=True)
class MeshPlan:
    """A mesh on this machine."""

    stages: tuple[StageConfig, ...]
    """In order; all of the chain."""
    router: RouterConfig
    """Knows the stages' addresses."""

    @property
    def num_workers(self) -> int:
        """Worker processes of all stages."""
        return sum(stage.tp for stage in self.stages)

    @property
    def layout(self) -> str:
        """Such as "3 stages, TP 1·2·1"."""
        count = len(self.stages)
        return f"{count} stage{'s' * (count != 1)}, TP {'·'.join(str(stage.tp) for stage in self.stages)}"


def plan_mesh(
    given: Mapping[str, Any],
    *,
    model: str | None,
    num_stages: int | None,
    tp: str | None,
    stage_port: int | None,
    file: MeshFile,
    num_cores: int,
    num_gpus: int = 0,
) -> MeshPlan:
    """Lay the mesh out; ConfigError names the flag at fault.

    Args:
        given: Options of STAGE_OPTIONS, ROUTER_OPTIONS and SHARED_OPTIONS; None is not given.
        model: Path of the model; else the file's.
        num_stages: Else as many as the file or `tp` has, else 1.
        tp: Ranks of every stage ("2"), or of each ("1,2,1"); else the file's, else 1.
        stage_port: Port of stage 0, on loopback; the others count up. Else the file's addresses.
        file: mesh.yaml, or an empty one.
        num_cores: Cores the workers share.
        num_gpus: GPUs of this machine; each rank gets one, in order, unless `given` says which.
    """
    sizes = _tp_sizes(tp)
    count = num_stages or len(file.stages) or len(sizes) or 1
    if file.stages and len(file.stages) != count:
        raise ConfigError(f"--stages: {count} does not agree with the {len(file.stages)} stages of --config")
    if len(sizes) == 1:
        sizes = sizes * count
    if sizes and len(sizes) != count:
        raise ConfigError(
            f"--tp: '{tp}' has {len(sizes)} entries for {count} stages; give one, or one a stage"
        )
    ranks = sizes or [entry.tp for entry in file.stages] or [1] * count
    addresses = _stage_addresses(stage_port, count, file)
    metrics = _stage_metrics(given.get("metrics"), count, file)
    # Each stage may use every core: one stream is at one stage at a time, and the router does not send
    # steps into stages that share cores side by side (docs/architecture.md, "Where we differ").
    threads = [given.get("threads") or max(1, num_cores // size) for size in ranks]
    crowded = sum(count * size for count, size in zip(threads, ranks, strict=True)) > num_cores
    gpus = _gpus_of_stages(given, ranks, num_gpus)
    # In `given`, None is a flag that was not given; these are decided here, so they are.
    decided = {
        **{name: given.get(name) for name in (*STAGE_OPTIONS, *SHARED_OPTIONS)},
        "model": model,
        "shared_cores": crowded if given.get("shared_cores") is None else given["shared_cores"],
    }
    from_file = {"model": file.model, "block_size": file.block_size, "max_context": file.max_context}
    stages = tuple(
        make_config(
            StageConfig,
            {
                **decided,
                "stage": f"{index}/{count}",
                "tp": ranks[index],
                "gpus": gpus[index],
                "memory_share": given.get("memory_share") or _memory_share(gpus, index),
                "head_share": given.get("head_share") or (GPU_HEAD_SHARE if gpus[index] else None),
                "threads": threads[index],
                "listen": addresses[index],
                "metrics": metrics[index],
                "layers": file.stages[index].layers if file.stages else None,
            },
            from_file,
        )
        for index in range(count)
    )
    router = make_config(
        RouterConfig,
        {
            **{name: given.get(name) for name in (*ROUTER_OPTIONS, *SHARED_OPTIONS)},
            "model": model,
            "stages": tuple(addresses),
        },
        {
            "model": file.model,
            "max_context": file.max_context,
            "listen": file.router.listen,
            "admin": file.router.admin,
            "metrics": file.router.metrics,
            "api_workers": file.router.api_workers,
            "served_model_name": file.served_model_name,
        },
    )
    return MeshPlan(stages=stages, router=router)


def command_line(subcommand: str, config: BaseModel) -> tuple[str, ...]:
    """The command that starts a process with these settings; what is at its default is left out."""
    args = [sys.executable, "-m", "stagemesh.client.cli", subcommand]
    for name, field in type(config).model_fields.items():
        value = getattr(config, name)
        if value is None or value == field.default:
            continue
        if isinstance(value, bool):
            args.append(flag(name) if value else flag(f"no_{name}"))
        elif isinstance(value, tuple):
            args.append(f"{flag(name)}={','.join(value)}")
        else:
            args.append(f"{flag(name)}={value}")
    return tuple(args)


def settings_variables() -> frozenset[str]:
    """Variables a child must not see: `up` has read them, and its word is on the child's command line."""
    fields = {*StageConfig.model_fields, *RouterConfig.model_fields}
    return frozenset(variable(name) for name in (*fields, "config", "index"))


def _tp_sizes(tp: str | None) -> list[int]:
    if tp is None:
        return []
    parts = [part.strip() for part in tp.split(",")]
    if not all(part.isdigit() and int(part) > 0 for part in parts):
        raise ConfigError(f"--tp: '{tp}' is not a list of rank counts; expected 2, or 1,2,1")
    return [int(part) for part in parts]


def _stage_metrics(router: str | None, count: int, file: MeshFile) -> list[str | None]:
    """The ports after the router's, unless the file gives each its own."""
    if router is None:
        return [entry.metrics for entry in file.stages] or [None] * count
    host, port = split_address(router, key="--metrics")
    if port and port + count > 65535:
        raise ConfigError(f"--metrics: {port} leaves no room for {count} stages below 65536")
    host = f"[{host}]" if ":" in host else host
    return [f"{host}:{port + 1 + index if port else 0}" for index in range(count)]


def _gpus_of_stages(given: Mapping[str, Any], ranks: list[int], num_gpus: int) -> list[str | None]:
    """The GPUs of each stage: those of --gpus dealt in order, else one after the other."""
    if given.get("gpus"):
        names = [part.strip() for part in str(given["gpus"]).split(",")]
        if len(names) != sum(ranks):
            raise ConfigError(f"--gpus: '{given['gpus']}' names {len(names)} GPUs for {sum(ranks)} ranks")
    elif given.get("device") == "cuda" or (given.get("device") in (None, "auto") and num_gpus):
        if num_gpus < sum(ranks):
            raise ConfigError(
                f"--device cuda: {sum(ranks)} ranks, and {num_gpus} GPUs here; give fewer --stages or --tp, or say "
                "by --gpus which ranks share one, such as 0,0"
            )
        names = [str(index) for index in range(sum(ranks))]
    else:
        return [None] * len(ranks)
    firsts = [sum(ranks[:index]) for index in range(len(ranks))]
    return [",".join(names[first : first + count]) for first, count in zip(firsts, ranks, strict=True)]


def _memory_share(gpus: list[str | None], index: int) -> float | None:
    """Of stage `index`, where other stages have ranks on its GPUs: they start together, and none sees what another will
    hold. None: its GPUs are its own."""
    ranks = [gpu for stage in gpus for gpu in (stage or "").split(",") if gpu]
    mine = (gpus[index] or "").split(",")
    crowd = max(ranks.count(gpu) for gpu in mine)
    default: float = StageConfig.model_fields["memory_share"].default
    return default / crowd if crowd > 1 else None


def _stage_addresses(stage_port: int | None, count: int, file: MeshFile) -> list[str]:
    if stage_port is None and file.stages:
        return [entry.address for entry in file.stages]
    host, port = split_address(StageConfig.model_fields["listen"].default, key="listen")
    first = port if stage_port is None else stage_port
    if first + count - 1 > 65535:
        raise ConfigError(f"--stage-port: {first} leaves no room for {count} stages below 65536")
    # Port 0 stays 0: it means "any free one", for each.
    return [f"{host}:{first + index if first else 0}" for index in range(count)]
