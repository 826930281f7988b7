"""Top-k and top-p on the device, for the rows that ask for them; the others never come here."""

from __future__ import annotations

import torch

from stagemesh.stage.group import RankGroup
from stagemesh.stage.memory import FILTERED_ROWS
from stagemesh.stage.sampling.noise import gumbel
from stagemesh.stage.sampling.sampler import kept

MAX_CANDIDATES = 256
"""Up to this top-k, ranks exchange candidates and not logits."""


class FilteredChoice:
    """Chooses tokens by Gumbel noise among those that top-k and top-p leave.

    Args:
        group: Ranks that share the vocabulary.
        shards: Every rank's part, in rank order.
    """

    def __init__(self, group: RankGroup, shards: list[range]) -> None:
        self._group = group
        self._shards = shards
        self._vocab = shards[group.rank]
        self._widths = [len(shard) for shard in shards]

    def gather(self, logits: torch.Tensor) -> torch.Tensor:
        """Logits of the whole vocabulary from every rank's part."""
        return self._group.all_gather_columns(logits, self._widths)

    def choose(
        self,
        logits: torch.Tensor,
        rows: torch.Tensor,
        temperatures: torch.Tensor,
        seeds: torch.Tensor,
        positions: torch.Tensor,
        top_ks: torch.Tensor,
        top_ps: torch.Tensor,
        *,
        largest_k: int,
    ) -> torch.Tensor:
        """Token ids, int64 [F].

        Args:
            logits: This rank's part, [S, vocab part].
            rows: int64 [F], rows of it.
            temperatures: float32 [F], above 0.
            seeds: int64 [F].
            positions: int64 [F].
            top_ks: int32 [F]; 0 is off.
            top_ps: float32 [F]; 1 is off.
            largest_k: Above 0: every row has a top-k up to this and no top-p.
        """
        parts = []
        for begin in range(0, rows.shape[0], FILTERED_ROWS):
            at = slice(begin, begin + FILTERED_ROWS)
            some = (logits[rows[at]], temperatures[at], seeds[at], positions[at], top_ks[at])
            if 0 < largest_k <= MAX_CANDIDATES:
                parts.append(self._among_candidates(*some, largest_k))
            else:
                parts.append(self._among_all(*some, top_ps[at]))
        return torch.cat(parts)

    def _among_all(
        self,
        logits: torch.Tensor,
        temperatures: torch.Tensor,
        seeds: torch.Tensor,
        positions: torch.Tensor,
        top_ks: torch.Tensor,
        top_ps: torch.Tensor,
    ) -> torch.Tensor:
        whole = self.gather(logits.float())
        scaled = whole / temperatures.unsqueeze(-1)
        keep = kept(scaled, top_ks, top_ps)
        noise = gumbel(seeds, positions, torch.arange(scaled.shape[1], device=scaled.device))
        return (scaled + noise).masked_fill_(~keep, -torch.inf).argmax(dim=-1)

    def _among_candidates(
        self,
        logits: torch.Tensor,
        temperatures: torch.Tensor,
        seeds: torch.Tensor,
        positions: torch.Tensor,
        top_ks: torch.Tensor,
        largest_k: int,
    ) -> torch.Tensor:
        values, ids = logits.float().topk(min(largest_k, logits.shape[1]), dim=-1)
        ids = ids + self._vocab.start
        if self._group.size > 1:
            widths = [min(largest_k, width) for width in self._widths]
            values = self._group.all_gather_columns(values, widths)
            ids = self._group.all_gather_columns(ids, widths)
            # By id first and stable, so that among equal values the lowest id comes first.
            order = ids.argsort(dim=-1)
            values, ids = values.gather(-1, order), ids.gather(-1, order)
            values, order = values.sort(dim=-1, descending=True, stable=True)
            ids = ids.gather(-1, order)
        outside = torch.arange(values.shape[1], device=values.device) >= top_ks.unsqueeze(-1)
        scores = values / temperatures.unsqueeze(-1) + gumbel(seeds, positions, ids)
        best = scores.masked_fill_(outside, -torch.inf).argmax(dim=-1, keepdim=True)
        return ids.gather(-1, best).squeeze(-1)
