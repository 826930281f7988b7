"""What each tensor-parallel rank holds. Pure arithmetic."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise

from stagemesh.model.config import ModelConfig
from stagemesh.wire.errors import ConfigError

CHUNK = 32
"""Columns and vocabulary rows are dealt in chunks of this: the block of GGUF's quantized rows, and a whole
number of vector registers in a matrix product."""


@dataclass(frozen=True, slots=True, kw_only=True)
class RankDeal:
    """One rank's share of every layer, of the embedding and of the head."""

    rank: int
    """From 0."""
    size: int
    """Ranks of the group."""
    kv_heads: range
    """Key and value heads."""
    heads: range
    """Query heads: all those of the rank's KV heads."""
    columns: range
    """Of the MLP's hidden layer."""
    vocab: range
    """Rows of the embedding and of the head."""


def deal(config: ModelConfig, tp: int) -> tuple[RankDeal, ...]:
    """Deals a model to tp ranks: everything once, in order, the lower ranks the greater shares.

    Attention goes in whole KV heads with their query heads (3 KV heads on 2 ranks: 2 + 1). The MLP is dealt
    evenly for itself, not to make up for uneven attention: with an all-reduce after each of the two, a layer
    is as slow as the slowest rank of the one plus the slowest rank of the other.

    Raises:
        ConfigError: tp is below 1 or above the number of KV heads, or a rank would go empty.
    """
    if tp < 1:
        raise ConfigError(f"--tp is {tp}, expected at least 1")
    if tp > config.num_kv_heads:
        raise ConfigError(
            f"--tp is {tp}, but the model has {config.num_kv_heads} KV heads, and a rank needs a whole one; "
            f"use at most {config.num_kv_heads}"
        )
    group = config.heads_per_kv_head
    kv_heads = deal_evenly(config.num_kv_heads, tp)
    columns = deal_evenly(config.intermediate_size, tp, chunk=CHUNK)
    vocab = deal_evenly(config.vocab_size, tp, chunk=CHUNK)
    return tuple(
        RankDeal(
            rank=rank,
            size=tp,
            kv_heads=kv_heads[rank],
            heads=range(kv_heads[rank].start * group, kv_heads[rank].stop * group),
            columns=columns[rank],
            vocab=vocab[rank],
        )
        for rank in range(tp)
    )


def deal_evenly(count: int, ranks: int, *, chunk: int = 1) -> tuple[range, ...]:
    """Cuts range(count) into one non-empty range per rank, begins at multiples of chunk where count allows.

    Shares differ by at most one chunk. With fewer chunks than ranks single items are dealt instead.

    Raises:
        ConfigError: Fewer items than ranks.
    """
    if count < ranks:
        raise ConfigError(f"{count} items cannot be dealt to {ranks} ranks; use --tp {count} at most")
    num_chunks = -(-count // chunk)
    if num_chunks < ranks:
        chunk, num_chunks = 1, count
    share, larger = divmod(num_chunks, ranks)
    bounds = [min(count, chunk * (rank * share + min(rank, larger))) for rank in range(ranks + 1)]
    return tuple(range(begin, end) for begin, end in pairwise(bounds))
