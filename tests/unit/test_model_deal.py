"""What each tensor-parallel rank holds."""

from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from stagemesh.model.config import ModelConfig
from stagemesh.model.deal import CHUNK, deal, deal_evenly
from stagemesh.model.rope import RopeConfig
from stagemesh.model.shard_shapes import shard_parameters
from stagemesh.wire.errors import ConfigError

SMOLLM2 = ModelConfig(
    hidden_size=576,
    num_layers=30,
    num_heads=9,
    num_kv_heads=3,
    head_dim=64,
    intermediate_size=1536,
    vocab_size=49152,
    rms_norm_eps=1e-5,
    rope=RopeConfig(theta=100000.0),
    tie_embeddings=True,
    max_context=8192,
)


def test_three_kv_heads_on_two_ranks() -> None:
    first, second = deal(SMOLLM2, 2)
    assert (first.kv_heads, second.kv_heads) == (range(2), range(2, 3))
    assert (first.heads, second.heads) == (range(6), range(6, 9))
    assert (first.columns, second.columns) == (range(768), range(768, 1536))
    assert (first.vocab, second.vocab) == (range(24576), range(24576, 49152))


def test_more_ranks_than_kv_heads_are_refused() -> None:
    with pytest.raises(ConfigError, match="--tp is 4, but the model has 3 KV heads"):
        deal(SMOLLM2, 4)
    with pytest.raises(ConfigError, match="--tp is 0"):
        deal(SMOLLM2, 0)


@given(
    st.integers(1, 8),
    st.integers(1, 6),
    st.integers(8, 3000),
    st.integers(8, 3000),
    st.data(),
)
def test_everything_is_dealt_once_in_order(
    kv_heads: int, group: int, columns: int, vocab: int, data: st.DataObject
) -> None:
    config = replace(
        SMOLLM2,
        num_heads=kv_heads * group,
        num_kv_heads=kv_heads,
        intermediate_size=columns,
        vocab_size=vocab,
    )
    tp = data.draw(st.integers(1, kv_heads))
    ranks = deal(config, tp)
    assert [(rank.rank, rank.size) for rank in ranks] == [(i, tp) for i in range(tp)]
    for parts, count in [
        ([rank.kv_heads for rank in ranks], kv_heads),
        ([rank.heads for rank in ranks], kv_heads * group),
        ([rank.columns for rank in ranks], columns),
        ([rank.vocab for rank in ranks], vocab),
    ]:
        assert [i for part in parts for i in part] == list(range(count))
        assert all(len(part) > 0 for part in parts)
    for rank in ranks:
        assert {head // group for head in rank.heads} == set(rank.kv_heads)


@given(st.integers(1, 5000), st.integers(1, 16), st.sampled_from([1, 8, 32]))
def test_even_shares_begin_at_chunks(count: int, ranks: int, chunk: int) -> None:
    if count < ranks:
        with pytest.raises(ConfigError):
            deal_evenly(count, ranks, chunk=chunk)
        return
    parts = deal_evenly(count, ranks, chunk=chunk)
    lengths = [len(part) for part in parts]
    assert max(lengths) - min(lengths) < 2 * chunk
    if -(-count // chunk) >= ranks:
        assert all(part.start % chunk == 0 for part in parts)


def test_ranks_hold_the_whole_model_together() -> None:
    layers = range(SMOLLM2.num_layers)
    norms = SMOLLM2.hidden_size * (2 * SMOLLM2.num_layers + 1)

    ends = {"has_embedding": True, "has_head": True}

    def held(tp: int) -> int:
        return sum(shard_parameters(SMOLLM2, layers, rank, **ends) for rank in deal(SMOLLM2, tp))

    assert held(1) == 134_515_008  # what the model's authors count
    assert held(2) == held(1) + norms  # every rank has the norms
    assert SMOLLM2.intermediate_size % CHUNK == 0
