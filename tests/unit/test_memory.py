"""Memory accounting: what is held, what is left, what is refused."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from stagemesh.model.config import ModelConfig
from stagemesh.model.deal import deal
from stagemesh.model.source import open_model
from stagemesh.stage.memory import (
    GIB,
    SPARE_BYTES,
    GPUMemory,
    MemoryNeeds,
    lane_memory,
    rank_memory,
    require_fit,
    smallest_layout,
    stage_memory,
)
from stagemesh.wire.errors import ConfigError

SHAPES = Path(__file__).parents[2] / "benchmarks" / "shapes"
H200 = GPUMemory(total_bytes=int(139.8 * GIB), share=0.9)
H100 = GPUMemory(total_bytes=int(79.1 * GIB), share=0.9)
NEEDS = MemoryNeeds(
    step_tokens=8192,
    sampled_rows=512,
    depth=3,
    max_slots=512,
    max_context=8192,
    block_size=16,
    itemsize=2,
)


def shape(name: str) -> ModelConfig:
    return open_model(SHAPES / name, weights=False).config


def test_one_rank_counts_every_weight_and_block_once() -> None:
    model = shape("llama-3.1-8b")
    memory = rank_memory(model, range(32), deal(model, 1)[0], NEEDS, H200)
    assert (
        memory.weights == 2 * 8_030_257_152 + 2 * 4096 + 0 * 2
    )  # the last norm, beside layers and both ends
    assert memory.block == 2 * 32 * 16 * 8 * 128 * 2
    assert memory.links == 0
    assert memory.sampling == 16 * 128256 * 64
    assert memory.fixed + memory.kv <= memory.budget == int(H200.total_bytes * 0.9)
    assert memory.fixed + memory.kv + memory.block > memory.budget
    # vLLM has 897,280 tokens there.
    assert memory.num_blocks * 16 > 850_000


def test_ranks_share_weights_and_kv() -> None:
    model = shape("llama-3.1-8b")
    whole = rank_memory(model, range(32), deal(model, 1)[0], NEEDS, H200)
    stage = stage_memory(model, range(32), deal(model, 3), NEEDS, [H200] * 3)
    # 8 KV heads on 3 ranks: 3 + 3 + 2, so the first ranks' blocks are the larger.
    assert [rank.block * 8 // whole.block for rank in stage.ranks] == [3, 3, 2]
    norms = (2 * 32 + 1) * 4096 * 2
    assert sum(rank.weights - norms for rank in stage.ranks) == whole.weights - norms
    assert stage.num_blocks == min(rank.num_blocks for rank in stage.ranks)
    assert stage.limiting_rank in (0, 1)


def test_links_and_logits_are_where_they_are_needed() -> None:
    model = shape("llama-3.1-8b")
    stages = lane_memory(model, 3, 1, NEEDS, H200).stages
    one = 3 * 8192 * 4096 * 2
    assert [stage.ranks[0].links for stage in stages] == [one, 2 * one, one]
    assert [stage.ranks[0].sampling > 0 for stage in stages] == [False, False, True]


def test_the_limiting_stage_is_named() -> None:
    lane = lane_memory(shape("llama-3.1-70b"), 4, 1, NEEDS, H100)
    blocks = [stage.num_blocks for stage in lane.stages]
    assert lane.num_blocks == min(blocks)
    assert blocks[lane.limiting_stage] == min(blocks)


def test_memory_used_by_others_counts() -> None:
    left = H200.total_bytes - 100 * GIB - SPARE_BYTES
    assert replace(H200, used_bytes=100 * GIB).budget == left
    assert replace(H200, used_bytes=GIB).budget == H200.budget
    assert replace(H200, used_bytes=H200.total_bytes).budget == 0
    model = shape("llama-3.1-8b")
    ranks = [replace(H200, used_bytes=used * GIB) for used in (0, 100)]
    stage = stage_memory(model, range(32), deal(model, 2), NEEDS, ranks)
    # The rank whose GPU others use decides for both.
    assert stage.limiting_rank == 1
    assert stage.num_blocks == (left - stage.ranks[1].fixed) // stage.ranks[1].block
    assert stage.num_blocks < stage.ranks[0].num_blocks / 3


def test_refusal_says_what_other_processes_hold() -> None:
    model = shape("llama-3.1-8b")
    gpu = replace(H100, used_bytes=65 * GIB)
    stage = stage_memory(model, range(32), deal(model, 1), NEEDS, [gpu])
    told = (
        r"may use 13\.85 GiB \(--memory-share 0\.9 of 79\.10, of which other processes hold 65\.00\); "
        r"without other processes it would fit this GPU; the smallest layout"
    )
    with pytest.raises(ConfigError, match=told):
        require_fit(model, stage, NEEDS, gpu, 1)
    model = shape("llama-3.1-70b")
    stage = stage_memory(model, range(80), deal(model, 1), NEEDS, [gpu])
    with pytest.raises(ConfigError, match=r"hold 65\.00\); the smallest layout"):
        require_fit(model, stage, NEEDS, gpu, 1)


def test_the_70b_shape_barely_fits_one_h200() -> None:
    model = shape("llama-3.1-70b")
    gpu = replace(H200, share=0.975)
    needs = replace(NEEDS, step_tokens=2048, sampled_rows=64, workspace_bytes=256 << 20, max_slots=64)
    one = lane_memory(model, 1, 1, needs, gpu).num_blocks
    two = lane_memory(model, 1, 2, needs, gpu).num_blocks
    assert 300 < one < 800
    assert 25_000 < two < 31_000
    assert smallest_layout(model, needs, gpu, min_blocks=one) == (1, 1)


def test_refusal_names_the_smallest_layout() -> None:
    model = shape("llama-3.1-70b")
    stage = stage_memory(model, range(80), deal(model, 1), NEEDS, [H100])
    assert stage.num_blocks == 0
    layout = smallest_layout(model, NEEDS, H100, 128)
    assert layout is not None
    stages, tp = layout
    assert lane_memory(model, stages, tp, NEEDS, H100).num_blocks >= 128
    for num_gpus in range(1, stages * tp):
        for other in (n for n in range(1, 9) if num_gpus % n == 0):
            assert lane_memory(model, num_gpus // other, other, NEEDS, H100).num_blocks < 128
    with pytest.raises(ConfigError, match=rf"layers 0:80 do not fit.*is {stages} stages? with --tp {tp}"):
        require_fit(model, stage, NEEDS, H100, 128)
    require_fit(model, stage_memory(model, range(20), deal(model, 2), NEEDS, [H100] * 2), NEEDS, H100, 128)


def test_refusal_where_no_layout_fits() -> None:
    model = shape("llama-3.1-8b")
    gpu = GPUMemory(total_bytes=GIB, share=0.9)
    assert smallest_layout(model, NEEDS, gpu, 1) is None
    with pytest.raises(ConfigError, match="64 GPUs of this size do not hold the model"):
        require_fit(model, stage_memory(model, range(32), deal(model, 1), NEEDS, [gpu]), NEEDS, gpu, 1)
