"""What transformers says on the same device, and how far its own bfloat16 is from float32."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch
from gpu_mesh import REHEARSAL
from transformers import LlamaConfig, LlamaForCausalLM

VOCAB_SIZE = 4096 if not REHEARSAL else 512
ERROR_FACTOR = 1.2
"""Ours may be so much further from float32 than transformers in the same type is."""
DEVICE = "cpu" if REHEARSAL else "cuda:0"

Array = npt.NDArray[np.float32]


KV_HEADS = 8 if not REHEARSAL else 4


def make_model(folder: Path, *, layers: int = 3, kv_heads: int = KV_HEADS) -> Path:
    """A random Llama of few layers, as wide as an 8B model if it has as many heads; saved in bfloat16, in several files."""
    torch.manual_seed(3)
    num_heads = kv_heads * (4 if not REHEARSAL else 2)
    head_dim = 128 if not REHEARSAL else 32
    config = LlamaConfig(
        hidden_size=num_heads * head_dim,
        num_hidden_layers=layers,
        num_attention_heads=num_heads,
        num_key_value_heads=kv_heads,
        head_dim=head_dim,
        intermediate_size=14336 if not REHEARSAL else 512,
        vocab_size=VOCAB_SIZE,
        max_position_embeddings=4096,
        rope_theta=500000.0,
        # Logits of a few units, so that bfloat16 has few near-ties.
        initializer_range=0.04 if not REHEARSAL else 0.12,
        tie_word_embeddings=False,
        dtype="bfloat16",
    )
    with torch.device(DEVICE):
        torch.set_default_dtype(torch.bfloat16)
        try:
            model = LlamaForCausalLM(config)
        finally:
            torch.set_default_dtype(torch.float32)
    for name, tensor in model.named_parameters():
        if "norm" in name:
            tensor.data.uniform_(0.5, 1.5)
    model.cpu().save_pretrained(folder, max_shard_size="500MB")
    del model
    return folder


@dataclass(slots=True)
class Reference:
    """A saved model in float32 and in the type under test."""

    exact: LlamaForCausalLM
    narrow: LlamaForCausalLM

    @classmethod
    def load(cls, folder: Path, dtype: torch.dtype) -> Reference:
        """Both on the device."""
        torch.backends.cuda.matmul.allow_tf32 = False

        def load(kind: torch.dtype) -> LlamaForCausalLM:
            model = LlamaForCausalLM.from_pretrained(folder, dtype=kind, attn_implementation="sdpa")
            return model.to(DEVICE).eval()

        return cls(load(torch.float32), load(dtype))

    @torch.inference_mode()
    def forced(self, model: LlamaForCausalLM, prompt: Sequence[int], tokens: Sequence[int]) -> torch.Tensor:
        """float32 [len(tokens), vocabulary]: the logits each token was to be chosen from."""
        whole = torch.tensor([[*prompt, *tokens[:-1]]], device=DEVICE)
        return model(whole, use_cache=False, logits_to_keep=len(tokens)).logits[0].float()


@dataclass(slots=True)
class Comparison:
    """Sums over the sequences that were compared."""

    ours_squared: float = 0.0
    theirs_squared: float = 0.0
    worst_logit: float = 0.0
    """Largest error of a logit of transformers in the narrow type."""
    num_rows: int = 0
    num_values: int = 0
    num_apart: int = 0
    widest_gap: float = 0.0
    """Of the chosen token below the exact best, in float32 logits."""

    def add(
        self,
        reference: Reference,
        prompt: Sequence[int],
        tokens: Sequence[int],
        logits: Array | None,
    ) -> None:
        """Compare one greedy answer, and its logits if there are any."""
        exact = reference.forced(reference.exact, prompt, tokens)
        narrow = reference.forced(reference.narrow, prompt, tokens)
        self.worst_logit = max(self.worst_logit, float((narrow - exact).abs().max()))
        chosen = torch.tensor(list(tokens), device=exact.device)
        gaps = exact.max(dim=-1).values - exact.gather(1, chosen.unsqueeze(1)).squeeze(1)
        self.num_rows += len(tokens)
        self.num_apart += int((gaps > 0).sum())
        self.widest_gap = max(self.widest_gap, float(gaps.max()))
        if logits is not None:
            assert logits.shape == exact.shape
            ours = torch.from_numpy(logits).to(exact.device).log_softmax(-1)
            truth = exact.log_softmax(-1)
            self.ours_squared += float((ours - truth).square().sum())
            self.theirs_squared += float((narrow.log_softmax(-1) - truth).square().sum())
            self.num_values += exact.numel()

    def check(self) -> None:
        """Within the rules; the message has every figure."""
        ours = (self.ours_squared / max(1, self.num_values)) ** 0.5
        theirs = (self.theirs_squared / max(1, self.num_values)) ** 0.5
        told = (
            f"log-probability error {ours:.5f}, transformers' own {theirs:.5f}; {self.num_apart} of {self.num_rows} tokens "
            f"are not the float32 choice, by {self.widest_gap:.4f} at most; transformers' logits are up to "
            f"{self.worst_logit:.4f} off"
        )
        print(told)
        assert self.num_rows
        if self.num_values:
            assert ours <= ERROR_FACTOR * theirs, told
        # Two logits, each as far off as transformers' own may be.
        assert self.widest_gap <= 2 * self.worst_logit, told
