"""Small random models of odd shapes, saved as Hugging Face folders."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from transformers import LlamaConfig, LlamaForCausalLM

SHAPES: dict[str, dict[str, Any]] = {
    # 3 KV heads and 176 columns on 2 ranks are dealt 2 + 1 and 96 + 80, 331 rows of the head 192 + 139.
    "untied": {
        "hidden_size": 96,
        "num_attention_heads": 6,
        "num_key_value_heads": 3,
        "head_dim": 16,
        "intermediate_size": 176,
        "vocab_size": 331,
        "num_hidden_layers": 5,
    },
    # Heads times head_dim is not the hidden size, and not all layers fit the stages evenly.
    "tied": {
        "hidden_size": 90,
        "num_attention_heads": 6,
        "num_key_value_heads": 3,
        "head_dim": 14,
        "intermediate_size": 200,
        "vocab_size": 283,
        "num_hidden_layers": 5,
        "tie_word_embeddings": True,
    },
    # Three query heads to a KV head, as SmolLM2; wavelengths on both sides of the ramp within 100 positions.
    "llama3": {
        "hidden_size": 99,
        "num_attention_heads": 9,
        "num_key_value_heads": 3,
        "head_dim": 16,
        "intermediate_size": 144,
        "vocab_size": 307,
        "num_hidden_layers": 5,
        "rope_parameters": {
            "rope_type": "llama3",
            "rope_theta": 10000.0,
            "factor": 8.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 32,
        },
    },
}
INITIALIZER_RANGE = 0.25


def random_model(shape: str) -> LlamaForCausalLM:
    """A model whose answers are worth comparing (`test_reference.py`)."""
    torch.manual_seed(7)
    settings: dict[str, Any] = {
        "rms_norm_eps": 1e-5,
        "max_position_embeddings": 256,
        "initializer_range": INITIALIZER_RANGE,
        "tie_word_embeddings": False,
    }
    config = LlamaConfig(**settings | SHAPES[shape], attn_implementation="eager", dtype="float32")
    model = LlamaForCausalLM(config)
    for name, tensor in model.named_parameters():
        if "norm" in name:  # ones in a new model, which would hide a mix-up
            tensor.data.uniform_(0.5, 1.5)
    return model.eval()


def save_model(model: LlamaForCausalLM, folder: Path, *, shard_size: str = "1GB") -> Path:
    """Save as a folder that stages load."""
    model.save_pretrained(folder, max_shard_size=shard_size)
    return folder
