"""Stages of a sharded model, each with its own shard files alone."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
from mesh_for_tests import LocalMesh
from models_for_tests import SHAPES, random_model, save_model
from prompts_for_tests import check_run, sixteen_requests
from reference import Reference
from stage_for_tests import LocalStage

from stagemesh.model.source import open_model
from stagemesh.model.split import split_layers
from stagemesh.wire.errors import ModelError

STAGES = 3


def files_of_stage(folder: Path, index: int) -> set[str]:
    """By the names of the tensors in the index, as Hugging Face gives them."""
    names = json.loads((folder / "model.safetensors.index.json").read_text())["weight_map"]
    layers = split_layers(open_model(folder).config, STAGES)[index]
    prefixes = [f"model.layers.{layer}." for layer in layers]
    prefixes += ["model.embed_tokens."] if index == 0 else []
    prefixes += ["model.norm.", "lm_head."] if index == STAGES - 1 else []
    return {file for name, file in names.items() if name.startswith(tuple(prefixes))}


def test_each_stage_starts_without_the_others_files(tmp_path: Path, references: dict[str, Reference]) -> None:
    # A file for every few tensors, so that no two stages need the same ones.
    folder = save_model(random_model("untied"), tmp_path / "whole", shard_size="60KB")
    files = {file.name for file in folder.glob("*.safetensors")}
    assert len(files) > 2 * STAGES
    sources = []
    for index in range(STAGES):
        own = tmp_path / f"stage{index}"
        shutil.copytree(folder, own)
        foreign = files - files_of_stage(folder, index)
        assert foreign
        for name in foreign:
            (own / name).unlink()
        sources.append(open_model(own))
    assert len({source.fingerprint for source in sources}) == 1
    mesh = LocalMesh(open_model(folder), [1] * STAGES)
    mesh.stages = [
        LocalStage(source, layers, 2, num_blocks=320, block_size=8, max_context=160)
        for source, layers in zip(sources, split_layers(sources[0].config, STAGES), strict=True)
    ]
    check_run(references["untied"], mesh.run(sixteen_requests(SHAPES["untied"]["vocab_size"])[:6]))
    mesh.close()
    with pytest.raises(ModelError, match="safetensors"):  # the files are really gone
        LocalMesh(sources[1], [1])
