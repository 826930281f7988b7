"""transformers as the peer: the same GGUF in float32 with sdpa, greedy, in this process."""

from __future__ import annotations

import time
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM


class TransformersPeer:
    """Measures prefill and decode with a dynamic KV cache and logits_to_keep=1.

    Args:
        gguf: The model's file.
        threads: Of torch in this process.
    """

    def __init__(self, gguf: Path, threads: int) -> None:
        torch.set_num_threads(threads)
        self._model = AutoModelForCausalLM.from_pretrained(
            gguf.parent, gguf_file=gguf.name, dtype=torch.float32, attn_implementation="sdpa"
        ).eval()

    @torch.inference_mode()
    def decode_rate(self, batch: list[list[int]], num_tokens: int) -> float:
        """Tokens per second over all rows, after the prompt."""
        out = self._model(torch.tensor(batch), use_cache=True, logits_to_keep=1)
        began = time.perf_counter()
        for _ in range(num_tokens - 1):
            tokens = out.logits[:, -1].argmax(-1, keepdim=True)
            out = self._model(tokens, past_key_values=out.past_key_values, use_cache=True, logits_to_keep=1)
        return len(batch) * (num_tokens - 1) / (time.perf_counter() - began)

    @torch.inference_mode()
    def prefill_rate(self, prompt: list[int]) -> float:
        """Prompt tokens per second until the next token is known."""
        began = time.perf_counter()
        self._model(torch.tensor([prompt]), use_cache=True, logits_to_keep=1).logits.argmax(-1)
        return len(prompt) / (time.perf_counter() - began)
