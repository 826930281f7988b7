"""Durations, bandwidths and rates as people write them in a simulation file."""

from __future__ import annotations

import re
from typing import Annotated, Any

from pydantic import BeforeValidator, Field, PlainSerializer

from stagemesh.model.cost import CostModel
from stagemesh.wire.errors import ConfigError

_NS = {"ns": 1, "us": 1e3, "ms": 1e6, "s": 1e9, "min": 60e9, "h": 3600e9}
_BYTES = {"": 1, "k": 1e3, "M": 1e6, "G": 1e9, "T": 1e12}
MOST_NS = 86_400_000_000_000 * 366
"""A year: sums of durations must fit 64 bits."""
_NUMBER = r"(\d+(?:\.\d+)?)\s*"


def duration_ns(value: Any) -> int:
    """Nanoseconds of "0.2ms", "50us", "1h"; 0 needs no unit."""
    if value == 0:
        return 0
    match = re.fullmatch(_NUMBER + "(ns|us|ms|s|min|h)", str(value).strip())
    if match is None:
        raise ValueError("expected a duration, such as 0.2ms, 30s or 1h")
    nanoseconds = float(match[1]) * _NS[match[2]]
    if nanoseconds > MOST_NS:
        raise ValueError("expected a duration of a year at most")
    return round(nanoseconds)


def bytes_per_second(value: Any) -> float:
    """Of "10GB/s" or "25Gbit/s"."""
    match = re.fullmatch(_NUMBER + "([kMGT]?)(B|bit)/s", str(value).strip())
    rate = float(match[1]) * _BYTES[match[2]] / (8 if match[3] == "bit" else 1) if match else 0.0
    if rate < 1:
        raise ValueError("expected a bandwidth, such as 10GB/s or 25Gbit/s, of a byte a second at least")
    return rate


def cost_model(value: Any) -> CostModel:
    """Of "2ms + 0.01ms*tokens", as `stagemesh stage --cost` takes it."""
    if isinstance(value, CostModel):
        return value
    try:
        return CostModel.parse(str(value))
    except ConfigError as error:
        raise ValueError(str(error).removeprefix("--cost: ")) from error


Duration = Annotated[int, BeforeValidator(duration_ns), Field(ge=0)]
"""Nanoseconds."""
Bandwidth = Annotated[float, BeforeValidator(bytes_per_second)]
"""Bytes per second."""
Cost = Annotated[CostModel, BeforeValidator(cost_model), PlainSerializer(str)]
