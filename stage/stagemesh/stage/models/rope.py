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
        # As wide as a head, the sign of the left half within, so that `rotate` is three kernels.
        self._cos = angles.cos().repeat(1, 2).to(dtype)
        self._sin = torch.cat((-angles.sin(), angles.sin()), dim=1).to(dtype)

    def at(self, positions: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Cosines and sines for int64 [T], each [T, 1, head_dim]; the sines of the left half negated."""
        return self._cos[positions].unsqueeze(1), self._sin[positions].unsqueeze(1)


def rotate(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """Rotate [T, heads, head_dim] by its positions."""
    rotated, half = x * cos, x.shape[-1] // 2
    rotated[..., :half].addcmul_(x[..., half:], sin[..., :half])
    rotated[..., half:].addcmul_(x[..., :half], sin[..., half:])
    return rotated
