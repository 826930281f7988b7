"""Which layers a stage runs."""

from __future__ import annotations

from itertools import combinations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from stagemesh.model.config import ModelConfig
from stagemesh.model.rope import RopeConfig
from stagemesh.model.split import parse_layers, parse_stage, split_costs, split_layers
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


def test_parse_stage_counts_from_zero() -> None:
    assert parse_stage("0/3") == (0, 3)
    assert parse_stage("2/3") == (2, 3)


@pytest.mark.parametrize("text", ["3/3", "0/0", "1", "-1/3", "1/3/5", "a/b", "", " 0/3", "0/3\n"])
def test_parse_stage_refuses(text: str) -> None:
    with pytest.raises(ConfigError, match="--stage"):
        parse_stage(text)


def test_parse_layers_is_half_open() -> None:
    assert parse_layers("10:20") == range(10, 20)
    assert parse_layers("10:20", 20) == range(10, 20)


@pytest.mark.parametrize("text", ["20:10", "10:10", "10", ":5", "5:", "-1:5", "a:b", "10:21"])
def test_parse_layers_refuses(text: str) -> None:
    with pytest.raises(ConfigError, match="--layers"):
        parse_layers(text, 20)


def test_head_takes_layers_off_the_last_stage() -> None:
    # The head weighs eight layers of this model: 38 in all, 13 at most on a third of it.
    assert split_layers(SMOLLM2, 3) == (range(13), range(13, 25), range(25, 30))
    assert split_layers(SMOLLM2, 1) == (range(30),)


def test_more_stages_than_layers_are_refused() -> None:
    assert len(split_layers(SMOLLM2, 30)) == 30
    with pytest.raises(ConfigError, match="31 stages asked for, but the model has 30 layers"):
        split_layers(SMOLLM2, 31)
    with pytest.raises(ConfigError, match="0 stages"):
        split_layers(SMOLLM2, 0)


def greatest(costs: list[int], parts: tuple[range, ...]) -> int:
    return max(sum(costs[i] for i in part) for part in parts)


@given(st.lists(st.integers(1, 50), min_size=1, max_size=9), st.integers(1, 9))
def test_split_is_optimal(costs: list[int], num_parts: int) -> None:
    num_parts = min(num_parts, len(costs))
    every = [
        tuple(range(a, b) for a, b in zip((0, *cuts), (*cuts, len(costs)), strict=True))
        for cuts in combinations(range(1, len(costs)), num_parts - 1)
    ]

    def badness(parts: tuple[range, ...]) -> tuple[int, int]:
        return greatest(costs, parts), sum(sum(costs[i] for i in part) ** 2 for part in parts)

    assert badness(split_costs(costs, num_parts)) == min(map(badness, every))


@given(st.lists(st.integers(0, 10**12), min_size=1, max_size=60), st.data())
def test_split_covers_every_layer_once_in_order(costs: list[int], data: st.DataObject) -> None:
    num_parts = data.draw(st.integers(1, len(costs)))
    parts = split_costs(costs, num_parts)
    assert len(parts) == num_parts
    assert all(len(part) > 0 for part in parts)
    assert [i for part in parts for i in part] == list(range(len(costs)))
