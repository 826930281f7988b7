"""The building blocks every model shares, sharded over the ranks of a stage."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import nn

from stagemesh.stage.group import RankGroup
from stagemesh.stage.models.product import Layout, Product, pack


class Linear(nn.Module):
    """y = x W^T for a weight [out, in]; column-parallel when the weight is a slice of the rows."""

    def __init__(self, weight: torch.Tensor, layout: Layout) -> None:
        super().__init__()
        self.product = pack(weight, layout)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """[T, in] to [T, out]."""
        return self.product(x)


class RowParallelLinear(nn.Module):
    """A linear whose weight is a slice of the columns: the ranks' partial results are summed."""

    def __init__(self, weight: torch.Tensor, group: RankGroup, layout: Layout) -> None:
        super().__init__()
        self.product = pack(weight, layout)
        self._group = group

    def forward(self, x: torch.Tensor, residual: torch.Tensor | None = None) -> torch.Tensor:
        """[T, in of this rank] to [T, out], equal on every rank; with `residual` [T, out] added."""
        # One rank adds the residual within its product, so that the sum over the ranks has it once.
        return self._group.all_reduce(self.product(x, residual if self._group.rank == 0 else None))


class RMSNorm(nn.Module):
    """Root mean square norm (Zhang and Sennrich, 2019)."""

    def __init__(self, weight: torch.Tensor, eps: float) -> None:
        super().__init__()
        self.weight = weight
        self._eps = torch.tensor([eps])

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """[T, hidden] to [T, hidden]."""
        # Torch's rms_norm is a chain of small kernels on the CPU; this is a shorter one.
        wide = x.float()
        norm = torch.linalg.vector_norm(wide, dim=-1, keepdim=True)
        scale = torch.addcmul(self._eps, norm, norm, value=1 / x.shape[-1]).rsqrt_()
        return (wide * scale).to(x.dtype).mul_(self.weight)


class VocabParallelEmbedding(nn.Module):
    """Token embeddings; each rank holds a range of the vocabulary."""

    def __init__(self, weight: torch.Tensor, vocab: range, group: RankGroup) -> None:
        super().__init__()
        self.weight = weight
        self._vocab = vocab
        self._group = group

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        """int64 [T] to [T, hidden], equal on every rank."""
        if self._group.size == 1:
            return F.embedding(tokens, self.weight)
        local = tokens - self._vocab.start
        outside = (local < 0) | (local >= len(self._vocab))
        hidden = F.embedding(local.masked_fill(outside, 0), self.weight)
        return self._group.all_reduce(hidden.masked_fill_(outside.unsqueeze(-1), 0))


class VocabParallelHead(nn.Module):
    """Logits of this rank's range of the vocabulary.

    A tied weight is the embedding's own storage, and stays in its layout only if that is transposed: else the head
    has a copy, which `copied_bytes` counts.

    Args:
        weight: [vocab part, hidden].
        layout: Of the weights of this process.
        tied: Whether the embedding of this process looks its rows up in `weight`.
    """

    def __init__(self, weight: torch.Tensor, layout: Layout, *, tied: bool) -> None:
        super().__init__()
        self._packed: Product | None = None
        self._weight = weight
        self.copied_bytes = 0
        if layout != "transposed":
            self._packed = pack(weight, layout)
            self._weight = weight.new_empty(0)  # no view of it, which would keep all of it
            self.copied_bytes = weight.nbytes if tied else 0

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        """[S, hidden] to [S, vocab part], float32."""
        if self._packed is not None:
            logits = self._packed(hidden)
        elif hidden.shape[0] <= 2:
            logits = hidden @ self._weight.t()
        else:  # the product with the weight on the left is the faster one from a few rows on
            logits = (self._weight @ hidden.t()).t().contiguous()
        return logits.float()
