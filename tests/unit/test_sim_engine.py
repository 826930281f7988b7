"""Scripted costs and the engine that sleeps for them."""

from __future__ import annotations

import subprocess
import sys
import time

import pytest
from batches_for_tests import batch

from stagemesh.model.cost import CostModel, StepShape
from stagemesh.stage.engine.sim_engine import SimEngine
from stagemesh.wire.errors import ConfigError

SHAPE = StepShape(tokens=40, rows=10, prefill=30, context=1000)
STEP = batch([(0, 3, [0]), (7, 1, [1, 2])], 4)


def make_engine(cost: str, *, last: bool = True) -> SimEngine:
    return SimEngine(CostModel.parse(cost), rank=0, hidden_bytes=8, num_blocks=10, vocab_size=50, last=last)


@pytest.mark.parametrize(
    ("text", "nanoseconds"),
    [
        ("2ms", 2_000_000),
        ("2ms + 0.01ms*tokens", 2_400_000),
        ("1us*rows+2us * prefill", 70_000),
        ("1s + 1us*context", 1_001_000_000),
    ],
)
def test_a_cost_is_the_sum_of_its_terms(text: str, nanoseconds: int) -> None:
    assert CostModel.parse(text).nanoseconds(SHAPE) == nanoseconds


@pytest.mark.parametrize(
    "text", ["", "2", "2ms*", "2ms*layers", "ms", "2ms - 1ms", "2ms + ", "7200s", "9" * 400 + "s"]
)
def test_what_is_no_cost_is_refused_by_name(text: str) -> None:
    with pytest.raises(ConfigError, match="--cost"):
        CostModel.parse(text)


def test_a_step_ends_its_cost_after_its_arrival_or_the_step_before() -> None:
    engine = make_engine("20ms")
    arrived_ns = time.monotonic_ns()
    engine.run(STEP, arrived_ns=arrived_ns, tokens=None, hidden=None, debug_logits=False)
    engine.run(STEP, arrived_ns=arrived_ns, tokens=None, hidden=None, debug_logits=False)
    assert time.monotonic_ns() >= arrived_ns + 40_000_000
    # One that came long ago and finds the engine idle owes nothing any more.
    late = make_engine("20ms")
    late.run(STEP, arrived_ns=arrived_ns - 10**9, tokens=None, hidden=None, debug_logits=False)
    assert late._ended_ns == arrived_ns - 10**9 + 20_000_000


def test_tokens_follow_from_seed_and_position_alone() -> None:
    def run() -> list[int]:
        out = make_engine("1us").run(STEP, arrived_ns=0, tokens=None, hidden=None, debug_logits=False)
        assert out.tokens is not None
        return out.tokens.tolist()

    assert run() == run()
    assert all(0 <= token < 50 for token in run())


def test_an_inner_stage_hands_on_the_bytes_of_every_position() -> None:
    out = make_engine("1us", last=False).run(STEP, arrived_ns=0, tokens=None, hidden=None, debug_logits=False)
    assert out.tokens is None
    assert out.hidden is not None
    assert len(out.hidden) == 4 * 8


def test_it_needs_no_torch() -> None:
    code = "import sys, stagemesh.stage.engine.sim_engine, stagemesh.stage.worker.worker; print('torch' in sys.modules)"
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=60
    )
    assert done.stdout.strip() == "False"
