"""The ranks of a stage as threads of one process, with RankGroup's interface.

The threads take turns, in rank order, from one collective to the next. So a run does the same every time,
and ranks do not fight for the interpreter's lock, which would cost more than the products themselves.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager

import torch

from stagemesh.stage.group import RankGroup

TIMEOUT_S = 60.0


class GroupLostError(Exception):
    """Another rank failed, or does not make the same calls."""


class _Table:
    """Where the ranks lay down their tensors, and whose turn it is."""

    def __init__(self, size: int) -> None:
        self.turns = [threading.Semaphore(0) for _ in range(size)]
        self.turns[0].release()
        # Two generations: a rank may be at its next collective before others have read this one's tensors.
        self.parts = [[torch.empty(0)] * size, [torch.empty(0)] * size]
        self.lost = False


class ThreadGroup(RankGroup):
    """One rank of a group of threads. Sums are taken in rank order, so that they are equal on every rank."""

    def __init__(self, rank: int, size: int, table: _Table) -> None:
        super().__init__(rank, size)
        self._table = table
        self._num_calls = 0

    @classmethod
    def of_size(cls, size: int) -> list[ThreadGroup]:
        """All ranks of a new group."""
        table = _Table(size)
        return [cls(rank, size, table) for rank in range(size)]

    @contextmanager
    def working(self) -> Iterator[None]:
        """Around all that a rank's thread does: it begins when it is its turn and passes it on at the end."""
        self._await_turn()
        try:
            yield
        except BaseException:
            self._table.lost = True
            raise
        finally:
            self._pass_on()

    def all_reduce(self, tensor: torch.Tensor) -> torch.Tensor:
        """The sum over the ranks, in place."""
        if self.size > 1:
            parts = self._exchange(tensor.clone())
            assert len({part.shape for part in parts}) == 1
            total = parts[0] + parts[1]
            for part in parts[2:]:
                total += part
            tensor.copy_(total)
        return tensor

    def all_gather_rows(self, tensor: torch.Tensor) -> torch.Tensor:
        """Every rank's tensor (equal shapes), concatenated along dimension 0."""
        parts = self._exchange(tensor)
        assert len({part.shape for part in parts}) == 1
        return torch.cat(parts)

    def all_gather_columns(self, tensor: torch.Tensor, widths: list[int]) -> torch.Tensor:
        """Every rank's [N, widths[rank]] side by side."""
        parts = self._exchange(tensor)
        assert [part.shape[1] for part in parts] == widths
        return torch.cat(parts, dim=1)

    def _exchange(self, tensor: torch.Tensor) -> list[torch.Tensor]:
        parts = self._table.parts[self._num_calls % 2]
        self._num_calls += 1
        parts[self.rank] = tensor
        self._pass_on()
        self._await_turn()  # after a round everybody has come to this call
        return list(parts)

    def _await_turn(self) -> None:
        if not self._table.turns[self.rank].acquire(timeout=TIMEOUT_S) or self._table.lost:
            raise GroupLostError(
                f"rank {self.rank} waited for the others in its collective {self._num_calls}"
            )

    def _pass_on(self) -> None:
        self._table.turns[(self.rank + 1) % self.size].release()
