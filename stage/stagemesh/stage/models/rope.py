"""Rotary position embeddings (Su et al., RoFormer, 2021) in the half-rotation layout of Hugging Face."""

from __future__ import annotations

import torch

from stagemesh.model.config import ModelConfig


class RotaryTable:
    """Cosines and sines of every position, made once.

    Args:
        config: Of the model.
        max_context: Positions to prepare.
        dtype: Of the activations.
    """

    def __init__(self, config: ModelConfig, max_context: int, dtype: torch.dtype) -> None:
        frequencies = torch.from_numpy(config.rope.inverse_frequencies(config.head_dim))
        angles = torch.outer(torch.arange(max_context, dtype=torch.float32), frequencies)
        self._cos = angles.cos().to(dtype)
        self._sin = angles.sin().to(dtype)

    def at(self, positions: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Cosines and sines for int64 [T], each [T, 1, head_dim / 2]."""
        return self._cos[positions].unsqueeze(1), self._sin[positions].unsqueeze(1)


def rotate(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """Rotate [T, heads, head_dim] by its positions."""
    first, second = x.chunk(2, dim=-1)
    out = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    left, right = out.chunk(2, dim=-1)
    torch.mul(first, cos, out=left).addcmul_(second, sin, value=-1)
    torch.mul(second, cos, out=right).addcmul_(first, sin)
    return out
