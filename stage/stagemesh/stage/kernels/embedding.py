"""Input tokens, given or sampled before, to their embeddings."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

BLOCK = 1024


@triton.jit
def _embed(tokens, slot_tokens, weight, out, vocab_begin, vocab_size, width, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    columns = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    token = tl.load(tokens + row)
    if token < 0:
        token = tl.load(slot_tokens - 1 - token)
    local = token - vocab_begin
    here = (local >= 0) & (local < vocab_size)
    at = weight + local.to(tl.int64) * width + columns
    value = tl.load(at, mask=(columns < width) & here, other=0.0)
    tl.store(out + row * width + columns, value, mask=columns < width)


def embed(
    tokens: torch.Tensor, slot_tokens: torch.Tensor, weight: torch.Tensor, vocab_begin: int, out: torch.Tensor
) -> None:
    """out [T, width] = embeddings; zero for tokens of other ranks' vocabulary.

    Args:
        tokens: int32 [T]; -1 - slot stands for slot_tokens[slot].
        slot_tokens: int32 [slots], the last token sampled for each.
        weight: This rank's [vocab part, width].
        vocab_begin: Where that part begins.
        out: [T, width].
    """
    width = out.shape[1]
    _embed[(out.shape[0], triton.cdiv(width, BLOCK))](
        tokens, slot_tokens, weight, out, vocab_begin, weight.shape[0], width, BLOCK=BLOCK, num_warps=4
    )
