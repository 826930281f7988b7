"""The loads of benchmarks/gpu.py in virtual time: what the scheduler makes of steps that cost what GPUs' do."""

from __future__ import annotations

from pathlib import Path

import pytest

from stagemesh.router.simulate.result import SimulationResult
from stagemesh.router.simulate.simulation import simulate
from stagemesh.router.simulate.spec import read

EXAMPLES = Path(__file__).parents[2] / "examples"


@pytest.fixture(scope="module")
def two_stages() -> dict[str, SimulationResult]:
    base, variants = read(EXAMPLES / "simulate_h100x2.yaml")
    return {"base": simulate(base), **{name: simulate(spec) for name, spec in variants.items()}}


def test_two_stages_keep_two_steps_in_flight(two_stages: dict[str, SimulationResult]) -> None:
    """512 answers of up to 512 tokens in two groups are 1,024 steps at least; what comes on top is prefill's."""
    result = two_stages["base"]
    assert result.num_finished == 512
    assert result.num_steps < 1100
    assert min(stage.busy_share for stage in result.stages) > 0.95
    assert two_stages["three in flight"].num_steps > 1.4 * result.num_steps


def test_two_stages_are_worth_two_gpus(two_stages: dict[str, SimulationResult]) -> None:
    alone = two_stages["one GPU"].output_tokens_per_s
    assert two_stages["base"].output_tokens_per_s > 1.6 * alone
    assert two_stages["1,024 requests"].output_tokens_per_s > 1.9 * alone


def test_four_stages_reach_what_the_issue_asks_of_the_scheduler() -> None:
    base, variants = read(EXAMPLES / "simulate_h200x4.yaml")
    result = simulate(base)
    assert result.num_finished == 2048
    assert result.output_tokens_per_s > 36_000
    assert min(stage.busy_share for stage in result.stages) > 0.93
    assert result.output_tokens_per_s > 0.78 * 4 * simulate(variants["one GPU"]).output_tokens_per_s
