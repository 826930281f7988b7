"""Shards from GGUF files: every quantization, the rotation layout, slices inside quantized blocks."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

from stagemesh.model.deal import deal
from stagemesh.model.source import open_model
from stagemesh.stage.weights import load_shard
from stagemesh.stage.weights.dequantize import SUPPORTED_TYPES
from stagemesh.wire.errors import ModelError

HIDDEN, COLUMNS, HEADS, KV_HEADS, HEAD_DIM, VOCAB, LAYERS = 256, 512, 6, 3, 128, 70, 1
# Byte of a block at which its float16 scales begin, and their number: random bytes there could be NaN.
CRAFTED_SCALES = {"Q2_K": (80, 2), "Q3_K": (108, 1), "Q4_K": (0, 2), "Q5_K": (0, 2), "Q6_K": (208, 1)}
SHAPES = {
    "token_embd": (VOCAB, HIDDEN),
    "blk.0.attn_q": (HEADS * HEAD_DIM, HIDDEN),
    "blk.0.attn_k": (KV_HEADS * HEAD_DIM, HIDDEN),
    "blk.0.attn_v": (KV_HEADS * HEAD_DIM, HIDDEN),
    "blk.0.attn_output": (HIDDEN, HEADS * HEAD_DIM),
    "blk.0.ffn_gate": (COLUMNS, HIDDEN),
    "blk.0.ffn_up": (COLUMNS, HIDDEN),
    "blk.0.ffn_down": (HIDDEN, COLUMNS),
    "output": (VOCAB, HIDDEN),
}


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """Small copies on two threads wait for each other wherever the cores are busy."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def quantize(shape: tuple[int, int], kind: str, rng: np.random.Generator) -> np.ndarray[Any, Any]:
    ggml_type = gguf.GGMLQuantizationType[kind]
    if kind not in CRAFTED_SCALES:
        values = rng.standard_normal(shape).astype(np.float32)
        return np.asarray(gguf.quants.quantize(values, ggml_type))
    block, block_bytes = gguf.GGML_QUANT_SIZES[ggml_type]
    raw = rng.integers(0, 256, (shape[0], shape[1] // block, block_bytes), dtype=np.uint8)
    at, count = CRAFTED_SCALES[kind]
    scales = rng.uniform(0.01, 0.02, (*raw.shape[:2], count)).astype(np.float16)
    raw[..., at : at + 2 * count] = scales.view(np.uint8)
    return raw.reshape(shape[0], -1)


def write(path: Path, kind: str, *, leave_out: str = "", wrong: str = "") -> dict[str, np.ndarray[Any, Any]]:
    """A model of one layer with matrices of one type; returns them by GGUF name, as gguf dequantizes them."""
    rng = np.random.default_rng(3)
    ggml_type = gguf.GGMLQuantizationType[kind]
    writer = gguf.GGUFWriter(str(path), "llama")
    writer.add_block_count(LAYERS)
    writer.add_context_length(512)
    writer.add_embedding_length(HIDDEN)
    writer.add_feed_forward_length(COLUMNS)
    writer.add_head_count(HEADS)
    writer.add_head_count_kv(KV_HEADS)
    writer.add_key_length(HEAD_DIM)
    writer.add_layer_norm_rms_eps(1e-5)
    expected = {}
    for name, shape in SHAPES.items():
        if name == leave_out:
            continue
        raw = quantize((shape[0] - (name == wrong), shape[1]), kind, rng)
        writer.add_tensor(f"{name}.weight", raw, raw_dtype=ggml_type)
        expected[name] = np.asarray(gguf.quants.dequantize(raw.view(raw.dtype), ggml_type), dtype=np.float32)
    for name in ("blk.0.attn_norm", "blk.0.ffn_norm", "output_norm"):
        expected[name] = rng.standard_normal(HIDDEN).astype(np.float32)
        writer.add_tensor(f"{name}.weight", expected[name])
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return expected


def halves(rows: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    """Rows of interleaved pairs to rows of halves, a head at a time: 0 2 4 ... 1 3 5 ..."""
    order = [*range(0, HEAD_DIM, 2), *range(1, HEAD_DIM, 2)]
    heads = rows.reshape(-1, HEAD_DIM, rows.shape[1])
    return heads[:, order].reshape(rows.shape)


@pytest.mark.parametrize("kind", SUPPORTED_TYPES)
def test_every_type_equals_gguf(tmp_path: Path, kind: str) -> None:
    expected = write(tmp_path / "m.gguf", kind)
    assert all(np.isfinite(values).all() and np.ptp(values) > 0.1 for values in expected.values())
    source = open_model(tmp_path / "m.gguf")
    for tp in (1, 2, 3):
        for rank in deal(source.config, tp):
            shard = load_shard(
                source, range(LAYERS), rank, dtype=torch.float32, has_embedding=True, has_head=True
            )
            q = slice(rank.heads.start * HEAD_DIM, rank.heads.stop * HEAD_DIM)
            kv = slice(rank.kv_heads.start * HEAD_DIM, rank.kv_heads.stop * HEAD_DIM)
            columns = slice(rank.columns.start, rank.columns.stop)
            vocab = slice(rank.vocab.start, rank.vocab.stop)
            parts = {
                "embed": expected["token_embd"][vocab],
                "layers.0.attn_norm": expected["blk.0.attn_norm"],
                "layers.0.qkv": np.concatenate(
                    [
                        halves(expected["blk.0.attn_q"])[q],
                        halves(expected["blk.0.attn_k"])[kv],
                        expected["blk.0.attn_v"][kv],
                    ]
                ),
                "layers.0.o": expected["blk.0.attn_output"][:, q],
                "layers.0.mlp_norm": expected["blk.0.ffn_norm"],
                "layers.0.gate_up": np.concatenate(
                    [expected["blk.0.ffn_gate"][columns], expected["blk.0.ffn_up"][columns]]
                ),
                "layers.0.down": expected["blk.0.ffn_down"][:, columns],
                "norm": expected["output_norm"],
                "head": expected["output"][vocab],
            }
            assert list(shard) == list(parts)
            for name, values in parts.items():
                assert torch.equal(shard[name], torch.from_numpy(np.ascontiguousarray(values))), name


def test_slices_inside_a_block(tmp_path: Path) -> None:
    # 3 ranks take 192, 160 and 160 of the 512 columns of down: each cuts a 256-wide block of a K-quant.
    expected = write(tmp_path / "m.gguf", "Q6_K")
    source = open_model(tmp_path / "m.gguf")
    ranks = deal(source.config, 3)
    assert [len(rank.columns) for rank in ranks] == [192, 160, 160]
    shards = [
        load_shard(source, range(LAYERS), rank, dtype=torch.bfloat16, has_embedding=False, has_head=False)
        for rank in ranks
    ]
    down = torch.cat([shard["layers.0.down"] for shard in shards], dim=1)
    assert torch.equal(down, torch.from_numpy(expected["blk.0.ffn_down"]).bfloat16())


def test_tied_when_the_file_has_no_head(tmp_path: Path) -> None:
    expected = write(tmp_path / "m.gguf", "Q8_0", leave_out="output")
    source = open_model(tmp_path / "m.gguf")
    assert source.config.tie_embeddings
    rank = deal(source.config, 1)[0]
    both = load_shard(source, range(LAYERS), rank, dtype=torch.float32, has_embedding=True, has_head=True)
    assert both["head"].data_ptr() == both["embed"].data_ptr()
    last = load_shard(source, range(LAYERS), rank, dtype=torch.float32, has_embedding=False, has_head=True)
    assert torch.equal(last["head"], torch.from_numpy(expected["token_embd"]))


def test_bad_tensors_are_named(tmp_path: Path) -> None:
    ends = {"has_embedding": True, "has_head": True}
    for number, (kind, options, message) in enumerate(
        [
            (
                "Q4_0",
                {"leave_out": "blk.0.attn_v"},
                r"no tensor blk\.0\.attn_v\.weight, expected \[384, 256\]",
            ),
            (
                "Q4_0",
                {"wrong": "blk.0.ffn_up"},
                r"ffn_up\.weight has shape \[511, 256\], expected \[512, 256\]",
            ),
            ("TQ1_0", {}, r"token_embd\.weight has type TQ1_0.*supported: F32, F16, BF16, Q8_0, .*Q6_K"),
        ]
    ):
        path = tmp_path / f"{number}.gguf"
        write(path, kind, **options)
        source = open_model(path)
        with pytest.raises(ModelError, match=message):
            load_shard(source, range(LAYERS), deal(source.config, 1)[0], dtype=torch.float32, **ends)


def test_rotation_layout_equals_transformers(tmp_path: Path) -> None:
    """A model written to GGUF the way llama.cpp's converter does, read back by transformers and by us."""
    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        vocab_size=64,
        initializer_range=0.3,
    )
    state = {name: t.detach().numpy() for name, t in LlamaForCausalLM(config).state_dict().items()}

    def permute(weights: np.ndarray[Any, Any], num_heads: int) -> np.ndarray[Any, Any]:
        # convert_hf_to_gguf.py, LlamaModel.permute
        halved = weights.reshape(num_heads, 2, weights.shape[0] // num_heads // 2, *weights.shape[1:])
        return np.ascontiguousarray(halved.swapaxes(1, 2).reshape(weights.shape))

    writer = gguf.GGUFWriter(str(tmp_path / "m.gguf"), "llama")
    writer.add_block_count(2)
    writer.add_context_length(512)
    writer.add_embedding_length(64)
    writer.add_feed_forward_length(96)
    writer.add_head_count(4)
    writer.add_head_count_kv(2)
    writer.add_layer_norm_rms_eps(1e-6)
    writer.add_rope_dimension_count(16)
    writer.add_vocab_size(64)
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, 2)
    for name, weights in state.items():
        if ".q_proj." in name:
            weights = permute(weights, 4)
        elif ".k_proj." in name:
            weights = permute(weights, 2)
        writer.add_tensor(names.get_name(name, try_suffixes=(".weight",)), weights)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()

    theirs = AutoModelForCausalLM.from_pretrained(tmp_path, gguf_file="m.gguf").state_dict()
    source = open_model(tmp_path / "m.gguf")
    rank = deal(source.config, 1)[0]
    ours = load_shard(source, range(2), rank, dtype=torch.float32, has_embedding=True, has_head=True)
    for i in range(2):
        prefix = f"model.layers.{i}.self_attn"
        whole = torch.cat([theirs[f"{prefix}.{part}_proj.weight"] for part in "qkv"])
        assert torch.equal(ours[f"layers.{i}.qkv"], whole)
        assert torch.equal(whole[:64], torch.from_numpy(state[f"{prefix}.q_proj.weight"]))
