"""Shards from safetensors, and random ones."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import LlamaConfig, LlamaForCausalLM

from stagemesh.model.deal import RankDeal, deal
from stagemesh.model.shard_shapes import shard_parameters, shard_shapes
from stagemesh.model.source import ModelSource, open_model
from stagemesh.model.split import split_layers
from stagemesh.stage.weights import dummy as dummy_module
from stagemesh.stage.weights import load_shard
from stagemesh.stage.weights.dummy import DummyReader
from stagemesh.stage.weights.piece import Piece, plan_pieces
from stagemesh.stage.weights.safetensors_reader import SafetensorsReader
from stagemesh.stage.weights.upload import Uploader
from stagemesh.wire.errors import ModelError

NUM_LAYERS = 4


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """Small copies on two threads wait for each other wherever the cores are busy."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def save(folder: Path, *, tied: bool = False, shard: str = "1GB", dtype: torch.dtype = torch.float32) -> Path:
    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=63,
        intermediate_size=83,  # no multiple of a chunk
        num_hidden_layers=NUM_LAYERS,
        num_attention_heads=9,
        num_key_value_heads=3,
        head_dim=8,  # heads x head_dim is not the hidden size
        vocab_size=103,
        initializer_range=0.3,
        tie_word_embeddings=tied,
    )
    model = LlamaForCausalLM(config).to(dtype)
    for name, tensor in model.named_parameters():
        if "norm" in name:  # ones in a new model, which would hide a mix-up
            tensor.data.uniform_(0.5, 1.5)
    model.save_pretrained(folder, max_shard_size=shard)
    return folder


def state_of(folder: Path) -> dict[str, torch.Tensor]:
    return {name: tensor for file in folder.glob("*.safetensors") for name, tensor in load_file(file).items()}


def expected_shard(
    state: dict[str, torch.Tensor], layers: range, rank: RankDeal, *, tied: bool, embedding: bool, head: bool
) -> dict[str, torch.Tensor]:
    """The shard by whole tensors and plain indexing."""
    q = torch.tensor([h * 8 + d for h in rank.heads for d in range(8)])
    kv = torch.tensor([h * 8 + d for h in rank.kv_heads for d in range(8)])
    columns, vocab = torch.tensor(list(rank.columns)), torch.tensor(list(rank.vocab))
    shard = {}
    if embedding:
        shard["embed"] = state["model.embed_tokens.weight"][vocab]
    for i in layers:
        attention, mlp = f"model.layers.{i}.self_attn", f"model.layers.{i}.mlp"
        shard[f"layers.{i}.attn_norm"] = state[f"model.layers.{i}.input_layernorm.weight"]
        shard[f"layers.{i}.qkv"] = torch.cat(
            [
                state[f"{attention}.q_proj.weight"][q],
                state[f"{attention}.k_proj.weight"][kv],
                state[f"{attention}.v_proj.weight"][kv],
            ]
        )
        shard[f"layers.{i}.o"] = state[f"{attention}.o_proj.weight"][:, q]
        shard[f"layers.{i}.mlp_norm"] = state[f"model.layers.{i}.post_attention_layernorm.weight"]
        shard[f"layers.{i}.gate_up"] = torch.cat(
            [state[f"{mlp}.gate_proj.weight"][columns], state[f"{mlp}.up_proj.weight"][columns]]
        )
        shard[f"layers.{i}.down"] = state[f"{mlp}.down_proj.weight"][:, columns]
    if head:
        shard["norm"] = state["model.norm.weight"]
        shard["head"] = state["model.embed_tokens.weight" if tied else "lm_head.weight"][vocab]
    return shard


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("shard", ["1GB", "40KB"])
@pytest.mark.parametrize(("num_stages", "tp"), [(1, 1), (1, 2), (3, 2), (2, 3), (4, 1)])
def test_every_stage_and_rank_gets_its_part(
    tmp_path: Path, tied: bool, shard: str, num_stages: int, tp: int
) -> None:
    folder = save(tmp_path / "model", tied=tied, shard=shard)
    state, source = state_of(folder), open_model(folder)
    for stage, layers in enumerate(split_layers(source.config, num_stages)):
        ends = {"has_embedding": stage == 0, "has_head": stage == num_stages - 1}
        for rank in deal(source.config, tp):
            loaded = load_shard(source, layers, rank, dtype=torch.float32, **ends)
            expected = expected_shard(
                state, layers, rank, tied=tied, embedding=ends["has_embedding"], head=ends["has_head"]
            )
            assert list(loaded) == list(expected)
            for name, tensor in expected.items():
                assert torch.equal(loaded[name], tensor), name
            shapes = shard_shapes(source.config, layers, rank, **ends)
            assert {name: tuple(tensor.shape) for name, tensor in loaded.items()} == shapes
            held = {tensor.data_ptr(): tensor.numel() for tensor in loaded.values()}
            assert sum(held.values()) == shard_parameters(source.config, layers, rank, **ends)


def load_whole(source: ModelSource, dtype: torch.dtype = torch.float32) -> dict[str, torch.Tensor]:
    rank = deal(source.config, 1)[0]
    return load_shard(source, range(NUM_LAYERS), rank, dtype=dtype, has_embedding=True, has_head=True)


def test_dtype_is_converted_and_tied_head_shares_storage(tmp_path: Path) -> None:
    folder = save(tmp_path / "model", tied=True, dtype=torch.bfloat16)
    loaded = load_whole(open_model(folder), torch.float16)
    assert {tensor.dtype for tensor in loaded.values()} == {torch.float16}
    assert loaded["head"].data_ptr() == loaded["embed"].data_ptr()
    expected = state_of(folder)["model.layers.1.self_attn.o_proj.weight"].half()
    assert torch.equal(loaded["layers.1.o"], expected)


def test_progress_ends_at_the_total(tmp_path: Path) -> None:
    source = open_model(save(tmp_path / "model"))
    seen: list[tuple[int, int]] = []
    rank = deal(source.config, 2)[1]
    load_shard(
        source,
        range(1, 3),
        rank,
        dtype=torch.bfloat16,
        has_embedding=False,
        has_head=True,
        progress=lambda done, total: seen.append((done, total)),
    )
    total = 2 * shard_parameters(source.config, range(1, 3), rank, has_embedding=False, has_head=True)
    assert {of for _, of in seen} == {total}
    assert [done for done, _ in seen] == sorted({done for done, _ in seen})
    assert seen[-1] == (total, total)


def test_a_stage_starts_with_only_its_own_shard_files(tmp_path: Path) -> None:
    source = open_model(save(tmp_path / "model", shard="40KB"))
    state = state_of(source.path)
    mine = {file for name, file in source.weight_files.items() if ".layers.2." in name}
    others = set(source.weight_files.values()) - mine
    assert others
    for file in others:
        file.unlink()
    rank = deal(source.config, 1)[0]
    ends = {"has_embedding": False, "has_head": False}
    loaded = load_shard(open_model(source.path), range(2, 3), rank, dtype=torch.float32, **ends)
    assert torch.equal(loaded["layers.2.down"], state["model.layers.2.mlp.down_proj.weight"])
    with pytest.raises(
        ModelError, match=r"shard file .* is missing; this stage needs tensor model\.layers\.0"
    ):
        load_shard(source, range(1), rank, dtype=torch.float32, **ends)


def test_missing_tensor_is_named(tmp_path: Path) -> None:
    folder = save(tmp_path / "model")
    state = state_of(folder)
    del state["model.layers.3.mlp.up_proj.weight"]
    save_file(state, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(
        ModelError, match=r"no tensor model\.layers\.3\.mlp\.up_proj\.weight, expected \[83, 63\]"
    ):
        load_whole(open_model(folder))


def test_wrong_shape_names_both(tmp_path: Path) -> None:
    folder = save(tmp_path / "model")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "intermediate_size": 96}))
    with pytest.raises(ModelError, match=r"gate_proj\.weight has shape \[83, 63\], expected \[96, 63\]"):
        load_whole(open_model(folder))


def test_unsupported_dtype_is_named(tmp_path: Path) -> None:
    folder = save(tmp_path / "model")
    state = state_of(folder)
    name = "model.layers.0.self_attn.q_proj.weight"
    save_file({**state, name: state[name].to(torch.float8_e4m3fn)}, folder / "model.safetensors")
    with pytest.raises(ModelError, match=r"q_proj\.weight has type F8_E4M3.*supported: F32, F16, BF16"):
        load_whole(open_model(folder))


def test_truncated_shard_is_noticed_by_the_stage_that_needs_it(tmp_path: Path) -> None:
    source = open_model(save(tmp_path / "model", shard="40KB"))
    file = source.weight_files["model.layers.2.mlp.down_proj.weight"]
    file.write_bytes(file.read_bytes()[:-4])
    with pytest.raises(ModelError, match=rf"{file.name} is truncated"):
        load_whole(open_model(source.path))


@pytest.mark.parametrize("tied", [False, True])
def test_dummy_is_the_same_model_on_any_split(tmp_path: Path, tied: bool) -> None:
    folder = save(tmp_path / "model", tied=tied)
    (folder / "model.safetensors").unlink()
    source = open_model(folder, weights=False)
    with pytest.raises(ModelError, match="has no weights"):
        load_whole(source)
    layers, rank = range(NUM_LAYERS), deal(source.config, 2)[0]

    def dummy(layers: range, rank: RankDeal, seed: int = 0) -> dict[str, torch.Tensor]:
        ends = {"has_embedding": layers.start == 0, "has_head": layers.stop == NUM_LAYERS}
        return load_shard(source, layers, rank, dtype=torch.float32, dummy=True, seed=seed, **ends)

    half = dummy(layers, rank)
    shapes = shard_shapes(source.config, layers, rank, has_embedding=True, has_head=True)
    assert {name: tuple(tensor.shape) for name, tensor in half.items()} == shapes
    assert (half["head"].data_ptr() == half["embed"].data_ptr()) == tied
    last = dummy(range(3, 4), rank)
    assert len(last) == 8
    for name, tensor in last.items():
        assert torch.equal(tensor, half[name]), name
    # Neither the number of ranks nor of stages makes it another model.
    whole = dummy(layers, deal(source.config, 1)[0])
    assert torch.equal(
        whole["layers.1.down"][:, rank.columns.start : rank.columns.stop], half["layers.1.down"]
    )
    assert torch.equal(whole["embed"][: len(rank.vocab)], half["embed"])
    assert not torch.equal(dummy(layers, rank, seed=1)["layers.0.qkv"], half["layers.0.qkv"])
    assert not torch.equal(half["layers.1.qkv"], half["layers.0.qkv"])


def test_dummy_values_are_spread(monkeypatch: pytest.MonkeyPatch) -> None:
    piece = Piece(
        target="x",
        target_row=0,
        part="down",
        layer=0,
        full_shape=(512, 300),
        rows=range(512),
        columns=range(300),
        head_dim=64,
    )
    values = torch.empty(512, 300)
    DummyReader().read_into(values, piece)
    unit = values / (3 / 300) ** 0.5
    assert len(values.unique()) > 0.99 * values.numel()
    assert unit.abs().max() <= 1
    # Uniform: mean 0 and variance 1/3; rows and columns say nothing of each other.
    assert abs(unit.mean()) < 0.01
    assert abs(unit.var() - 1 / 3) < 0.01
    assert (torch.corrcoef(unit[:16]) - torch.eye(16)).abs().max() < 0.3
    assert (torch.corrcoef(unit[:, :16].t()) - torch.eye(16)).abs().max() < 0.3
    monkeypatch.setattr(dummy_module, "_CPU_CHUNK_ELEMENTS", 1000)
    again = torch.empty(512, 300)
    DummyReader().read_into(again, piece)
    assert torch.equal(again, values)


@pytest.mark.parametrize("elements", [64, 1000, 1 << 20])
def test_uploader_fills_what_the_reader_would(tmp_path: Path, elements: int) -> None:
    source = open_model(save(tmp_path / "model"))
    rank = deal(source.config, 2)[1]
    ends = {"has_embedding": True, "has_head": True}
    expected = load_shard(source, range(NUM_LAYERS), rank, dtype=torch.bfloat16, **ends)
    found = {name: torch.full_like(tensor, torch.nan) for name, tensor in expected.items()}
    done = 0
    with SafetensorsReader(source) as reader:
        uploader = Uploader(reader, torch.device("cpu"), torch.bfloat16, buffer_elements=elements)
        with closing(uploader):
            for piece in plan_pieces(source.config, range(NUM_LAYERS), rank, **ends):
                out = found[piece.target][piece.target_row : piece.target_row + len(piece.rows)]
                done += sum(uploader.add(out, piece))
            done += sum(uploader.finish())
    for name, tensor in expected.items():
        assert torch.equal(found[name], tensor), name
    assert done == sum(tensor.numel() for tensor in expected.values())


def test_uploader_passes_errors_on(tmp_path: Path) -> None:
    folder = save(tmp_path / "model")
    state = state_of(folder)
    del state["model.layers.1.mlp.up_proj.weight"]
    save_file(state, folder / "model.safetensors", metadata={"format": "pt"})
    source = open_model(folder)
    rank = deal(source.config, 1)[0]
    with SafetensorsReader(source) as reader:
        pieces = plan_pieces(source.config, range(2), rank, has_embedding=False, has_head=False)
        piece = next(piece for piece in pieces if piece.layer == 1 and piece.part == "up")
        uploader = Uploader(reader, torch.device("cpu"), torch.float32)
        with closing(uploader):
            list(uploader.add(torch.empty(len(piece.rows), len(piece.columns)), piece))
            with pytest.raises(ModelError, match=r"layers\.1\.mlp\.up_proj"):
                list(uploader.finish())
