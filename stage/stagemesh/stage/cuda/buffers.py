"""Every activation of a step, allocated once: graphs refer to them, and nothing is allocated while links are open."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from stagemesh.model.config import ModelConfig
from stagemesh.model.deal import RankDeal
from stagemesh.stage.cuda.scratch import LOGIT_BYTES, Scratch


@dataclass(frozen=True, slots=True, kw_only=True)
class StepBuffers:
    """Of one rank, for at most T positions and S sampled rows."""

    residual: torch.Tensor
    """[T, hidden]; what a stage receives goes here."""
    partial: torch.Tensor
    """[T, hidden]; a product that is summed over the ranks, and the norm that it is read by: row by row, in place."""
    qkv: torch.Tensor
    """[T, (heads + 2 * kv_heads) * head_dim], in the scratch memory."""
    attended: torch.Tensor
    """[T, heads * head_dim], in the scratch memory."""
    workspace: torch.Tensor
    """uint8, partial results of attention, in the scratch memory."""
    gate_up: torch.Tensor
    """[positions at once, 2 * columns], in the scratch memory, over qkv and what follows."""
    sampled: torch.Tensor
    """[S, hidden], last stage."""
    logits: torch.Tensor
    """float32 [S, vocab part], last stage, in the scratch memory: there until the next step's layers."""
    parts: torch.Tensor
    """int64, scratch of the choice of tokens."""
    keys: torch.Tensor
    """int64 [S]"""
    tokens: torch.Tensor
    """int32 [T]: as many rows as positions may be sampled, though logits exist for S at a time."""

    def activated(self, rows: int) -> torch.Tensor:
        """[rows, columns] for what becomes of so many rows of gate_up: behind them, or if there is no room in the place
        of the gates. Of 256 rows the next product takes 5% longer there."""
        columns = self.gate_up.shape[1] // 2
        begin, size = rows * 2 * columns, rows * columns
        if begin + size > self.gate_up.numel():
            return self.gate_up[:rows, :columns]
        return self.gate_up.flatten()[begin : begin + size].view(rows, columns)


def make_buffers(
    config: ModelConfig,
    deal: RankDeal,
    scratch: Scratch,
    *,
    max_tokens: int,
    max_samples: int,
    num_parts: int,
    dtype: torch.dtype,
    device: torch.device,
    partial: torch.Tensor | None = None,
) -> StepBuffers:
    """Zeroed: padding rows compute on what is there, and must stay finite.

    Args:
        config: Of the model.
        deal: This rank's share.
        scratch: Planned for it, with the same T and S.
        max_tokens: T.
        max_samples: S; 0 on a stage that does not sample.
        num_parts: Parts of the vocabulary in the choice of a token.
        dtype: Of activations.
        device: Where.
        partial: [T, hidden] to use instead of a new one, memory that the ranks share.
    """

    def make(rows: int, width: int, kind: torch.dtype = dtype) -> torch.Tensor:
        return torch.zeros(rows, width, dtype=kind, device=device)

    memory = make(1, scratch.total, torch.uint8).flatten()

    def lay(offset: int, rows: int, width: int, kind: torch.dtype = dtype) -> torch.Tensor:
        size = rows * width * kind.itemsize
        return memory[offset : offset + size].view(kind).view(rows, width)

    hidden, head_dim = config.hidden_size, config.head_dim
    heads, kv_heads, columns = len(deal.heads), len(deal.kv_heads), len(deal.columns)
    assert torch.float32.itemsize == LOGIT_BYTES
    return StepBuffers(
        residual=make(max_tokens, hidden),
        partial=make(max_tokens, hidden) if partial is None else partial,
        qkv=lay(0, max_tokens, (heads + 2 * kv_heads) * head_dim),
        attended=lay(scratch.attended, max_tokens, heads * head_dim),
        workspace=memory[scratch.workspace : scratch.workspace + scratch.workspace_bytes],
        gate_up=lay(0, scratch.mlp_rows, 2 * columns),
        sampled=make(max_samples, hidden),
        logits=lay(0, max_samples, len(deal.vocab), torch.float32),
        parts=make(max_samples, num_parts, torch.int64).flatten(),
        keys=make(max_samples, 1, torch.int64).flatten(),
        tokens=make(max_tokens if max_samples else 0, 1, torch.int32).flatten(),
    )
