"""Random weights, for measuring without a model's files."""

from __future__ import annotations

import hashlib

import torch

from stagemesh.model.config import ModelConfig
from stagemesh.model.deal import RankDeal
from stagemesh.model.shard_shapes import shard_shapes


def dummy_shard(
    config: ModelConfig,
    layers: range,
    rank: RankDeal,
    *,
    dtype: torch.dtype,
    has_embedding: bool,
    has_head: bool,
    seed: int = 0,
) -> dict[str, torch.Tensor]:
    """Makes what load_shard would load, with random values of a scale that keeps activations finite.

    A tensor depends on the seed, its name, the rank and its shape alone: any split by layers gives the same
    model, another TP size another model.
    """
    shapes = shard_shapes(config, layers, rank, has_embedding=has_embedding, has_head=has_head)
    shard: dict[str, torch.Tensor] = {}
    for name, shape in shapes.items():
        if len(shape) == 1:
            shard[name] = torch.ones(shape, dtype=dtype)
            continue
        if name == "head" and config.tie_embeddings:
            if has_embedding:
                shard["head"] = shard["embed"]
                continue
            name_of_values = "embed"
        else:
            name_of_values = name
        digest = hashlib.sha256(f"{seed}/{name_of_values}/{rank.rank}".encode()).digest()
        generator = torch.Generator().manual_seed(int.from_bytes(digest[:8], "little") >> 1)
        # Variance 1 / columns: a product of such a matrix with a unit-variance vector keeps unit variance.
        bound = (3.0 / shape[1]) ** 0.5
        shard[name] = torch.empty(shape, dtype=dtype).uniform_(-bound, bound, generator=generator)
    return shard
