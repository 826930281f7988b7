"""Layers in compiled kernels: a decode step's all in one call, or a half of a layer a call where ranks must sum."""

from __future__ import annotations

import struct
from collections.abc import Iterable
from typing import Any

import numpy as np
import torch

from stagemesh.model.config import ModelConfig
from stagemesh.model.deal import RankDeal
from stagemesh.stage import native
from stagemesh.stage.attention import TorchPagedAttention
from stagemesh.stage.engine.batch import Batch
from stagemesh.stage.group import RankGroup

MAX_ROWS = 256
"""Of a step; its sums lie on each thread's stack."""
HEAD_DIMS = (*range(16, 129, 16), 192, 256)
"""Widths of a head that the kernels were compiled for."""
_SHAPE = struct.Struct("=8q2d")
"""struct Shape of _kernels.c."""


class NativeLayers:
    """A stage's layers over rows of one token each, and their MLPs over any rows.

    Args:
        config: Of the model.
        deal: This rank's share.
        layers: DecoderLayers with their weights in panels.
        attention: Has the KV cache.
        group: The stage's ranks.
    """

    def __init__(
        self,
        config: ModelConfig,
        deal: RankDeal,
        layers: Iterable[Any],
        attention: TorchPagedAttention,
        group: RankGroup,
    ) -> None:
        self._group = group
        cache = attention.cache
        self._dims = (
            len(deal.heads),
            len(deal.kv_heads),
            config.head_dim,
            attention.block_size,
            cache.shape[3],
            config.hidden_size,
            len(deal.columns),
        )
        self._factors = (config.rms_norm_eps, config.head_dim**-0.5)
        # struct Layer of layers.h; kept, so that what the addresses point to is.
        self._tensors: list[list[torch.Tensor]] = [
            [
                layer.attention_norm.weight,
                layer.attention.qkv.product.panels,
                layer.attention.out.product.panels,
                keys_and_values,
                layer.mlp_norm.weight,
                layer.mlp.gated.panels,
                layer.mlp.down.product.panels,
            ]
            for layer, keys_and_values in zip(layers, cache, strict=True)
        ]
        self._layers = np.array(
            [[tensor.data_ptr() for tensor in tensors] for tensors in self._tensors], np.uint64
        ).tobytes()

    @staticmethod
    def fits(config: ModelConfig, dtype: torch.dtype) -> bool:
        """Whether there are kernels for such a model, if there are any."""
        return dtype == torch.float32 and config.head_dim in HEAD_DIMS

    @staticmethod
    def takes(batch: Batch) -> bool:
        """Whether every row of the step is of one token."""
        return len(batch.counts) == batch.num_tokens <= MAX_ROWS

    def mlp(self, layer: int, x: torch.Tensor) -> torch.Tensor:
        """Hidden states after a layer's MLP, in place of those given: contiguous [T, hidden], float32."""
        self._run(2 * layer + 1, 2 * layer + 2, x, 0, 0, 0, 0, 0, 0)
        return self._group.all_reduce(x)

    def decode(
        self, x: torch.Tensor, rotation: tuple[torch.Tensor, torch.Tensor], batch: Batch
    ) -> torch.Tensor:
        """Hidden states after the layers, in place of those given: contiguous [rows, hidden], float32."""
        halves = 2 * len(self._tensors)
        at_once = halves if self._group.size == 1 else 1
        positions, tables = np.ascontiguousarray(batch.positions), np.ascontiguousarray(batch.tables)
        cos, sin = (part.contiguous() for part in rotation)
        for begin in range(0, halves, at_once):
            self._run(
                begin,
                begin + at_once,
                x,
                positions.ctypes.data,
                tables.ctypes.data,
                tables.shape[1],
                int(positions.max()) + 1,
                cos.data_ptr(),
                sin.data_ptr(),
            )
            x = self._group.all_reduce(x)
        return x

    def _run(self, begin: int, end: int, x: torch.Tensor, *step: int) -> None:
        # One rank adds the residual, so that the sum over the ranks has it once.
        shape = _SHAPE.pack(*self._dims, torch.get_num_threads(), *self._factors)
        native.halves(shape, self._layers, begin, end, x.data_ptr(), len(x), self._group.rank == 0, *step)
