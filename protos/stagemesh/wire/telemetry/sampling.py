"""Whether a request is traced: decided once, where its trace begins or enters the mesh."""

from __future__ import annotations

import random

from stagemesh.wire.telemetry.context import TraceContext
from stagemesh.wire.telemetry.settings import TraceSettings

_RATIO_BITS = 64


class HeadSampler:
    """The samplers of OTEL_TRACES_SAMPLER. The SDK's give the same answers; these need no span context.

    Args:
        settings: Name and ratio of the sampler.
    """

    def __init__(self, settings: TraceSettings) -> None:
        self._parent_based = settings.sampler.startswith("parentbased_")
        root = settings.sampler.removeprefix("parentbased_")
        ratio = {"always_on": 1.0, "always_off": 0.0}.get(root, settings.ratio)
        self._bound = round(ratio * (1 << _RATIO_BITS))

    def decide(self, parent: TraceContext | None) -> bytes | None:
        """The trace id a request is to be traced under; None: it is not."""
        if parent is None:
            # The low half of an id that is made only if it is needed.
            low = random.getrandbits(64)
            return (random.getrandbits(64) << 64 | low).to_bytes(16, "big") if low < self._bound else None
        if self._parent_based:
            return parent.trace_id if parent.sampled else None
        # The standard's rule, so that every process of a trace decides alike: the id's low 64 bits.
        return parent.trace_id if int.from_bytes(parent.trace_id[8:], "big") < self._bound else None
