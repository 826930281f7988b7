"""The parts of a model against plain formulas: rope, linears, embedding and head."""

from __future__ import annotations

import dataclasses
import math

import pytest
import torch
import torch.nn.functional as F
from transformers import LlamaConfig
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding, apply_rotary_pos_emb

from stagemesh.model.config import ModelConfig
from stagemesh.model.rope import Llama3RopeScaling, RopeConfig
from stagemesh.stage import native
from stagemesh.stage.group import RankGroup
from stagemesh.stage.models.layers import (
    Linear,
    RMSNorm,
    RowParallelLinear,
    VocabParallelEmbedding,
    VocabParallelHead,
)
from stagemesh.stage.models.product import Layout, fastest_layout, pack_gated
from stagemesh.stage.models.rope import RotaryTable, rotate

CONFIG = ModelConfig(
    hidden_size=48,
    num_layers=2,
    num_heads=4,
    num_kv_heads=2,
    head_dim=12,
    intermediate_size=64,
    vocab_size=50,
    rms_norm_eps=1e-5,
    rope=RopeConfig(theta=500.0),
    tie_embeddings=False,
    max_context=200,
)
LLAMA3 = Llama3RopeScaling(factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0, original_max_position=32)

LAYOUTS: list[Layout] = ["transposed"]
if torch.backends.mkldnn.is_available():
    LAYOUTS.append("onednn")
if native.is_available():
    LAYOUTS.append("native")


class SumGroup(RankGroup):
    """Rank `rank` of two, whose other rank's partial result is known."""

    def __init__(self, rank: int, other: torch.Tensor) -> None:
        super().__init__(rank, 2)
        self._other = other

    def all_reduce(self, tensor: torch.Tensor) -> torch.Tensor:
        return tensor.add_(self._other)


@pytest.mark.parametrize("scaling", [None, LLAMA3], ids=["plain", "llama3"])
def test_rotation_is_transformers(scaling: Llama3RopeScaling | None) -> None:
    torch.manual_seed(0)
    rope = {"rope_type": "default", "rope_theta": 500.0}
    if scaling:
        rope |= {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
        rope["original_max_position_embeddings"] = 32
    theirs = LlamaRotaryEmbedding(
        LlamaConfig(hidden_size=48, num_attention_heads=4, head_dim=12, rope_parameters=rope)
    )
    config = dataclasses.replace(CONFIG, rope=RopeConfig(theta=500.0, scaling=scaling))
    positions = torch.tensor([0, 1, 5, 64, 199, 7])
    x = torch.randn(6, 4, 12)
    cos, sin = theirs(x, positions.unsqueeze(0))
    heads = x.transpose(0, 1).unsqueeze(0)
    expected, _ = apply_rotary_pos_emb(heads, heads, cos, sin)
    table = RotaryTable(config, 200, torch.float32)
    torch.testing.assert_close(
        rotate(x, *table.at(positions)), expected[0].transpose(0, 1), rtol=1e-4, atol=1e-5
    )


def test_rotation_depends_on_distance_alone_and_leaves_its_input() -> None:
    torch.manual_seed(1)
    table = RotaryTable(CONFIG, 200, torch.float32)
    query, key = torch.randn(1, 4, 12), torch.randn(1, 4, 12)
    before = query.clone()

    def score(one: int, other: int) -> torch.Tensor:
        left = rotate(query, *table.at(torch.tensor([one])))
        return (left * rotate(key, *table.at(torch.tensor([other])))).sum(-1)

    torch.testing.assert_close(score(9, 4), score(120, 115), rtol=1e-4, atol=1e-4)
    assert not torch.allclose(score(9, 4), score(9, 5), atol=1e-2)
    assert torch.equal(query, before)
    assert torch.equal(rotate(query, *table.at(torch.tensor([0]))), query)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("rows", [1, 2, 3, 40])
def test_linears(rows: int, layout: Layout) -> None:
    torch.manual_seed(2)
    weight, x, residual = torch.randn(24, 10), torch.randn(rows, 10), torch.randn(rows, 24)
    expected = F.linear(x, weight)
    torch.testing.assert_close(Linear(weight, layout)(x), expected, rtol=1e-4, atol=1e-5)
    rest = F.linear(x[:, 7:], weight[:, 7:])
    split = RowParallelLinear(weight[:, :7], SumGroup(0, rest), layout)
    torch.testing.assert_close(split(x[:, :7]), expected, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(split(x[:, :7], residual), expected + residual, rtol=1e-4, atol=1e-5)
    second = RowParallelLinear(weight[:, :7], SumGroup(1, rest), layout)
    torch.testing.assert_close(second(x[:, :7], residual), expected, rtol=1e-4, atol=1e-5)
    alone = RowParallelLinear(weight, RankGroup(), layout)
    before = residual.clone()
    torch.testing.assert_close(alone(x, residual), expected + residual, rtol=1e-4, atol=1e-5)
    assert torch.equal(residual, before)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("rows", [1, 5])
def test_gated_products(rows: int, dtype: torch.dtype, layout: Layout) -> None:
    torch.manual_seed(6)
    weight, x = torch.randn(2 * 13, 10).to(dtype), torch.randn(rows, 10).to(dtype)
    gate, up = F.linear(x.float(), weight.float()).chunk(2, dim=-1)
    tolerance = 1e-5 if dtype == torch.float32 else 4e-2
    out = pack_gated(weight, layout)(x)
    assert out.dtype == dtype
    torch.testing.assert_close(out.float(), F.silu(gate) * up, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize(
    ("maker", "machine", "layout"),
    [
        ("GenuineIntel", "x86_64", "transposed"),
        ("AuthenticAMD", "x86_64", "onednn"),
        ("", "aarch64", "transposed"),
    ],
)
def test_the_layout_goes_by_the_maker_of_the_cpu(
    maker: str, machine: str, layout: Layout, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("platform.machine", lambda: machine)
    monkeypatch.setattr("pathlib.Path.read_text", lambda path: f"vendor_id\t: {maker}\n")
    monkeypatch.setattr("torch.backends.mkldnn.is_available", lambda: True)
    monkeypatch.setattr(native, "_kernels", None)
    assert fastest_layout.__wrapped__(torch.float32) == layout


def test_norm() -> None:
    torch.manual_seed(3)
    x, weight = torch.randn(5, 48) * 1e-3, torch.rand(48)
    expected = x / (x.square().mean(-1, keepdim=True) + 1e-5).sqrt() * weight
    torch.testing.assert_close(RMSNorm(weight, 1e-5)(x), expected)


def test_embedding_of_a_rank_is_zero_outside_its_range() -> None:
    torch.manual_seed(4)
    weight, tokens = torch.randn(50, 6), torch.tensor([0, 31, 32, 49, 7, 32])
    whole = F.embedding(tokens, weight)
    assert torch.equal(VocabParallelEmbedding(weight, range(50), RankGroup())(tokens), whole)
    silent = torch.zeros(6, 6)
    low = VocabParallelEmbedding(weight[:32], range(32), SumGroup(0, silent))(tokens)
    high = VocabParallelEmbedding(weight[32:], range(32, 50), SumGroup(1, silent))(tokens)
    assert torch.equal(low + high, whole)
    assert not low[[2, 3, 5]].any()
    assert not high[[0, 1, 4]].any()


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("rows", [1, 2, 3, 17])
def test_head(rows: int, layout: Layout) -> None:
    torch.manual_seed(5)
    weight, hidden = torch.randn(50, 6), torch.randn(rows, 6)
    head = VocabParallelHead(weight, layout, tied=True)
    assert head.copied_bytes == (50 * 6 * 4 if layout != "transposed" else 0)
    assert VocabParallelHead(weight, layout, tied=False).copied_bytes == 0
    logits = head(hidden)
    assert logits.is_contiguous()
    torch.testing.assert_close(logits, F.linear(hidden, weight), rtol=1e-4, atol=1e-5)
    half = VocabParallelHead(weight.bfloat16(), layout, tied=False)(hidden.bfloat16())
    assert half.dtype == torch.float32
    assert not math.isnan(float(half.sum()))
