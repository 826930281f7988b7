"""The mixed load of benchmarks/pipeline.py in virtual time: prefill that comes unevenly makes no uneven steps."""

from __future__ import annotations

from typing import Any

from stagemesh.router.simulate.result import SimulationResult
from stagemesh.router.simulate.simulation import simulate
from stagemesh.router.simulate.spec import parse


def mixed(rate: float, **lane: Any) -> SimulationResult:
    """Four stages; about 19 requests a second saturate them with 128 running."""
    content = {
        "stages": {"count": 4, "cost": "4ms + 20us*rows + 10us*prefill"},
        "link": {"latency": "0.35ms"},
        "ring": {"latency": "0.35ms"},
        "position_bytes": 0,
        "lane": {"max_sequences": 32, "max_context": 4096, "max_waiting": 4096, **lane},
        "load": {
            "rate": rate,
            "duration": "12s",
            "prompt": {"uniform": [64, 2048]},
            "output": {"uniform": [16, 512]},
        },
    }
    return simulate(parse(content, "mixed"))


def test_an_overload_keeps_every_stage_busy() -> None:
    """Of the whole run, its ramps included; 0.884 when a step could take half its decodes again in prefill."""
    assert min(stage.busy_share for stage in mixed(22.7).stages) > 0.895


def test_streams_do_not_stutter_while_prompts_are_computed() -> None:
    inter_token = mixed(15.1).inter_token_ms
    assert inter_token.p99 < 2.0 * inter_token.p50


def test_prompts_that_wait_for_a_slot_make_no_large_steps() -> None:
    """Twice the load fills the queue, not the steps."""
    inter_token = mixed(38.0).inter_token_ms
    assert inter_token.p99 < 2.1 * inter_token.p50
