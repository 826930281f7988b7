"""Paged attention on the device behind one small interface."""

from __future__ import annotations

import logging
from abc import ABC, abstractmethod
from dataclasses import dataclass

import torch

from stagemesh.stage.cuda.cache import DeviceCache
from stagemesh.stage.cuda.columns import RowPlan
from stagemesh.stage.cuda.optional import on_every_rank
from stagemesh.stage.cuda.staging import StagingSlot
from stagemesh.stage.group import RankGroup

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True, kw_only=True)
class HeadShape:
    """What a rank attends with."""

    num_heads: int
    num_kv_heads: int
    head_dim: int
    most_kv_heads: int
    """Of a rank of the stage: which graphs there are follows from it, since every capture has the ranks' sums in it."""


@dataclass(frozen=True, slots=True)
class StepColumns:
    """The columns of a step on the device, and the flat block list made from them."""

    positions: torch.Tensor
    token_slots: torch.Tensor
    kv_begins: torch.Tensor
    last_page: torch.Tensor
    prefill_begins: torch.Tensor
    blocks: torch.Tensor


class DeviceAttention(ABC):
    """`plan` runs on the host once a step and waits for nothing; `attend` once a layer."""

    name: str
    """For facts and logs, with the version."""
    needs_blocks: bool
    """Whether it reads the flat block list."""

    def __init__(self, cache: DeviceCache, shape: HeadShape) -> None:
        self.cache = cache
        self.shape = shape

    def variants(self, bucket: int) -> tuple[bool, ...]:
        """Of the decode graph of that size: whether contexts are split in it. The same on every rank."""
        return (False,)

    def variant(self, rows: RowPlan, bucket: int) -> bool:
        """The variant of the graph that is best for the rows."""
        return False

    @abstractmethod
    def plan(
        self, rows: RowPlan, slot: StagingSlot, *, bucket: int | None = None, split: bool = False
    ) -> None:
        """Prepare what all layers of the step share; with a bucket, for the variant of the decode graph of that size."""

    @abstractmethod
    def attend(self, layer: int, qkv: torch.Tensor, out: torch.Tensor, columns: StepColumns) -> None:
        """out [T, heads * head_dim] from the rotated queries in qkv; keys and values are in the cache."""


class TritonAttention(DeviceAttention):
    """Any type, slow in prefill; nothing to plan."""

    needs_blocks = False

    def __init__(self, cache: DeviceCache, shape: HeadShape) -> None:
        super().__init__(cache, shape)
        import triton

        from stagemesh.stage.kernels.attend import attend

        self.name = f"triton {triton.__version__}"
        self._attend = attend

    def plan(
        self, rows: RowPlan, slot: StagingSlot, *, bucket: int | None = None, split: bool = False
    ) -> None:
        pass

    def attend(self, layer: int, qkv: torch.Tensor, out: torch.Tensor, columns: StepColumns) -> None:
        self._attend(
            qkv,
            self.cache.cells[layer, 0],
            self.cache.cells[layer, 1],
            self.cache.tables,
            columns.token_slots,
            columns.positions,
            out,
            num_heads=self.shape.num_heads,
            num_kv_heads=self.shape.num_kv_heads,
            block_size=self.cache.block_size,
        )


def make_attention(
    cache: DeviceCache,
    shape: HeadShape,
    workspace: torch.Tensor,
    group: RankGroup,
    *,
    max_rows: int,
    max_tokens: int,
    pdl: bool = False,
) -> tuple[DeviceAttention, str]:
    """The best backend that every rank has, and why it is not a better one (empty: it is the best).

    Args:
        cache: Of the rank.
        shape: Its heads.
        workspace: uint8, at least workspace_bytes of the shape; nobody else's while a layer attends.
        group: The ranks that must compute alike.
        max_rows: Of a decode graph.
        max_tokens: Of any step.
        pdl: Launch kernels before the one ahead of them has ended.
    """
    if cache.pages.dtype not in (torch.bfloat16, torch.float16):
        reason = f"FlashInfer does not compute {str(cache.pages.dtype).removeprefix('torch.')}"
    elif shape.head_dim not in (64, 128, 256):
        reason = f"FlashInfer has no kernels for heads {shape.head_dim} wide"
    else:

        def make() -> DeviceAttention:
            from stagemesh.stage.cuda.flashinfer_attention import FlashInferAttention

            made = FlashInferAttention(
                cache, shape, workspace, max_rows=max_rows, max_tokens=max_tokens, pdl=pdl
            )
            made.try_out()
            return made

        attention, reason = on_every_rank(make, "FlashInfer's kernels", group, cache.pages.device)
        if attention is not None:
            return attention, ""
    log.warning("attention: Triton's fallback, slow in prefill: %s", reason)
    return TritonAttention(cache, shape), reason
