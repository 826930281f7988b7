"""The ranks of one stage and their collectives."""

from __future__ import annotations

import datetime
from pathlib import Path

import torch
import torch.distributed as dist


class RankGroup:
    """The tensor-parallel ranks of a stage; with one rank nothing is communicated.

    Every rank makes the same calls in the same order (rule 11 in docs/architecture.md). A rank that is
    gone makes the others' call raise, or time out after `timeout_s`; the leader then replaces the group.
    """

    def __init__(self, rank: int = 0, size: int = 1) -> None:
        self.rank = rank
        self.size = size

    @classmethod
    def connect(
        cls, rank: int, size: int, store: Path, *, timeout_s: float, device: torch.device | None = None
    ) -> RankGroup:
        """Join the group of `size` ranks that meet at the file `store`; over NCCL with the rank's GPU."""
        if size > 1:
            dist.init_process_group(
                "gloo" if device is None else "nccl",
                device_id=device,
                init_method=f"file://{store}",
                rank=rank,
                world_size=size,
                timeout=datetime.timedelta(seconds=timeout_s),
            )
        return cls(rank, size)

    def all_reduce(self, tensor: torch.Tensor) -> torch.Tensor:
        """The sum over the ranks, in place."""
        if self.size > 1:
            dist.all_reduce(tensor)
        return tensor

    def all_gather_rows(self, tensor: torch.Tensor) -> torch.Tensor:
        """Every rank's tensor (equal shapes), concatenated along dimension 0."""
        if self.size == 1:
            return tensor
        parts = [torch.empty_like(tensor) for _ in range(self.size)]
        dist.all_gather(parts, tensor.contiguous())
        return torch.cat(parts)

    def all_gather_columns(self, tensor: torch.Tensor, widths: list[int]) -> torch.Tensor:
        """Every rank's [N, widths[rank]] side by side."""
        if self.size == 1:
            return tensor
        padded = tensor.new_zeros(tensor.shape[0], max(widths))
        padded[:, : tensor.shape[1]] = tensor
        parts = [torch.empty_like(padded) for _ in range(self.size)]
        dist.all_gather(parts, padded)
        return torch.cat([part[:, :width] for part, width in zip(parts, widths, strict=True)], dim=1)
