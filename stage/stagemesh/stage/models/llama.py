"""The Llama architecture, one stage's layers of it, one rank's shard of those."""

from __future__ import annotations

import torch
from torch import nn

from stagemesh.model.config import ModelConfig
from stagemesh.model.deal import RankDeal
from stagemesh.stage.attention import PagedAttention
from stagemesh.stage.group import RankGroup
from stagemesh.stage.models.layers import (
    Linear,
    RMSNorm,
    RowParallelLinear,
    VocabParallelEmbedding,
    VocabParallelHead,
)
from stagemesh.stage.models.native_layers import NativeLayers
from stagemesh.stage.models.product import Layout, pack_gated
from stagemesh.stage.models.rope import RotaryTable, rotate

Weights = dict[str, torch.Tensor]


class Attention(nn.Module):
    """Grouped-query attention over this rank's heads."""

    def __init__(
        self,
        config: ModelConfig,
        deal: RankDeal,
        weights: Weights,
        prefix: str,
        group: RankGroup,
        layout: Layout,
    ) -> None:
        super().__init__()
        self._heads = len(deal.heads)
        self._kv_heads = len(deal.kv_heads)
        self._head_dim = config.head_dim
        self.qkv = Linear(weights.pop(f"{prefix}.qkv"), layout)
        self.out = RowParallelLinear(weights.pop(f"{prefix}.o"), group, layout)

    def forward(
        self,
        x: torch.Tensor,
        residual: torch.Tensor,
        rotation: tuple[torch.Tensor, torch.Tensor],
        attention: PagedAttention,
        layer: int,
    ) -> torch.Tensor:
        """[T, hidden] to [T, hidden], the residual added."""
        heads = self.qkv(x).view(x.shape[0], self._heads + 2 * self._kv_heads, self._head_dim)
        rotated = rotate(heads[:, : self._heads + self._kv_heads], *rotation)
        query, key = rotated[:, : self._heads], rotated[:, self._heads :]
        value = heads[:, self._heads + self._kv_heads :]
        return self.out(attention.attend(layer, query, key, value), residual)


class MLP(nn.Module):
    """The gated feed-forward network, this rank's columns of it."""

    def __init__(self, weights: Weights, prefix: str, group: RankGroup, layout: Layout) -> None:
        super().__init__()
        self.gated = pack_gated(weights.pop(f"{prefix}.gate_up"), layout)
        self.down = RowParallelLinear(weights.pop(f"{prefix}.down"), group, layout)

    def forward(self, x: torch.Tensor, residual: torch.Tensor) -> torch.Tensor:
        """[T, hidden] to [T, hidden], the residual added."""
        return self.down(self.gated(x), residual)


class DecoderLayer(nn.Module):
    """Attention and MLP, each with its norm and residual."""

    def __init__(
        self,
        config: ModelConfig,
        deal: RankDeal,
        weights: Weights,
        prefix: str,
        group: RankGroup,
        layout: Layout,
    ) -> None:
        super().__init__()
        self.attention_norm = RMSNorm(weights.pop(f"{prefix}.attn_norm"), config.rms_norm_eps)
        self.attention = Attention(config, deal, weights, prefix, group, layout)
        self.mlp_norm = RMSNorm(weights.pop(f"{prefix}.mlp_norm"), config.rms_norm_eps)
        self.mlp = MLP(weights, prefix, group, layout)

    def forward(
        self,
        x: torch.Tensor,
        rotation: tuple[torch.Tensor, torch.Tensor],
        attention: PagedAttention,
        layer: int,
    ) -> torch.Tensor:
        """[T, hidden] to [T, hidden]."""
        x = self.attend(x, rotation, attention, layer)
        return self.mlp(self.mlp_norm(x), x)

    def attend(
        self,
        x: torch.Tensor,
        rotation: tuple[torch.Tensor, torch.Tensor],
        attention: PagedAttention,
        layer: int,
    ) -> torch.Tensor:
        """The first half, attention."""
        return self.attention(self.attention_norm(x), x, rotation, attention, layer)


class LlamaStage(nn.Module):
    """One stage: the embedding if it is the first, its layers, norm and head if it is the last.

    Takes its tensors out of `weights`, so that a tensor and its packed copy never live side by side for
    longer than one layer takes.
    """

    def __init__(
        self,
        config: ModelConfig,
        layers: range,
        deal: RankDeal,
        weights: Weights,
        group: RankGroup,
        *,
        dtype: torch.dtype,
        max_context: int,
        layout: Layout = "transposed",
    ) -> None:
        super().__init__()
        self._rotary = RotaryTable(config, max_context, dtype)
        embed, head = weights.pop("embed", None), weights.pop("head", None)
        self.embedding = VocabParallelEmbedding(embed, deal.vocab, group) if embed is not None else None
        self.layers = nn.ModuleList(
            DecoderLayer(config, deal, weights, f"layers.{index}", group, layout) for index in layers
        )
        self.norm = RMSNorm(weights.pop("norm"), config.rms_norm_eps) if head is not None else None
        self.head = VocabParallelHead(head, layout, tied=head is embed) if head is not None else None
        self.native: NativeLayers | None = None
        """The same layers in compiled kernels, for what those can do."""

    def forward(
        self, inputs: torch.Tensor, positions: torch.Tensor, attention: PagedAttention
    ) -> torch.Tensor:
        """Hidden states [T, hidden] after the stage's layers, from token ids [T] or hidden states."""
        x = self.embedding(inputs) if self.embedding is not None else inputs
        rotation = self._rotary.at(positions)
        if self.native is not None and self.native.takes(attention.batch):
            return self.native.decode(x.clone() if x is inputs else x, rotation, attention.batch)
        for index, layer in enumerate(self.layers):
            assert isinstance(layer, DecoderLayer)
            if self.native is None:
                x = layer(x, rotation, attention, index)
            else:
                x = self.native.mlp(index, layer.attend(x, rotation, attention, index))
        return x

    def logits(self, hidden: torch.Tensor) -> torch.Tensor:
        """This rank's part of the logits for [S, hidden]; last stage only."""
        assert self.norm is not None
        assert self.head is not None
        return self.head(self.norm(hidden))
