"""What meshes of the sim engine serve: a configuration, and no weights."""

from __future__ import annotations

import json
from pathlib import Path

SIM = ("--engine", "sim", "--cost", "2ms + 0.01ms*tokens")
"""Flags of a simulated stage."""
_CONFIG = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "hidden_size": 96,
    "num_hidden_layers": 6,
    "num_attention_heads": 6,
    "num_key_value_heads": 3,
    "head_dim": 16,
    "intermediate_size": 176,
    "vocab_size": 331,
    "max_position_embeddings": 2048,
    "rms_norm_eps": 1e-5,
    "tie_word_embeddings": False,
    "torch_dtype": "float32",
    "hidden_act": "silu",
}


def write_sim_model(folder: Path) -> Path:
    """A folder with a model's configuration: all that the sim engine needs."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(_CONFIG))
    return folder
