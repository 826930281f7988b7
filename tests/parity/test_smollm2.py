"""The demo model itself, on three stages with 1, 2 and 1 ranks."""

from __future__ import annotations

import functools

import gguf
import pytest
import torch
from mesh_for_tests import Drive, LocalMesh
from prompts_for_tests import check_run, make_request
from reference import Reference
from tokenizers_for_tests import demo_gguf
from transformers import AutoModelForCausalLM, LlamaConfig

from stagemesh.model.source import open_model
from stagemesh.router.text import load_tokenizer

PROMPTS = (
    "The capital of France is",
    "def fibonacci(n):\n",
    "<|im_start|>user\nWhat is the capital of France?<|im_end|>\n<|im_start|>assistant\n",
)
NUM_TOKENS = 16


@pytest.fixture
def reference(monkeypatch: pytest.MonkeyPatch) -> Reference:
    """transformers' own reading of the GGUF file."""
    file = demo_gguf()
    # transformers makes the same table of names anew for every module, and reads the file once more for its
    # configuration: half a minute in all.
    monkeypatch.setattr(gguf, "get_tensor_name_map", functools.cache(gguf.get_tensor_name_map))
    config = LlamaConfig(
        hidden_size=576,
        intermediate_size=1536,
        num_hidden_layers=30,
        num_attention_heads=9,
        num_key_value_heads=3,
        head_dim=64,
        vocab_size=49152,
        rms_norm_eps=1e-5,
        max_position_embeddings=8192,
        rope_parameters={"rope_type": "default", "rope_theta": 100000.0},
        tie_word_embeddings=True,
    )
    model = AutoModelForCausalLM.from_pretrained(
        str(file.parent), config=config, gguf_file=file.name, dtype=torch.float32, attn_implementation="sdpa"
    )
    return Reference(model.eval())


@pytest.mark.slow
def test_smollm2(reference: Reference) -> None:
    source = open_model(demo_gguf())
    tokenizer = load_tokenizer(demo_gguf())
    mesh = LocalMesh(source, (1, 2, 1), num_blocks=16, block_size=16, max_context=128)
    facts = [engine.facts() for engine in mesh.stages[1].engines]
    assert [(fact.num_heads, fact.num_kv_heads) for fact in facts] == [(6, 2), (3, 1)]
    requests = [make_request(text, tokenizer.encode(text), NUM_TOKENS) for text in PROMPTS]
    run = mesh.run(requests, Drive(step_tokens=24))
    mesh.close()
    check_run(reference, run)
    assert "Paris" in tokenizer.decode(run.answers[PROMPTS[-1]].token_ids)
