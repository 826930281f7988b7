"""The tensors of a shard by canonical name, and their shapes."""

from __future__ import annotations

from stagemesh.model.config import ModelConfig
from stagemesh.model.deal import RankDeal


def shard_shapes(
    config: ModelConfig, layers: range, rank: RankDeal, *, has_embedding: bool, has_head: bool
) -> dict[str, tuple[int, ...]]:
    """Shapes of what a rank of a stage holds, in loading order.

    'embed' and 'head' [the rank's vocabulary, hidden]; 'norm' [hidden], with the head; for each layer i
    of the model: 'layers.i.attn_norm' [hidden], 'layers.i.qkv' [q + k + v rows of the rank, hidden],
    'layers.i.o' [hidden, q columns], 'layers.i.mlp_norm' [hidden], 'layers.i.gate_up' [gate + up rows,
    hidden], 'layers.i.down' [hidden, columns]. A tied head on a stage with the embedding is the same tensor.
    """
    hidden = config.hidden_size
    q_rows, kv_rows = len(rank.heads) * config.head_dim, len(rank.kv_heads) * config.head_dim
    shapes: dict[str, tuple[int, ...]] = {}
    if has_embedding:
        shapes["embed"] = (len(rank.vocab), hidden)
    for layer in layers:
        shapes[f"layers.{layer}.attn_norm"] = (hidden,)
        shapes[f"layers.{layer}.qkv"] = (q_rows + 2 * kv_rows, hidden)
        shapes[f"layers.{layer}.o"] = (hidden, q_rows)
        shapes[f"layers.{layer}.mlp_norm"] = (hidden,)
        shapes[f"layers.{layer}.gate_up"] = (2 * len(rank.columns), hidden)
        shapes[f"layers.{layer}.down"] = (hidden, len(rank.columns))
    if has_head:
        shapes["norm"] = (hidden,)
        shapes["head"] = (len(rank.vocab), hidden)
    return shapes


def shard_parameters(
    config: ModelConfig, layers: range, rank: RankDeal, *, has_embedding: bool, has_head: bool
) -> int:
    """Weights of a shard, a tied head counted once."""
    shapes = shard_shapes(config, layers, rank, has_embedding=has_embedding, has_head=has_head)
    total = 0
    for name, shape in shapes.items():
        if name == "head" and has_embedding and config.tie_embeddings:
            continue
        total += shape[0] * (shape[1] if len(shape) > 1 else 1)
    return total
