"""Runs of a simulated mesh under a load, and what they measure."""

from __future__ import annotations

import re
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import grpc
import numpy as np
from load import Arrivals, Request, play
from pipeline_delays import ControlDelays, control_delays, timeline
from pipeline_simulated import Measured, saturated_rate
from sim_mesh import SimMesh, sim_mesh

from stagemesh.router.simulate.load import draw
from stagemesh.router.simulate.spec import SimulationSpec, parse
from stagemesh.v1 import admin_pb2, admin_pb2_grpc

PROMPT = 16
MIXED_COST = "4ms + 20us*rows + 10us*prefill"
MIXED_STAGES = 4
MIXED_SEQUENCES = 32
"""For each stage: what runs at once is bounded, so that 100% of the load is a rate."""
RAMP_S = 6.0
BURST = 64
"""Requests at once that say what the control path takes: more than fit one step."""
BURST_TOKENS = 2
"""Output of each of them."""


@dataclass(frozen=True, slots=True, kw_only=True)
class LaneFacts:
    """What the router has learnt of its lane, and what was measured of its delays."""

    num_microbatches: int
    ring_hops_ms: float
    num_stages: int
    slowest_busy_share: float
    """Of the last ten seconds, by the reports of the slowest stage."""
    control: ControlDelays | None = None
    link_ms: float = 0.0
    ring_ms: float = 0.0

    def delays(self) -> dict[str, Any]:
        """The keys of a simulation file."""
        assert self.control is not None
        return {
            "link": {"latency": f"{max(self.link_ms, 0.0):.4f}ms"},
            "ring": {"latency": f"{max(self.ring_ms, 0.0):.4f}ms"},
            "router": self.control.keys(),
        }

    def burst_delays(self) -> dict[str, Any]:
        """The same keys for a burst on the idle mesh."""
        assert self.control is not None
        return {**self.delays(), "link": {"latency": f"{max(self.control.link, 0.0):.4f}ms"}}


@dataclass(frozen=True, slots=True, kw_only=True)
class DecodeRun:
    """N streams that decode all the time."""

    name: str
    costs: tuple[str, ...]
    requests: list[Request]
    rate: float
    ideal_rate: float
    cost_ms: float
    facts: LaneFacts
    measured: Measured

    @property
    def efficiency(self) -> float:
        """As the contract's words of measurement define it."""
        return self.rate / self.ideal_rate

    @property
    def hop_ms(self) -> float:
        """By which each stage is late, on average."""
        return self.cost_ms * (self.ideal_rate / self.rate - 1)

    def spec(self) -> SimulationSpec:
        """The same for the simulator."""
        return self._spec(self.requests, self.facts.delays())

    def burst_spec(self) -> SimulationSpec:
        """For the simulator: a burst as those of ControlDelays, with the hops that they had."""
        return self._spec([(0.0, PROMPT, BURST_TOKENS)] * BURST, self.facts.burst_delays())

    def _spec(self, requests: Sequence[Request], delays: dict[str, Any]) -> SimulationSpec:
        """Requests that are alike, all at once."""
        content = {
            "stages": [{"cost": cost} for cost in self.costs],
            "position_bytes": 0,
            "load": {
                "arrivals": "at_once",
                "requests": len(requests),
                "prompt": {"fixed": requests[0][1]},
                "output": {"fixed": requests[0][2]},
            },
            "lane": {"max_context": 4096},
            **delays,
        }
        return parse(content, self.name)


def decode_run(
    costs: Sequence[str],
    slowest_ms: float,
    streams: int,
    seconds: float,
    router: Sequence[str] = (),
    result_delay_s: float | None = None,
) -> DecodeRun:
    """Streams of equal length, all at once; the rate while all of them run."""
    total_ms = max(sum(_milliseconds(cost) for cost in costs), slowest_ms * len(costs))
    late_ms = 1e3 * (result_delay_s or 0.0) if "0" in router else 0.0
    tokens = max(16, int(seconds * 1e3 / (total_ms + late_ms)))
    requests: list[Request] = [(0.0, PROMPT, tokens)] * streams
    with sim_mesh(costs, router=router, result_delay_s=result_delay_s) as mesh:
        arrivals, facts = _play(mesh, requests, seconds * 6 + 30, seconds, delays=result_delay_s is None)
    begin, end = arrivals.steady_window()
    return DecodeRun(
        name=f"decode, {' + '.join(costs) if len(set(costs)) > 1 else f'{len(costs)} x {costs[0]}'}",
        costs=tuple(costs),
        requests=requests,
        rate=arrivals.rate(begin, end),
        ideal_rate=streams / len(costs) / (slowest_ms / 1e3),
        cost_ms=slowest_ms,
        facts=facts,
        # One burst is one sample: the middle of several like it.
        measured=replace(_measured(arrivals), ttft_p50_ms=facts.control.ttft_p50)
        if facts.control
        else _measured(arrivals),
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class MixedLoad:
    """Requests of every length at random times."""

    requests: list[Request]
    duration_s: float
    content: dict[str, Any]
    about: str

    def spec(self, facts: LaneFacts) -> SimulationSpec:
        """The same for the simulator, with the hops of the mesh it ran on."""
        return parse({**self.content, **facts.delays()}, "mixed load")


@dataclass(frozen=True, slots=True, kw_only=True)
class MixedRun:
    """What came of it."""

    busy_share: float
    itl_p50_ms: float
    itl_p99_ms: float
    facts: LaneFacts
    measured: Measured

    @property
    def itl_ratio(self) -> float:
        """Of the slow inter-token times to the usual."""
        return self.itl_p99_ms / self.itl_p50_ms


def mixed_load(share: float, duration_s: float) -> MixedLoad:
    """Poisson arrivals at a share of the rate that saturates the simulated lane."""
    content: dict[str, Any] = {
        "stages": {"count": MIXED_STAGES, "cost": MIXED_COST},
        "position_bytes": 0,
        "lane": {"max_sequences": MIXED_SEQUENCES, "max_context": 4096, "max_waiting": 4096},
        "load": {
            "requests": 1500,
            "arrivals": "at_once",
            "prompt": {"uniform": [64, 2048]},
            "output": {"uniform": [16, 512]},
        },
    }
    most = saturated_rate(parse(content, "mixed load"))
    rate = share * most
    content["load"] = {
        **content["load"],
        "arrivals": "poisson",
        "requests": None,
        "rate": rate,
        "duration": f"{duration_s}s",
    }
    spec = parse(content, "mixed load")
    drawn = draw(spec.load, spec.lane)
    requests: list[Request] = [
        (arrival / 1e9, prompt, output)
        for arrival, prompt, output in zip(
            drawn.arrivals_ns.tolist(), drawn.prompts.tolist(), drawn.outputs.tolist(), strict=True
        )
    ]
    about = f"{rate:.1f} requests/s where {most:.1f} saturate, {MIXED_COST} on each of {MIXED_STAGES} stages"
    return MixedLoad(requests=requests, duration_s=duration_s, content=content, about=about)


def mixed_run(load: MixedLoad) -> MixedRun:
    """Play it; the busy share and the inter-token times are of the time after the ramp, while requests arrive."""
    flags = ["--max-sequences", str(MIXED_SEQUENCES), "--max-waiting", "4096"]
    with sim_mesh([MIXED_COST] * MIXED_STAGES, router=flags) as mesh:
        arrivals, facts = _play(
            mesh, load.requests, load.duration_s * 4 + 60, load.duration_s, look_at_s=load.duration_s
        )
    gaps = np.concatenate(
        [
            np.diff(times)[(times[1:] > RAMP_S) & (times[1:] < load.duration_s)]
            for times in arrivals.tokens
            if len(times) > 1
        ]
    )
    return MixedRun(
        busy_share=facts.slowest_busy_share,
        itl_p50_ms=float(np.percentile(gaps, 50)) * 1e3,
        itl_p99_ms=float(np.percentile(gaps, 99)) * 1e3,
        facts=facts,
        measured=_measured(arrivals),
    )


def _play(
    mesh: SimMesh,
    requests: Sequence[Request],
    timeout_s: float,
    seconds: float,
    *,
    delays: bool = True,
    look_at_s: float | None = None,
) -> tuple[Arrivals, LaneFacts]:
    """Play a load of about so many seconds and ask the router what it has learnt, at a moment of the load or in its last
    third; measure the delays of the mesh before and meanwhile, if they are wanted."""
    for _ in range(2):
        play(mesh.listen, [(0.0, PROMPT, 8)] * BURST, timeout_s=30, seed=7)
    control = control_delays(mesh, [(0.0, PROMPT, BURST_TOKENS)] * BURST) if delays else None
    facts: list[LaneFacts] = []
    stop = threading.Event()

    def watch() -> None:
        began = time.monotonic()
        while not stop.wait(0.25):
            if look_at_s is None or not facts or time.monotonic() - began < look_at_s + 1.0:
                facts.append(lane_facts(mesh.admin))

    watcher = threading.Thread(target=watch)
    watcher.start()
    try:
        with timeline(mesh, seconds) as taken:
            arrivals = play(mesh.listen, requests, timeout_s=timeout_s)
    finally:
        stop.set()
        watcher.join()
    if arrivals.errors:
        raise RuntimeError(f"{len(arrivals.errors)} of {len(requests)} requests failed: {arrivals.errors[0]}")
    chosen = facts[-1 if look_at_s is not None else len(facts) * 2 // 3]
    return arrivals, replace(chosen, control=control, link_ms=taken[0].link_ms(), ring_ms=taken[0].ring_ms())


def lane_facts(admin: str) -> LaneFacts:
    """Ask the router."""
    with grpc.insecure_channel(admin) as channel:
        stub = admin_pb2_grpc.AdminServiceStub(channel)
        lane = stub.GetStatus(admin_pb2.GetStatusRequest(), timeout=10).status.lanes[0]
    slowest = lane.slowest_stage
    return LaneFacts(
        num_microbatches=lane.max_in_flight,
        ring_hops_ms=lane.ring_hops_ms,
        num_stages=len(lane.stages),
        slowest_busy_share=lane.stages[slowest].busy_share,
    )


def _measured(arrivals: Arrivals) -> Measured:
    last = max(float(times[-1]) for times in arrivals.tokens if len(times))
    return Measured(
        tokens_per_s=sum(len(times) for times in arrivals.tokens) / last,
        ttft_p50_ms=float(np.percentile(arrivals.ttft(), 50)) * 1e3,
        itl_p50_ms=float(np.percentile(arrivals.inter_token(), 50)) * 1e3,
    )


def _milliseconds(cost: str) -> float:
    match = re.match(r"([\d.]+)ms", cost)
    assert match, cost
    return float(match[1])
