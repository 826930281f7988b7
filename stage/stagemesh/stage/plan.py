"""What a stage will hold, worked out before anything is allocated."""

from __future__ import annotations

from dataclasses import dataclass

from stagemesh.model.deal import RankDeal, deal
from stagemesh.model.source import ModelSource, open_model
from stagemesh.model.split import parse_layers, parse_stage, split_layers
from stagemesh.stage.config import StageConfig
from stagemesh.wire.errors import ConfigError

ITEMSIZE = {"float32": 4, "bfloat16": 2, "float16": 2}
"""Bytes of an element."""


@dataclass(frozen=True, slots=True, kw_only=True)
class StagePlan:
    """A stage's share of the model and of the machine."""

    source: ModelSource
    layers: range
    deals: tuple[RankDeal, ...]
    dtype: str
    num_blocks: int
    max_context: int


def plan_stage(config: StageConfig) -> StagePlan:
    """Open the model and deal it; every setting that cannot be met is a ConfigError or ModelError."""
    source = open_model(config.model, weights=config.needs_weights)
    model = source.config
    if config.layers:
        layers = parse_layers(config.layers, model.num_layers)
    elif config.stage:
        index, count = parse_stage(config.stage)
        layers = split_layers(model, count)[index]
    else:
        layers = range(model.num_layers)
    if config.device == "cuda":
        raise ConfigError("--device cuda: this release computes on CPUs; CUDA stages come with a later one")
    dtype = "float32" if config.dtype == "auto" else config.dtype
    max_context = model.max_context
    if config.max_context is not None:
        if config.max_context > max_context:
            raise ConfigError(
                f"--max-context {config.max_context}: the model's context is {max_context} tokens"
            )
        max_context = config.max_context
    block_bytes = 2 * len(layers) * config.block_size * model.num_kv_heads * model.head_dim * ITEMSIZE[dtype]
    num_blocks = config.kv_memory // block_bytes
    if num_blocks < 1:
        raise ConfigError(
            f"--kv-memory {config.kv_memory}: one KV block of {config.block_size} tokens takes {block_bytes} bytes here; "
            "give more memory or a smaller --block-size"
        )
    return StagePlan(
        source=source,
        layers=layers,
        deals=deal(model, config.tp),
        dtype=dtype,
        num_blocks=num_blocks,
        max_context=max_context,
    )
