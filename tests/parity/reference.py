"""What transformers answers (float32, CPU), and the rule by which an answer equals it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from transformers import DynamicCache, PreTrainedModel

NEAR_TIE = 1e-3
"""A divergence is excused where the reference's two best logits are closer than this."""
LOGIT_TOLERANCE = 1e-3
MAX_EXCUSED_SHARE = 0.01
"""Of sequences, over the whole session."""


@dataclass(slots=True)
class Ledger:
    """What the parity tests of a session have compared."""

    num_sequences: int = 0
    num_tokens: int = 0
    num_excused: int = 0
    worst_logit_error: float = 0.0

    @property
    def too_many_excused(self) -> bool:
        """More divergences than near-ties explain."""
        return self.num_excused > MAX_EXCUSED_SHARE * self.num_sequences

    def __str__(self) -> str:
        return (
            f"parity: {self.num_sequences} sequences, {self.num_tokens} tokens, {self.num_excused} excused; "
            f"logits within {self.worst_logit_error:.1e}"
        )


LEDGER = Ledger()


class Reference:
    """A transformers model as the judge. Its answers are remembered: many layouts are compared with them."""

    def __init__(self, model: PreTrainedModel) -> None:
        self._model = model
        self._greedy: dict[tuple[int, ...], list[int]] = {}
        self._logits: dict[tuple[tuple[int, ...], tuple[int, ...]], torch.Tensor] = {}

    @torch.inference_mode()
    def greedy(self, prompt: Sequence[int], count: int) -> list[int]:
        """The `count` tokens that follow, by one forward pass each with transformers' own KV cache."""
        key = tuple(prompt)
        if len(self._greedy.get(key, [])) < count:
            cache, tokens = DynamicCache(), []
            inputs = torch.tensor([key])
            for _ in range(count):
                logits = self._model(inputs, past_key_values=cache, use_cache=True, logits_to_keep=1).logits
                inputs = logits[:, -1].argmax(dim=-1, keepdim=True)
                tokens.append(int(inputs))
            self._greedy[key] = tokens
        return self._greedy[key][:count]

    @torch.inference_mode()
    def forced(self, prompt: Sequence[int], tokens: Sequence[int]) -> torch.Tensor:
        """Logits [len(tokens), vocab] that each of these tokens was to be chosen from, by one pass."""
        key = tuple(prompt), tuple(tokens)
        if key not in self._logits:
            whole = torch.tensor([[*key[0], *key[1][:-1]]])
            self._logits[key] = self._model(whole, use_cache=False, logits_to_keep=len(tokens)).logits[0]
        return self._logits[key]

    def check(
        self,
        prompt: Sequence[int],
        tokens: Sequence[int],
        logits: npt.NDArray[np.float32] | None = None,
        *,
        ledger: Ledger = LEDGER,
    ) -> None:
        """Assert that greedy `tokens` (and their logits) are the reference's, up to near-ties.

        After a divergence the reference goes on from our tokens, so that the rest is compared all the same.
        """
        expected = self.greedy(prompt, len(tokens))
        excused = False
        if list(tokens) != expected or logits is not None:
            forced = self.forced(prompt, tokens)
            apart = (forced.argmax(dim=-1) != torch.tensor(tokens)) | _first_apart(tokens, expected)
            for place in apart.nonzero().flatten().tolist():
                best, second = forced[place].topk(2).values.tolist()
                assert best - second < NEAR_TIE, (
                    f"token {place} after a prompt of {len(prompt)} is {tokens[place]}, transformers says "
                    f"{int(forced[place].argmax())} by a margin of {best - second:.3g}"
                )
                excused = True
            if logits is not None:
                assert logits.shape == forced.shape
                error = float((torch.from_numpy(logits) - forced).abs().max())
                assert error < LOGIT_TOLERANCE, f"logits after a prompt of {len(prompt)} are {error:.3g} off"
                ledger.worst_logit_error = max(ledger.worst_logit_error, error)
        ledger.num_sequences += 1
        ledger.num_tokens += len(tokens)
        ledger.num_excused += excused


def _first_apart(tokens: Sequence[int], expected: Sequence[int]) -> torch.Tensor:
    """bool [len(tokens)]: true where two answers part for the first time, if they do."""
    apart = torch.zeros(len(tokens), dtype=torch.bool)
    differ = [place for place, (one, other) in enumerate(zip(tokens, expected, strict=True)) if one != other]
    apart[differ[:1]] = True
    return apart
