"""Finding a model, and telling one from another."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from stagemesh.model.source import ModelSource, open_model
from stagemesh.wire.errors import ModelError

Make = Callable[..., Path]


@pytest.fixture
def make(tmp_path: Path) -> Make:
    def build(name: str, *, seed: int = 0, shard: str = "1GB", **changes: int) -> Path:
        torch.manual_seed(seed)
        shape = {
            "hidden_size": 48,
            "intermediate_size": 80,
            "num_hidden_layers": 3,
            "num_attention_heads": 6,
            "num_key_value_heads": 3,
            "vocab_size": 67,
        }
        model = LlamaForCausalLM(LlamaConfig(**{**shape, **changes}, initializer_range=0.3))
        model.save_pretrained(tmp_path / name, max_shard_size=shard)
        return tmp_path / name

    return build


def test_one_file_folder(make: Make) -> None:
    source = open_model(make("tiny"))
    assert (source.kind, source.name, source.config.num_layers) == ("safetensors", "tiny", 3)
    assert source.weight_files["model.norm.weight"].name == "model.safetensors"
    assert len(source.fingerprint) == 64


def test_equal_models_have_equal_fingerprints(make: Make) -> None:
    first = open_model(make("a", seed=1))
    again = open_model(make("b", seed=1))
    assert first.fingerprint == again.fingerprint


def test_another_model_of_equal_shape_differs(make: Make) -> None:
    assert open_model(make("a", seed=1)).fingerprint != open_model(make("b", seed=2)).fingerprint


def test_another_shape_differs(make: Make) -> None:
    prints = {
        open_model(make("a", shard="20KB")).fingerprint,
        open_model(make("b", shard="20KB", num_hidden_layers=4)).fingerprint,
        open_model(make("c", shard="20KB", max_position_embeddings=77)).fingerprint,
    }
    assert len(prints) == 3


def test_sampling_defaults_are_not_in_the_fingerprint(make: Make) -> None:
    folder = make("a")
    before = open_model(folder)
    (folder / "generation_config.json").write_text(json.dumps({"temperature": 0.1, "eos_token_id": [5]}))
    after = open_model(folder)
    assert after.config.generation.temperature == 0.1
    assert before.fingerprint == after.fingerprint


def test_sharded_folder_needs_no_shard_to_be_opened(make: Make) -> None:
    folder = make("tiny", shard="20KB")
    before = open_model(folder)
    files = {path.name for path in before.weight_files.values()}
    assert len(files) > 2
    for name in files:
        (folder / name).unlink()
    after = open_model(folder)
    assert after.fingerprint == before.fingerprint


def test_config_alone_is_enough_without_weights(make: Make) -> None:
    folder = make("tiny")
    whole = open_model(folder, weights=False)
    assert whole.kind == "safetensors"  # a router that opens the same folder either way agrees
    assert whole.fingerprint == open_model(folder).fingerprint
    (folder / "model.safetensors").unlink()
    assert open_model(folder, weights=False).kind == "none"
    with pytest.raises(ModelError, match=r"has no weights, expected model\.safetensors"):
        open_model(folder)


def test_truncated_file_is_refused(make: Make) -> None:
    path = make("tiny") / "model.safetensors"
    raw = path.read_bytes()
    for size in (0, 5, 100, len(raw) // 2, len(raw) - 1):
        path.write_bytes(raw[:size])
        with pytest.raises(ModelError, match=r"model\.safetensors is truncated"):
            open_model(path.parent)
    path.write_bytes(raw[:8] + b"#" + raw[9:])
    with pytest.raises(ModelError, match=r"model\.safetensors is damaged"):
        open_model(path.parent)


def test_index_may_not_point_outside(make: Make) -> None:
    folder = make("tiny", shard="20KB")
    index = folder / "model.safetensors.index.json"
    table = json.loads(index.read_text())
    table["weight_map"]["model.norm.weight"] = "../other.safetensors"
    index.write_text(json.dumps(table))
    with pytest.raises(ModelError, match=r"'\.\./other\.safetensors'"):
        open_model(folder)


def test_pickled_weights_are_refused(make: Make) -> None:
    folder = make("tiny")
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")
    with pytest.raises(ModelError, match=r"pytorch_model\.bin.*never loaded"):
        open_model(folder)


def test_what_is_not_there_says_what_to_do(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    with pytest.raises(ModelError, match=r"/no/such/model does not exist"):
        open_model("/no/such/model")
    with pytest.raises(ModelError, match=r"hf download no-org/no-model"):
        open_model("no-org/no-model")
    (tmp_path / "model.onnx").write_bytes(b"x")
    with pytest.raises(ModelError, match=r"unknown format '\.onnx'"):
        open_model(tmp_path / "model.onnx")
    (tmp_path / "model.gguf").write_bytes(b"x")
    with pytest.raises(ModelError, match=r"no config\.json.*it has model\.gguf"):
        open_model(tmp_path)


def test_a_name_is_found_in_the_hub_cache(
    make: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    cached = tmp_path / "models--some-org--tiny"
    (cached / "refs").mkdir(parents=True)
    (cached / "refs" / "main").write_text("abc123")
    (cached / "snapshots").mkdir()
    make("tiny").rename(cached / "snapshots" / "abc123")
    source: ModelSource = open_model("some-org/tiny")
    assert (source.name, source.config.hidden_size) == ("some-org/tiny", 48)


def test_reading_a_model_does_not_import_torch() -> None:
    code = (
        "import sys, stagemesh.model.source, stagemesh.model.split, stagemesh.model.shard_shapes; "
        "sys.exit('torch' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
