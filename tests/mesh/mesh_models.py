"""Small random models for the meshes, and the judge of their greedy answers."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from mesh_calls import VOCAB_SIZE
from transformers import LlamaConfig, LlamaForCausalLM

MAX_CONTEXT = 2048
NEAR_TIE = 1e-3
SIMULATED = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "hidden_size": 16,
    "intermediate_size": 32,
    "num_hidden_layers": 4,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "vocab_size": 512,
    "max_position_embeddings": 256,
    "rms_norm_eps": 1e-5,
}
"""config.json of a model for simulated engines, which need its shape alone."""
MAX_EXCUSED_SHARE = 0.01


def make_model(*, hidden_size: int = 96, num_layers: int = 6) -> LlamaForCausalLM:
    """A model whose answers are worth comparing: 3 KV heads, so that two ranks get 2 and 1."""
    torch.manual_seed(11)
    config = LlamaConfig(
        hidden_size=hidden_size,
        num_hidden_layers=num_layers,
        num_attention_heads=6,
        num_key_value_heads=3,
        head_dim=16,
        intermediate_size=176,
        vocab_size=VOCAB_SIZE,
        max_position_embeddings=MAX_CONTEXT,
        initializer_range=0.3,
        tie_word_embeddings=False,
        attn_implementation="eager",
        dtype="float32",
    )
    return LlamaForCausalLM(config).eval()


def save_sharded(model: LlamaForCausalLM, folder: Path) -> Path:
    """A folder with every tensor in a file of its own."""
    model.save_pretrained(folder, max_shard_size="1KB")
    return folder


@dataclass(slots=True)
class Ledger:
    """What has been compared with transformers."""

    num_sequences: int = 0
    num_tokens: int = 0
    num_excused: int = 0

    def __str__(self) -> str:
        return (
            f"mesh parity: {self.num_sequences} sequences, {self.num_tokens} tokens "
            f"of real processes equal transformers', {self.num_excused} excused"
        )

    @property
    def too_many_excused(self) -> bool:
        """More divergences than near-ties explain."""
        return self.num_excused > MAX_EXCUSED_SHARE * self.num_sequences


LEDGER = Ledger()


@torch.inference_mode()
def check_greedy(model: LlamaForCausalLM, prompt: Sequence[int], tokens: Sequence[int]) -> None:
    """Assert that each token is the reference's choice after all before it, or ties with it nearly."""
    whole = torch.tensor([[*prompt, *tokens[:-1]]])
    logits = model(whole, use_cache=False, logits_to_keep=len(tokens)).logits[0]
    apart = (logits.argmax(dim=-1) != torch.tensor(tokens)).nonzero().flatten().tolist()
    for place in apart:
        best, second = logits[place].topk(2).values.tolist()
        assert best - second < NEAR_TIE, (
            f"token {place} after a prompt of {len(prompt)} is {tokens[place]}; transformers says "
            f"{int(logits[place].argmax())} by a margin of {best - second:.3g}"
        )
    LEDGER.num_sequences += 1
    LEDGER.num_tokens += len(tokens)
    LEDGER.num_excused += bool(apart)
