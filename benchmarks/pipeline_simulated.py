"""The simulator as a benchmark uses it: its speed, its word on a load, and how far that is from a mesh's."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from load import Request

from stagemesh.router.simulate.result import SimulationResult
from stagemesh.router.simulate.simulation import simulate
from stagemesh.router.simulate.spec import SimulationSpec, parse

HOUR_REQUESTS = 10_000


@dataclass(frozen=True, slots=True, kw_only=True)
class Measured:
    """Of a whole run, at the client."""

    tokens_per_s: float
    ttft_p50_ms: float
    itl_p50_ms: float


def simulated_hour() -> SimulationResult:
    """64 stages of 8 ms, 10,000 requests over an hour."""
    content = {
        "stages": {"count": 64, "cost": "8ms"},
        "lane": {"num_blocks": 200_000, "max_sequences": 32},
        "load": {
            "rate": HOUR_REQUESTS / 3600,
            "requests": HOUR_REQUESTS,
            "prompt": {"uniform": [64, 2048]},
            "output": {"uniform": [16, 512]},
        },
    }
    return simulate(parse(content, "the hour"))


def saturated_rate(spec: SimulationSpec) -> float:
    """Requests per second that keep the slowest stage busy all the time, with as many running as may."""
    result = simulate(spec)
    busy = max(stage.busy_share for stage in result.stages)
    return result.num_finished / (result.virtual_s * busy)


def compare(
    spec: SimulationSpec,
    measured: Measured,
    requests: Sequence[Request],
    burst: SimulationSpec | None = None,
) -> tuple[float, str]:
    """Simulate a load that a mesh has had; the greatest relative difference, and the figures.

    Args:
        spec: The lane and the load, with the hops of the mesh.
        measured: On the mesh.
        requests: What the mesh was asked, to be sure that it is the same.
        burst: What the TTFT was measured of, where that is not the load.
    """
    result = simulate(spec)
    ttft = simulate(burst).ttft_ms if burst else result.ttft_ms
    assert result.output_tokens == sum(output for _, _, output in requests)
    pairs = {
        "tokens/s": (result.output_tokens_per_s, measured.tokens_per_s),
        "TTFT p50 ms": (ttft.p50, measured.ttft_p50_ms),
        "inter-token p50 ms": (result.inter_token_ms.p50, measured.itl_p50_ms),
    }
    worst = max(abs(ours / theirs - 1) for ours, theirs in pairs.values())
    about = ", ".join(f"{name} {ours:.1f} against {theirs:.1f}" for name, (ours, theirs) in pairs.items())
    return worst, f"simulated against measured: {about}"
