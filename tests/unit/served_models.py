"""A model as the router knows it, for tests of the public side: of token ids, without files or a tokenizer."""

from __future__ import annotations

from stagemesh.model.config import GenerationDefaults
from stagemesh.router.api.served_model import ServedModel

IDS = ServedModel(
    name="ids",
    architecture="LlamaForCausalLM",
    fingerprint="f" * 64,
    vocab_size=1000,
    max_context=400,
    end_token_ids=frozenset([2]),
    generation=GenerationDefaults(),
    tokenizer=None,
)
