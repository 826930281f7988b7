"""The ranks of one stage and their collectives."""

from __future__ import annotations

import datetime
from pathlib import Path

import torch
import torch.distributed as dist

from stagemesh.stage.host_exchange import HostExchange


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
        cls,
        rank: int,
        size: int,
        store: Path,
        *,
        timeout_s: float,
        device: torch.device | None = None,
        memory: int | None = None,
    ) -> RankGroup:
        """Join the group of `size` ranks.

        Args:
            rank: This one.
            size: Ranks in all.
            store: A file at which ranks of NCCL and gloo meet.
            timeout_s: How long a rank waits for another.
            device: The rank's GPU, for NCCL.
            memory: Descriptor of host_memory.create, for ranks that compute on one host's CPUs.
        """
        if size > 1 and memory is not None:
            return HostGroup(HostExchange(rank, size, memory, timeout_s=timeout_s), rank, size)
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

    def all_agree(self, mine: bool, device: torch.device) -> bool:
        """Whether it is so on every rank, asked on a device that the ranks can sum on."""
        votes = self.all_reduce(torch.tensor([int(mine)], dtype=torch.int32, device=device))
        return int(votes.item()) == self.size

    def all_gather_rows(self, tensor: torch.Tensor) -> torch.Tensor:
        """Every rank's tensor (equal shapes), concatenated along dimension 0."""
        return tensor if self.size == 1 else self._all_gather(tensor.contiguous()).flatten(0, 1)

    def all_gather_columns(self, tensor: torch.Tensor, widths: list[int]) -> torch.Tensor:
        """Every rank's [N, widths[rank]] side by side."""
        if self.size == 1:
            return tensor
        padded = tensor.new_zeros(tensor.shape[0], max(widths))
        padded[:, : tensor.shape[1]] = tensor
        parts = self._all_gather(padded)
        return torch.cat([part[:, :width] for part, width in zip(parts, widths, strict=True)], dim=1)

    def _all_gather(self, tensor: torch.Tensor) -> torch.Tensor:
        """[size, *shape]"""
        out = tensor.new_empty(self.size, *tensor.shape)
        dist.all_gather(list(out), tensor)
        return out


class HostGroup(RankGroup):
    """Ranks that compute on one host's CPUs and talk through its memory. Sums are equal on every rank."""

    def __init__(self, exchange: HostExchange, rank: int, size: int) -> None:
        super().__init__(rank, size)
        self._exchange = exchange

    def all_reduce(self, tensor: torch.Tensor) -> torch.Tensor:
        whole = tensor.contiguous()
        for piece, parts in self._exchange.pieces(whole):
            if self.size == 2:
                torch.add(parts[0], parts[1], out=piece)
            else:
                torch.sum(parts, 0, dtype=piece.dtype, out=piece)
        return tensor if whole is tensor else tensor.copy_(whole)

    def _all_gather(self, tensor: torch.Tensor) -> torch.Tensor:
        out = tensor.new_empty(self.size, *tensor.shape)
        flat, begin = out.view(self.size, -1), 0
        for piece, parts in self._exchange.pieces(tensor):
            flat[:, begin : begin + len(piece)] = parts
            begin += len(piece)
        return out
