"""The Llama architecture on the device: one stage's layers, one rank's shard, over preallocated buffers.

The modules of models/ compute the same on the CPU and allocate as they go; here every product has its place, which
it shares with what is done with by then (buffers.py).
A sum over the ranks follows the attention output and the MLP's; the residual it is added to is added in the
norm that reads it.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from stagemesh.model.config import ModelConfig
from stagemesh.model.deal import RankDeal
from stagemesh.stage.cuda.attention import DeviceAttention, StepColumns
from stagemesh.stage.cuda.buffers import StepBuffers
from stagemesh.stage.cuda.reduce import Reducer
from stagemesh.stage.cuda.scratch import mlp_slices
from stagemesh.stage.kernels.activation import silu_mul
from stagemesh.stage.kernels.embedding import embed
from stagemesh.stage.kernels.norm import gather_add_rms_norm, rms_norm
from stagemesh.stage.kernels.rope import rope_append

Weights = dict[str, torch.Tensor]


@dataclass(frozen=True, slots=True)
class LayerWeights:
    """Weights [out, in] of one layer, of this rank, transposed views [in, out]."""

    attn_norm: torch.Tensor
    qkv: torch.Tensor
    o: torch.Tensor
    mlp_norm: torch.Tensor
    gate_up: torch.Tensor
    down: torch.Tensor

    @classmethod
    def of(cls, weights: Weights, index: int) -> LayerWeights:
        """Those of layer `index` of the model."""
        name = f"layers.{index}"
        return cls(
            attn_norm=weights[f"{name}.attn_norm"],
            qkv=weights[f"{name}.qkv"].t(),
            o=weights[f"{name}.o"].t(),
            mlp_norm=weights[f"{name}.mlp_norm"],
            gate_up=weights[f"{name}.gate_up"].t(),
            down=weights[f"{name}.down"].t(),
        )


def rotary_table(config: ModelConfig, max_context: int, device: torch.device) -> torch.Tensor:
    """float32 [max_context, head_dim]: cosines, then sines."""
    frequencies = torch.from_numpy(config.rope.inverse_frequencies(config.head_dim)).float()
    angles = torch.outer(torch.arange(max_context, dtype=torch.float32), frequencies)
    return torch.cat((angles.cos(), angles.sin()), dim=1).to(device)


class DeviceLlama:
    """One stage of the model on one rank.

    Args:
        config: Of the model.
        layers: This stage's.
        deal: This rank's share.
        weights: On the device, by the names of shard_shapes.
        attention: Paged attention over this rank's cache.
        reducer: Sums over the ranks.
        buffers: Of the rank.
        max_context: Positions of a sequence at most.
        pdl: Launch kernels before the one ahead of them has ended.
    """

    def __init__(
        self,
        config: ModelConfig,
        layers: range,
        deal: RankDeal,
        weights: Weights,
        attention: DeviceAttention,
        reducer: Reducer,
        buffers: StepBuffers,
        *,
        max_context: int,
        pdl: bool = False,
    ) -> None:
        self._pdl = pdl
        self._eps = config.rms_norm_eps
        self._heads, self._kv_heads = len(deal.heads), len(deal.kv_heads)
        self._vocab = deal.vocab
        self._attention = attention
        self._reducer = reducer
        self._buffers = buffers
        self._embedding = weights.get("embed")
        self._layers = [LayerWeights.of(weights, index) for index in layers]
        self._norm = weights.get("norm")
        self._head = weights["head"].t() if "head" in weights else None
        self._table = rotary_table(config, max_context, buffers.residual.device)

    def embed(self, tokens: torch.Tensor, slot_tokens: torch.Tensor) -> None:
        """Residuals of int32 tokens [T]; -1 - slot stands for the slot's last token."""
        assert self._embedding is not None
        out = self._buffers.residual[: tokens.shape[0]]
        embed(tokens, slot_tokens, self._embedding, self._vocab.start, out)
        self._reducer.sum_in_place(out)

    def layers(self, num_tokens: int, cells: torch.Tensor, columns: StepColumns) -> torch.Tensor:
        """Run the layers over the residuals of T positions.

        Returns:
            The last partial result, [T, hidden]: residual + it is what the stage hands on.
        """
        for index in range(len(self._layers)):
            self.section(index, num_tokens, cells, columns.positions)
            self.attend(index, num_tokens, columns)
        return self.section(len(self._layers), num_tokens, cells, columns.positions)

    @property
    def num_sections(self) -> int:
        """Of `section`: before, between and behind the attentions."""
        return len(self._layers) + 1

    def attend(self, index: int, num_tokens: int, columns: StepColumns) -> None:
        """The attention of layer `index` of this stage, of T positions."""
        buffers = self._buffers
        self._attention.attend(index, buffers.qkv[:num_tokens], buffers.attended[:num_tokens], columns)

    def section(
        self, index: int, num_tokens: int, cells: torch.Tensor, positions: torch.Tensor
    ) -> torch.Tensor:
        """What runs between two attentions: layer `index - 1` behind its own, layer `index` before its.

        Returns:
            Of the last section the sum that the last layer ends with, [T, hidden]; else the residuals.
        """
        residual, partial = self._buffers.residual[:num_tokens], self._buffers.partial[:num_tokens]
        if index:
            self._finish(self._layers[index - 1], num_tokens)
        if index == len(self._layers):
            return self._reducer.sum(partial)
        norm = self._layers[index].attn_norm
        if index:
            self._reducer.sum_add_norm(partial, residual, norm, self._eps, partial, pdl=self._pdl)
        else:
            rms_norm(residual, norm, self._eps, partial, pdl=self._pdl)
        self._project(index, num_tokens, cells, positions)
        return residual

    def _project(self, index: int, num_tokens: int, cells: torch.Tensor, positions: torch.Tensor) -> None:
        """Queries, and keys and values to the cache, from the norm."""
        cache, qkv = self._attention.cache, self._buffers.qkv[:num_tokens]
        torch.mm(self._buffers.partial[:num_tokens], self._layers[index].qkv, out=qkv)
        rope_append(
            qkv,
            positions,
            cells,
            self._table,
            cache.cells[index, 0],
            cache.cells[index, 1],
            num_heads=self._heads,
            num_kv_heads=self._kv_heads,
            pdl=self._pdl,
        )

    def _finish(self, layer: LayerWeights, num_tokens: int) -> None:
        """From the heads' output to this rank's part of what the layer ends with."""
        buffers = self._buffers
        residual, partial = buffers.residual[:num_tokens], buffers.partial[:num_tokens]
        torch.mm(buffers.attended[:num_tokens], layer.o, out=partial)
        self._reducer.sum_add_norm(partial, residual, layer.mlp_norm, self._eps, partial, pdl=self._pdl)
        for rows in mlp_slices(num_tokens, buffers.gate_up.shape[0]):
            gate_up = buffers.gate_up[: rows.stop - rows.start]
            torch.mm(partial[rows], layer.gate_up, out=gate_up)
            activated = buffers.activated(gate_up.shape[0])
            silu_mul(gate_up, activated, pdl=self._pdl)
            torch.mm(activated, layer.down, out=partial[rows])

    def logits(self, summed: torch.Tensor, rows: torch.Tensor) -> torch.Tensor:
        """This rank's part of the logits of int32 rows [S], [S, vocab part]; last stage only."""
        assert self._norm is not None
        assert self._head is not None
        count = rows.shape[0]
        buffers = self._buffers
        sampled, logits = buffers.sampled[:count], buffers.logits[:count]
        residual = buffers.residual[: summed.shape[0]]
        gather_add_rms_norm(summed, residual, rows, self._norm, self._eps, sampled, pdl=self._pdl)
        if logits.dtype == sampled.dtype:
            torch.mm(sampled, self._head, out=logits)
        else:
            torch.mm(sampled, self._head, out_dtype=logits.dtype, out=logits)
        return logits
