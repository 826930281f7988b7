"""The compiled kernels against plain formulas, and that nothing needs them."""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from batches_for_tests import batch

from stagemesh.model.config import ModelConfig
from stagemesh.model.deal import deal
from stagemesh.model.rope import RopeConfig
from stagemesh.stage import native
from stagemesh.stage.attention import TorchPagedAttention
from stagemesh.stage.group import RankGroup
from stagemesh.stage.models.llama import LlamaStage
from stagemesh.stage.models.native_layers import NativeLayers
from stagemesh.stage.models.product import Layout, fastest_layout
from stagemesh.stage.native.huge_pages import CHUNK_BYTES, HugePages

needs_kernels = pytest.mark.skipif(not native.is_available(), reason="no compiled kernels on this machine")

BLOCK, BLOCKS = 4, 96
CONFIG = ModelConfig(
    hidden_size=72,
    num_layers=3,
    num_heads=6,
    num_kv_heads=3,
    head_dim=16,
    intermediate_size=104,
    vocab_size=50,
    rms_norm_eps=1e-5,
    rope=RopeConfig(theta=500.0),
    tie_embeddings=False,
    max_context=200,
)


@pytest.fixture(autouse=True)
def two_threads() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(threads)


@needs_kernels
@pytest.mark.parametrize("rows", [1, 2, 4, 5, 13, 14, 15, 16, 17, 29, 255, 256, 257, 600])
@pytest.mark.parametrize(("out", "width"), [(24, 10), (96, 300), (33, 129)])
def test_a_product_of_any_rows(rows: int, out: int, width: int) -> None:
    torch.manual_seed(rows)
    weight, x, residual = torch.randn(out, width), torch.randn(rows, width), torch.randn(rows, out)
    panels = native.in_panels(weight)
    torch.testing.assert_close(native.linear(x, panels, out), F.linear(x, weight), rtol=1e-4, atol=1e-4)
    added = native.linear(x, panels, out, residual)
    torch.testing.assert_close(added, F.linear(x, weight) + residual, rtol=1e-4, atol=1e-4)


@needs_kernels
def test_a_row_is_the_same_to_the_last_bit_in_any_company() -> None:
    torch.manual_seed(0)
    panels, x = native.in_panels(torch.randn(70, 300)), torch.randn(300, 300)
    together = native.linear(x, panels, 70)
    for count in (1, 6, 16, 40):
        assert torch.equal(native.linear(x[:count], panels, 70), together[:count])


@needs_kernels
def test_wide_outputs_that_go_past_the_cache() -> None:
    torch.manual_seed(0)
    weight, x = torch.randn(20_000, 8), torch.randn(16, 8)
    torch.testing.assert_close(native.linear(x, native.in_panels(weight), 20_000), F.linear(x, weight))


@needs_kernels
def test_two_threads_at_once_have_scratch_of_their_own() -> None:
    torch.manual_seed(1)
    weights = [torch.randn(96, 200), torch.randn(64, 333)]
    inputs = [torch.randn(16, 200), torch.randn(40, 333)]
    panels = [native.in_panels(weight) for weight in weights]

    def repeat(index: int) -> bool:
        expected = F.linear(inputs[index], weights[index])
        for _ in range(300):
            out = native.linear(inputs[index], panels[index], len(weights[index]))
            if not torch.allclose(out, expected, rtol=1e-4, atol=1e-4):
                return False
        return True

    with ThreadPoolExecutor(2) as pool:
        assert all(pool.map(repeat, range(2)))


@needs_kernels
@pytest.mark.parametrize("rows", [1, 9, 300])
def test_an_mlp_whose_gates_are_far_out(rows: int) -> None:
    """silu of what a gate gives there: 0 and the number itself, not a NaN."""
    torch.manual_seed(rows)
    model, _ = _stage("native")
    assert model.native is not None
    x = torch.randn(rows, 72)
    x[0] *= 1e4
    mlp, norm = model.layers[1].mlp, model.layers[1].mlp_norm
    mlp.gated.panels.mul_(1e3)
    expected = mlp(norm(x), x)
    assert bool(expected.isfinite().all())
    tolerance = 1e-5 * expected.abs().max().item()
    torch.testing.assert_close(model.native.mlp(1, x.clone()), expected, rtol=1e-4, atol=tolerance)


@needs_kernels
@pytest.mark.parametrize("rows", [1, 3, 16, 17, 40])
def test_decode_is_torchs(rows: int) -> None:
    torch.manual_seed(rows)
    stages = {layout: _stage(layout) for layout in ("transposed", "native")}
    assert stages["native"][0].native is not None
    generator = np.random.default_rng(rows)
    tables = generator.permutation(BLOCKS)[: rows * 2].reshape(rows, 2).tolist()
    for start, count in ((0, 5), (5, 1), (6, 1), (7, 1)):
        tokens = torch.from_numpy(generator.integers(0, 50, rows * count))
        step = batch([(start, count, table) for table in tables], BLOCK)
        outs = {}
        for layout, (model, attention) in stages.items():
            attention.plan(step)
            hidden = model(tokens, torch.from_numpy(step.positions), attention)
            outs[layout] = model.logits(hidden)
        torch.testing.assert_close(outs["native"], outs["transposed"], rtol=1e-4, atol=1e-4)


@needs_kernels
def test_decode_leaves_what_it_was_given() -> None:
    torch.manual_seed(0)
    model, attention = _stage("native", first=False)
    hidden = torch.randn(1, 72)
    before = hidden.clone()
    step = batch([(0, 1, [3])], BLOCK)
    attention.plan(step)
    out = model(hidden, torch.from_numpy(step.positions), attention)
    assert torch.equal(hidden, before)
    assert not torch.equal(out, before)


@needs_kernels
def test_what_the_kernels_cannot_do_is_torchs() -> None:
    assert not NativeLayers.takes(batch([(0, 2, [0]), (3, 1, [1])], BLOCK))
    assert NativeLayers.takes(batch([(0, 1, [0]), (3, 1, [1])], BLOCK))
    assert not NativeLayers.fits(CONFIG, torch.bfloat16)
    assert fastest_layout(torch.float32) == "native"
    assert fastest_layout(torch.bfloat16) != "native"


def test_without_the_kernels_products_are_torchs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(native, "_kernels", None)
    assert not native.is_available()
    assert fastest_layout.__wrapped__(torch.float32) in ("transposed", "onednn")


def test_huge_pages_are_dealt_apart() -> None:
    memory = HugePages()
    shapes = [(3, 5), (1000, 1000), (CHUNK_BYTES // 4 + 10,), (7,), (CHUNK_BYTES // 8,), (CHUNK_BYTES // 8,)]
    tensors = [memory.empty(shape).fill_(index) for index, shape in enumerate(shapes)]
    for index, (tensor, shape) in enumerate(zip(tensors, shapes, strict=True)):
        assert tensor.shape == shape
        assert tensor.data_ptr() % 64 == 0
        assert bool((tensor == index).all())


def _stage(layout: Layout, *, first: bool = True) -> tuple[LlamaStage, TorchPagedAttention]:
    """The same weights whatever the layout."""
    generator = torch.Generator().manual_seed(7)

    def random(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator) * 0.3

    weights = {"embed": random(50, 72)} if first else {}
    weights |= {"head": random(50, 72), "norm": random(72)}
    for index in range(CONFIG.num_layers):
        weights |= {
            f"layers.{index}.qkv": random((6 + 2 * 3) * 16, 72),
            f"layers.{index}.o": random(72, 6 * 16),
            f"layers.{index}.gate_up": random(2 * 104, 72),
            f"layers.{index}.down": random(72, 104),
            f"layers.{index}.attn_norm": random(72),
            f"layers.{index}.mlp_norm": random(72),
        }
    ranks = deal(CONFIG, 1)
    model = LlamaStage(
        CONFIG,
        range(CONFIG.num_layers),
        ranks[0],
        weights,
        RankGroup(),
        dtype=torch.float32,
        max_context=200,
        layout=layout,
    )
    attention = TorchPagedAttention(
        num_layers=CONFIG.num_layers,
        num_blocks=BLOCKS,
        block_size=BLOCK,
        num_heads=6,
        num_kv_heads=3,
        head_dim=16,
        dtype=torch.float32,
    )
    if layout == "native":
        model.native = NativeLayers(CONFIG, ranks[0], model.layers, attention, RankGroup())
    return model.eval(), attention
