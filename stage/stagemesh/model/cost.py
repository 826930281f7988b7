"""Scripted step costs, such as "2ms + 0.01ms*tokens": of simulated engines, and of the simulator's stages."""

from __future__ import annotations

import re
from dataclasses import dataclass

from stagemesh.wire.errors import ConfigError

VARIABLES = ("tokens", "rows", "prefill", "context")
"""Positions of the step, its rows, its positions beyond one a row, and the KV positions its rows attend to."""
MOST_NS = 3.6e12
"""Of a term, an hour: what is more is a slip of the pen, and no clock counts its sums."""
_UNITS_NS = {"us": 1e3, "ms": 1e6, "s": 1e9}
_TERM = re.compile(r"\s*(\d+(?:\.\d+)?)\s*(us|ms|s)\s*(?:\*\s*([a-z]+))?\s*")


@dataclass(frozen=True, slots=True)
class StepShape:
    """What a step's cost depends on."""

    tokens: int
    rows: int
    prefill: int
    context: int


@dataclass(frozen=True, slots=True)
class CostModel:
    """A sum of terms: (nanoseconds, variable or "")."""

    terms: tuple[tuple[float, str], ...]

    @classmethod
    def parse(cls, text: str) -> CostModel:
        """Read an expression: terms joined by +, each a number with unit us, ms or s, alone or times a variable."""
        terms = []
        for part in text.split("+"):
            found = _TERM.fullmatch(part)
            if not found or (found[3] and found[3] not in VARIABLES):
                raise ConfigError(
                    f"--cost: '{part.strip()}' in '{text}' is not a term; expected such as 2ms or 0.01ms*tokens, "
                    f"with a variable of {', '.join(VARIABLES)}"
                )
            nanoseconds = float(found[1]) * _UNITS_NS[found[2]]
            if nanoseconds > MOST_NS:
                raise ConfigError(f"--cost: '{part.strip()}' in '{text}' is more than an hour; expected less")
            terms.append((nanoseconds, found[3] or ""))
        return cls(tuple(terms))

    def nanoseconds(self, shape: StepShape) -> int:
        """What a step of that shape takes."""
        return round(
            sum(cost * (getattr(shape, variable) if variable else 1) for cost, variable in self.terms)
        )
