"""Which part of which tensor of the file goes where in a shard."""

from __future__ import annotations

from dataclasses import dataclass

from stagemesh.model.config import ModelConfig
from stagemesh.model.deal import RankDeal


@dataclass(frozen=True, slots=True, kw_only=True)
class Piece:
    """A rectangle of one tensor of the model, and the rows of the shard's tensor it fills."""

    target: str
    """Canonical name in the shard, as layers.3.qkv."""
    target_row: int
    """First row it fills there."""
    part: str
    """The tensor's role: q, k, v, o, gate, up, down, attn_norm, mlp_norm, norm, embed, head."""
    layer: int | None
    """The model's layer, counted over the whole model; None for tensors outside the layers."""
    full_shape: tuple[int, ...]
    """What the whole tensor in the file must measure."""
    rows: range
    """Of the whole tensor; of a vector, its elements."""
    columns: range
    """Of the whole tensor; not used for a vector."""
    head_dim: int
    """Rows of a head, for q and k."""


def plan_pieces(
    config: ModelConfig, layers: range, rank: RankDeal, *, has_embedding: bool, has_head: bool
) -> list[Piece]:
    """Everything to read, in the order of shard_shapes. A tied head is planned from the embedding."""
    hidden, head_dim = config.hidden_size, config.head_dim
    queries = range(rank.heads.start * head_dim, rank.heads.stop * head_dim)
    keys = range(rank.kv_heads.start * head_dim, rank.kv_heads.stop * head_dim)
    num_queries, num_keys = config.num_heads * head_dim, config.num_kv_heads * head_dim
    num_columns = config.intermediate_size
    wide = range(hidden)
    pieces: list[Piece] = []

    def add(
        target: str,
        part: str,
        layer: int | None,
        full_shape: tuple[int, ...],
        rows: range,
        columns: range = wide,
        at: int = 0,
    ) -> None:
        pieces.append(
            Piece(
                target=target,
                target_row=at,
                part=part,
                layer=layer,
                full_shape=full_shape,
                rows=rows,
                columns=columns,
                head_dim=head_dim,
            )
        )

    if has_embedding:
        add("embed", "embed", None, (config.vocab_size, hidden), rank.vocab)
    for i in layers:
        name = f"layers.{i}"
        add(f"{name}.attn_norm", "attn_norm", i, (hidden,), wide)
        add(f"{name}.qkv", "q", i, (num_queries, hidden), queries)
        add(f"{name}.qkv", "k", i, (num_keys, hidden), keys, at=len(queries))
        add(f"{name}.qkv", "v", i, (num_keys, hidden), keys, at=len(queries) + len(keys))
        add(f"{name}.o", "o", i, (hidden, num_queries), wide, queries)
        add(f"{name}.mlp_norm", "mlp_norm", i, (hidden,), wide)
        add(f"{name}.gate_up", "gate", i, (num_columns, hidden), rank.columns)
        add(f"{name}.gate_up", "up", i, (num_columns, hidden), rank.columns, at=len(rank.columns))
        add(f"{name}.down", "down", i, (hidden, num_columns), wide, rank.columns)
    if has_head:
        add("norm", "norm", None, (hidden,), wide)
        if not (config.tie_embeddings and has_embedding):
            part = "embed" if config.tie_embeddings else "head"
            add("head", part, None, (config.vocab_size, hidden), rank.vocab)
    return pieces
