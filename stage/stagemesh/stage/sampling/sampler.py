"""The choice of one token a row by the Gumbel-max trick.

argmax(logits / T + Gumbel noise) is a draw from softmax(logits / T) (Gumbel 1954; Maddison et al.,
A* Sampling, NeurIPS 2014, section 2). It shards by vocabulary: each rank takes the best of its part and
the group compares pairs of (score, id), so that whole logits are gathered only for rows that ask for
top-p or top-k.
"""

from __future__ import annotations

import numpy as np
import torch

from stagemesh.stage.engine.batch import SamplingColumns
from stagemesh.stage.group import RankGroup
from stagemesh.stage.sampling.noise import gumbel


class Sampler:
    """Samples from logits sharded by vocabulary.

    Args:
        group: The stage's ranks.
        vocab: This rank's range of token ids.
        vocab_size: Of the whole vocabulary.
        shards: Every rank's range, in rank order.
    """

    def __init__(self, group: RankGroup, vocab: range, vocab_size: int, shards: list[range]) -> None:
        self._group = group
        self._vocab = vocab
        self._vocab_size = vocab_size
        self._shards = shards

    def sample(self, logits: torch.Tensor, columns: SamplingColumns) -> torch.Tensor:
        """Token ids, int64 [S], equal on every rank, for this rank's logits [S, vocab part] (float32)."""
        filtered = (columns.temperatures > 0) & ((columns.top_ks > 0) | (columns.top_ps < 1))
        if not filtered.any():
            return self._sample_sharded(logits, columns)
        rows = torch.from_numpy(np.flatnonzero(filtered))
        others = torch.from_numpy(np.flatnonzero(~filtered))
        tokens = torch.empty(len(columns), dtype=torch.int64)
        tokens[rows] = self._sample_whole(self.gather(logits[rows]), _take(columns, filtered))
        if len(others):
            tokens[others] = self._sample_sharded(logits[others], _take(columns, ~filtered))
        return tokens

    def gather(self, logits: torch.Tensor) -> torch.Tensor:
        """Logits of the whole vocabulary, [S, vocab_size], from every rank's part."""
        return self._group.all_gather_columns(logits, [len(shard) for shard in self._shards])

    def _sample_sharded(self, logits: torch.Tensor, columns: SamplingColumns) -> torch.Tensor:
        scores, ids = self._scores(logits, columns, self._vocab).max(dim=-1)
        ids = ids + self._vocab.start
        if self._group.size == 1:
            return ids
        # float64 holds a float32 score and an id below 2**53 alike.
        pairs = self._group.all_gather_rows(torch.stack((scores.double(), ids.double())).unsqueeze(0))
        best = pairs[:, 0].argmax(dim=0)  # the first rank, so the lowest id, wins a tie
        return pairs[:, 1].gather(0, best.unsqueeze(0)).squeeze(0).to(torch.int64)

    def _sample_whole(self, logits: torch.Tensor, columns: SamplingColumns) -> torch.Tensor:
        temperatures = torch.from_numpy(columns.temperatures).unsqueeze(-1)
        keep = kept(logits / temperatures, torch.from_numpy(columns.top_ks), torch.from_numpy(columns.top_ps))
        scores = self._scores(logits, columns, range(self._vocab_size))
        return scores.masked_fill_(~keep, -torch.inf).argmax(dim=-1)

    def _scores(self, logits: torch.Tensor, columns: SamplingColumns, vocab: range) -> torch.Tensor:
        warm = np.flatnonzero(columns.temperatures > 0)
        if not len(warm):
            return logits
        rows = torch.from_numpy(warm)
        seeds = torch.from_numpy(columns.seeds[warm].view(np.int64))
        positions = torch.from_numpy(columns.positions[warm])
        noise = gumbel(seeds, positions, torch.arange(vocab.start, vocab.stop))
        scores = logits.clone()
        scores[rows] = logits[rows] / torch.from_numpy(columns.temperatures[warm]).unsqueeze(-1) + noise
        return scores


def kept(scaled: torch.Tensor, top_ks: torch.Tensor, top_ps: torch.Tensor) -> torch.Tensor:
    """Which tokens top-k, then top-p leave; bool [S, V]. The most probable one always stays."""
    ordered, order = scaled.sort(dim=-1, descending=True, stable=True)
    rank = torch.arange(scaled.shape[-1], device=scaled.device)
    limit = torch.where(top_ks > 0, top_ks, scaled.shape[-1]).unsqueeze(-1)
    ordered = ordered.masked_fill(rank >= limit, -torch.inf)
    probabilities = ordered.softmax(dim=-1)
    before = probabilities.cumsum(dim=-1) - probabilities
    keep = ((before < top_ps.unsqueeze(-1)) & (rank < limit)) | (rank == 0)
    return torch.zeros_like(keep).scatter_(-1, order, keep)


def _take(columns: SamplingColumns, rows: np.ndarray) -> SamplingColumns:
    return SamplingColumns(
        seeds=columns.seeds[rows],
        positions=columns.positions[rows],
        temperatures=columns.temperatures[rows],
        top_ks=columns.top_ks[rows],
        top_ps=columns.top_ps[rows],
    )
