"""Every activation of a step, allocated once: graphs refer to them, and nothing is allocated while links are open."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from stagemesh.model.config import ModelConfig
from stagemesh.model.deal import RankDeal


@dataclass(frozen=True, slots=True, kw_only=True)
class StepBuffers:
    """Of one rank, for at most T positions and S sampled rows."""

    residual: torch.Tensor
    """[T, hidden]; what a stage receives goes here."""
    normed: torch.Tensor
    """[T, hidden]"""
    partial: torch.Tensor
    """[T, hidden]; a product that is summed over the ranks."""
    qkv: torch.Tensor
    """[T, (heads + 2 * kv_heads) * head_dim]"""
    attended: torch.Tensor
    """[T, heads * head_dim]"""
    gate_up: torch.Tensor
    """[T, 2 * columns]"""
    activated: torch.Tensor
    """[T, columns]"""
    sampled: torch.Tensor
    """[S, hidden], last stage."""
    logits: torch.Tensor
    """[S, vocab part], last stage."""
    parts: torch.Tensor
    """int64, scratch of the choice of tokens."""
    keys: torch.Tensor
    """int64 [S]"""
    tokens: torch.Tensor
    """int32 [T]: as many rows as positions may be sampled, though logits exist for S at a time."""


def make_buffers(
    config: ModelConfig,
    deal: RankDeal,
    *,
    max_tokens: int,
    max_samples: int,
    num_parts: int,
    dtype: torch.dtype,
    logits_dtype: torch.dtype,
    device: torch.device,
    partial: torch.Tensor | None = None,
) -> StepBuffers:
    """Zeroed: padding rows compute on what is there, and must stay finite.

    Args:
        config: Of the model.
        deal: This rank's share.
        max_tokens: T.
        max_samples: S; 0 on a stage that does not sample.
        num_parts: Parts of the vocabulary in the choice of a token.
        dtype: Of activations.
        logits_dtype: Of logits.
        device: Where.
        partial: [T, hidden] to use instead of a new one, memory that the ranks share.
    """

    def make(rows: int, width: int, kind: torch.dtype = dtype) -> torch.Tensor:
        return torch.zeros(rows, width, dtype=kind, device=device)

    hidden, head_dim = config.hidden_size, config.head_dim
    heads, kv_heads, columns = len(deal.heads), len(deal.kv_heads), len(deal.columns)
    return StepBuffers(
        residual=make(max_tokens, hidden),
        normed=make(max_tokens, hidden),
        partial=make(max_tokens, hidden) if partial is None else partial,
        qkv=make(max_tokens, (heads + 2 * kv_heads) * head_dim),
        attended=make(max_tokens, heads * head_dim),
        gate_up=make(max_tokens, 2 * columns),
        activated=make(max_tokens, columns),
        sampled=make(max_samples, hidden),
        logits=make(max_samples, len(deal.vocab), logits_dtype),
        parts=make(max_samples, num_parts, torch.int64).flatten(),
        keys=make(max_samples, 1, torch.int64).flatten(),
        tokens=make(max_tokens if max_samples else 0, 1, torch.int32).flatten(),
    )
