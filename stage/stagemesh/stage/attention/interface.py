"""The contract of an attention backend."""

from __future__ import annotations

from typing import Protocol

import torch

from stagemesh.stage.engine.batch import Batch


class PagedAttention(Protocol):
    """Owns the KV cache of one rank's layers. `plan` runs once a step, `attend` once a layer."""

    batch: Batch
    """Of the step that was planned last."""

    def plan(self, batch: Batch) -> None:
        """Prepare what all layers of the step share."""

    def attend(self, layer: int, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
        """Write the step's keys and values, then attend causally to each sequence's whole context.

        Args:
            layer: Index among the layers of this stage, from 0.
            query: [T, heads, head_dim], rotated.
            key: [T, kv_heads, head_dim], rotated.
            value: [T, kv_heads, head_dim].

        Returns:
            [T, heads * head_dim].
        """
