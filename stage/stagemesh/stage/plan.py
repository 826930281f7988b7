"""What a stage will hold, worked out before anything is allocated."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from stagemesh.model.config import ModelConfig
from stagemesh.model.cost import CostModel
from stagemesh.model.deal import RankDeal, deal
from stagemesh.model.source import ModelSource, open_model
from stagemesh.model.split import parse_layers, parse_stage, split_layers
from stagemesh.stage.config import StageConfig
from stagemesh.stage.gpus import Gpu, list_gpus, pick_gpus, settled_memory_in_use
from stagemesh.stage.memory import (
    LINK_DEPTH,
    GPUMemory,
    MemoryNeeds,
    StageMemory,
    require_fit,
    stage_memory,
)
from stagemesh.wire.errors import ConfigError

ITEMSIZE = {"float32": 4, "bfloat16": 2, "float16": 2}
"""Bytes of an element."""
MAX_STAGES = 8
"""Stages of a lane that a stage told only its layers makes tables for."""


@dataclass(frozen=True, slots=True, kw_only=True)
class StagePlan:
    """A stage's share of the model and of the machine."""

    source: ModelSource
    layers: range
    deals: tuple[RankDeal, ...]
    dtype: str
    num_blocks: int
    max_context: int
    max_slots: int
    """Of a lane, as far as this stage can tell."""
    gpus: tuple[Gpu, ...] = ()
    """Of each rank; none: the stage computes on the CPU."""
    used_bytes: tuple[int, ...] = ()
    """Of each of those GPUs, held by other processes before the stage took anything."""
    memory: StageMemory | None = None
    """Of a stage on GPUs."""

    @property
    def device(self) -> str:
        """ "cuda" or "cpu"."""
        return "cuda" if self.gpus else "cpu"


def plan_stage(config: StageConfig, *, used_bytes: Sequence[int] | None = None) -> StagePlan:
    """Open the model and deal it; every setting that cannot be met is a ConfigError or ModelError.

    Args:
        config: Of the stage.
        used_bytes: What other processes hold of each rank's GPU; None asks the driver. A worker is told: it would count
            the other ranks of its own stage.
    """
    if config.engine == "sim":
        CostModel.parse(config.cost)
    source = open_model(config.model, weights=config.needs_weights)
    model = source.config
    if config.layers:
        layers = parse_layers(config.layers, model.num_layers)
    elif config.stage:
        index, count = parse_stage(config.stage)
        layers = split_layers(model, count, config.head_share)[index]
    else:
        layers = range(model.num_layers)
    gpus = _gpus(config)
    dtype: str = config.dtype
    if dtype == "auto":
        stored = model.stored_dtype if model.stored_dtype in ("bfloat16", "float16") else "bfloat16"
        dtype = stored if gpus else "float32"
    max_context = model.max_context
    if config.max_context is not None:
        if config.max_context > max_context:
            raise ConfigError(
                f"--max-context {config.max_context}: the model's context is {max_context} tokens"
            )
        max_context = config.max_context
    deals = deal(model, config.tp)
    max_slots = config.max_slots * (_num_stages(config) or MAX_STAGES)
    memory = None
    if gpus and used_bytes is None:
        used_bytes = settled_memory_in_use(gpus, 1 - config.memory_share)
    if gpus:
        memories = [
            GPUMemory(total_bytes=gpu.total_bytes, share=config.memory_share, used_bytes=used)
            for gpu, used in zip(gpus, used_bytes or (), strict=True)
        ]
        memory = _fit(config, model, layers, deals, memories, dtype, max_context, max_slots)
        num_blocks = memory.num_blocks
    else:
        num_blocks = _cpu_blocks(config, model, layers, dtype)
    return StagePlan(
        source=source,
        layers=layers,
        deals=deals,
        dtype=dtype,
        num_blocks=num_blocks,
        max_context=max_context,
        max_slots=max_slots,
        gpus=gpus,
        used_bytes=tuple(used_bytes or ()),
        memory=memory,
    )


def _gpus(config: StageConfig) -> tuple[Gpu, ...]:
    """Of each rank; none: CPU."""
    on_cpu = config.device == "cpu" or config.engine == "sim"
    there = () if on_cpu else list_gpus()
    if there or (config.device == "cuda" and not on_cpu):
        return pick_gpus(config.gpus, config.tp, there)
    if config.gpus:
        why = "--engine sim" if config.engine == "sim" else f"--device {config.device}"
        none = "" if on_cpu else ", and there is no GPU here"
        raise ConfigError(f"--gpus {config.gpus}: this stage computes on the CPU ({why}{none}); leave it out")
    return ()


def _num_stages(config: StageConfig) -> int:
    return parse_stage(config.stage)[1] if config.stage else 0


def _cpu_blocks(config: StageConfig, model: ModelConfig, layers: range, dtype: str) -> int:
    block_bytes = 2 * len(layers) * config.block_size * model.num_kv_heads * model.head_dim * ITEMSIZE[dtype]
    num_blocks = config.kv_memory // block_bytes
    if num_blocks < 1:
        raise ConfigError(
            f"--kv-memory {config.kv_memory}: one KV block of {config.block_size} tokens takes {block_bytes} bytes here; "
            "give more memory or a smaller --block-size"
        )
    return num_blocks


def _fit(
    config: StageConfig,
    model: ModelConfig,
    layers: range,
    deals: tuple[RankDeal, ...],
    gpus: list[GPUMemory],
    dtype: str,
    max_context: int,
    max_slots: int,
) -> StageMemory:
    """What each rank will hold; refused if that leaves no room for one sequence of a block."""
    needs = MemoryNeeds(
        step_tokens=config.max_step_tokens,
        sampled_rows=min(config.max_graph_rows, config.max_step_tokens),
        depth=LINK_DEPTH,
        max_slots=max_slots,
        max_context=max_context,
        block_size=config.block_size,
        itemsize=ITEMSIZE[dtype],
    )
    memory = stage_memory(model, layers, deals, needs, gpus)
    require_fit(model, memory, needs, gpus[memory.limiting_rank], 1)
    return memory
