"""The simulator: schedules that can be worked out by hand, what-ifs, and what it refuses."""

from __future__ import annotations

from contextlib import redirect_stdout
from io import StringIO
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml

from stagemesh.client.cli._main import load_command
from stagemesh.model.cost import CostModel, StepShape
from stagemesh.router.scheduler import Scheduler
from stagemesh.router.simulate.load import Requests, draw
from stagemesh.router.simulate.pipeline import VirtualPipeline
from stagemesh.router.simulate.run import parse_changes, run_file
from stagemesh.router.simulate.simulation import Simulation, simulate, taken_at
from stagemesh.router.simulate.spec import Link, SimulationSpec, parse, read, variant
from stagemesh.wire.errors import ConfigError

NO_DELAYS = {"router": {"step": 0, "result": 0, "client": 0}, "link": {"latency": 0}, "ring": {"latency": 0}}
MS = 1_000_000


def spec(**keys: Any) -> SimulationSpec:
    """A small lane without delays, unless `keys` say otherwise."""
    values: dict[str, Any] = {
        "stages": {"count": 2, "cost": "10ms"},
        "load": {"arrivals": "at_once", "requests": 2, "prompt": {"fixed": 4}, "output": {"fixed": 5}},
        "lane": {"prefix_cache": False},
        **NO_DELAYS,
    }
    return parse(values | keys, "test")


def shape(rows: int = 1) -> StepShape:
    return StepShape(tokens=rows, rows=rows, prefill=0, context=0)


def test_steps_through_three_stages_worked_out_by_hand() -> None:
    costs = [CostModel.parse(text) for text in ("10ms", "20ms", "5ms")]
    links = [Link.model_validate({"latency": "1ms"}), Link.model_validate({"latency": "2ms"})]
    ring = Link.model_validate({"latency": "3ms"})
    pipeline = VirtualPipeline(costs, links, ring, position_bytes=0)
    first = pipeline.run(1, shape(), 4 * MS, 0)
    assert first.begins.tolist() == [4 * MS, 15 * MS, 37 * MS]
    assert first.ends.tolist() == [14 * MS, 35 * MS, 42 * MS]
    # The second comes while the first runs: stage 0 is free at 14, stage 1 at 35, stage 2 long before.
    second = pipeline.run(2, shape(), 6 * MS, 0)
    assert second.begins.tolist() == [14 * MS, 35 * MS, 57 * MS]
    assert second.free.tolist() == [14 * MS, 35 * MS, 42 * MS]
    # The third takes tokens of the first, which are on stage 0 at 42 + 3: it is free from 24 on.
    third = pipeline.run(3, shape(), 6 * MS, 1)
    assert third.begins.tolist() == [45 * MS, 56 * MS, 78 * MS]
    assert pipeline.busy_ns.tolist() == [30 * MS, 60 * MS, 15 * MS]


def test_the_recurrence_is_that_of_a_plain_loop() -> None:
    random = np.random.default_rng(3)
    costs = [CostModel.parse(f"{cost}us + {cost // 7}us*rows") for cost in random.integers(100, 9000, 7)]
    links = [Link.model_validate({"latency": f"{one}us", "bandwidth": "1MB/s"}) for one in range(1, 7)]
    pipeline = VirtualPipeline(costs, links, Link.model_validate({"latency": "5ms"}), position_bytes=100)
    free, sampled = [0] * 7, [0]
    for number in range(1, 200):
        one = shape(int(random.integers(1, 60)))
        arrival, source = int(random.integers(0, number * 4 * MS)), int(random.integers(0, number))
        times = pipeline.run(number, one, arrival, source)
        ready = sampled[source]
        for stage, cost in enumerate(costs):
            begin = max(ready, free[stage], arrival)
            free[stage] = begin + cost.nanoseconds(one)
            assert (times.begins[stage], times.ends[stage]) == (begin, free[stage])
            ready = free[stage] + (links[stage].nanoseconds(100 * one.tokens) if stage < 6 else 0)
        sampled.append(free[-1] + 5 * MS)


def test_two_streams_in_one_microbatch_leave_half_of_two_stages_idle() -> None:
    result = simulate(spec(lane={"prefix_cache": False, "max_in_flight": 1}))
    assert (result.num_finished, result.output_tokens, result.num_steps) == (2, 10, 5)
    assert result.virtual_s == pytest.approx(0.100)
    assert (result.ttft_ms.p50, result.inter_token_ms.p50) == pytest.approx((20, 20))
    assert [stage.bubble_share for stage in result.stages] == pytest.approx([0.5, 0.5])


def test_as_many_microbatches_as_stages_fill_them() -> None:
    load = {"arrivals": "at_once", "requests": 4, "prompt": {"fixed": 4}, "output": {"fixed": 200}}
    # A prompt a step, or they would share their first step and stay together.
    result = simulate(spec(load=load, stages={"count": 4, "cost": "10ms"}, lane={"step_tokens": 4}))
    assert all(stage.bubble_share < 0.05 for stage in result.stages)


def test_without_lookahead_the_router_is_waited_for() -> None:
    delays = {"router": {"step": "3ms", "result": "4ms", "client": 0}}
    lane = {"prefix_cache": False, "max_in_flight": 1}
    load = {"arrivals": "at_once", "requests": 1, "prompt": {"fixed": 4}, "output": {"fixed": 6}}
    plain = simulate(spec(**delays, load=load, lane=lane | {"lookahead": 0}))
    ahead = simulate(spec(**delays, load=load, lane=lane | {"lookahead": 1}))
    assert plain.inter_token_ms.p50 == pytest.approx(27)
    assert ahead.inter_token_ms.p50 == pytest.approx(20)


def test_a_step_that_follows_another_at_once_leaves_when_its_requests_are_put_in() -> None:
    load = {"arrivals": "at_once", "requests": 8, "prompt": {"fixed": 4}, "output": {"fixed": 1}}
    keys = {"stages": {"count": 2, "cost": "1ms"}, "load": load, "lane": {"step_tokens": 16}}
    for admit_ms, second_ms in ((0, 3.0), (2, 10.0)):
        result = simulate(spec(**keys, router={**NO_DELAYS["router"], "admit": f"{admit_ms}ms"}))
        assert result.num_steps == 2
        assert (result.ttft_ms.p50, result.ttft_ms.p99) == (pytest.approx((2 + second_ms) / 2), second_ms)


def test_it_runs_the_routers_scheduler() -> None:
    simulation = Simulation(spec())
    assert type(simulation.scheduler) is Scheduler
    assert Scheduler.__module__.startswith("stagemesh.router.scheduler")


def test_the_same_seed_gives_the_same_run_and_another_does_not() -> None:
    def run(seed: int) -> dict[str, Any]:
        load = {
            "rate": 20,
            "requests": 40,
            "prompt": {"lognormal": [100, 0.8]},
            "output": {"uniform": [1, 30]},
            "stops": 0.5,
            "seed": seed,
        }
        return simulate(spec(load=load)).as_dict() | {"real_s": 0}

    assert run(1) == run(1)
    assert run(1) != run(2)


def test_an_end_token_costs_ignored_rows_and_all_end() -> None:
    load = {"arrivals": "at_once", "requests": 6, "prompt": {"fixed": 8}, "output": {"fixed": 9}}
    stopped = simulate(spec(load=load | {"stops": 1.0}))
    foreseen = simulate(spec(load=load | {"stops": 0.0}))
    assert stopped.output_tokens == foreseen.output_tokens == 6 * 9
    assert stopped.num_ignored_rows > foreseen.num_ignored_rows == 0


def test_a_full_queue_refuses_and_little_memory_preempts() -> None:
    load = {"arrivals": "at_once", "requests": 46, "prompt": {"fixed": 30}, "output": {"fixed": 60}}
    lane = {"prefix_cache": False, "max_sequences": 8, "max_waiting": 20, "num_blocks": 40}
    result = simulate(spec(load=load, lane=lane))
    # Sixteen have slots and blocks at once.
    assert result.num_refused == 10
    assert result.num_finished == 36
    assert result.num_preemptions > 0


def test_what_all_memory_would_not_hold_is_refused_as_a_router_does() -> None:
    load = {"arrivals": "at_once", "requests": 9, "prompt": {"uniform": [8, 90]}, "output": {"fixed": 4}}
    result = simulate(parse({"stages": STAGES, "load": load, "lane": {"num_blocks": 2}}, "test"))
    assert result.num_refused > 0
    assert result.num_finished == 9 - result.num_refused > 0
    assert result.refused == {"ABOVE_KV_CAPACITY": result.num_refused}


def drawn(max_context: int, prompt: dict[str, Any], output: dict[str, Any], stops: float = 0.0) -> Requests:
    load = {"arrivals": "at_once", "requests": 200, "prompt": prompt, "output": output, "stops": stops}
    one = spec(load=load, lane={"max_context": max_context})
    return draw(one.load, one.lane)


def test_lengths_that_fit_the_context_are_simulated_as_they_are() -> None:
    whole = drawn(100, {"fixed": 90}, {"fixed": 10}, stops=1.0)
    assert (set(whole.prompts), set(whole.outputs), whole.num_cut) == ({90}, {10}, 0)
    request = whole.request(0)
    assert (len(request.prompt), request.max_tokens) == (90, 10)
    assert set(drawn(100, {"fixed": 2}, {"fixed": 98}).outputs) == {98}


def test_drawn_lengths_are_cut_to_the_context_and_counted() -> None:
    both, whole = (drawn(one, {"uniform": [10, 80]}, {"uniform": [20, 90]}) for one in (100, 1000))
    assert both.prompts.tolist() == whole.prompts.tolist()
    assert both.outputs.tolist() == np.minimum(whole.outputs, 100 - whole.prompts).tolist()
    assert both.num_cut == (whole.prompts + whole.outputs > 100).sum() > whole.num_cut == 0
    tail = drawn(100, {"lognormal": [60, 1.0]}, {"fixed": 5})
    assert (tail.prompts.max(), set(tail.outputs)) == (95, {5})
    assert tail.num_cut == (tail.prompts == 95).sum() > 0
    load = {"arrivals": "at_once", "requests": 9, "prompt": {"lognormal": [9000, 0]}, "output": {"fixed": 2}}
    assert simulate(spec(load=load)).as_dict()["num_cut"] == 9


def test_what_was_refused_or_cut_is_said(tmp_path: Path) -> None:
    load = {"arrivals": "at_once", "requests": 9, "prompt": {"lognormal": [9000, 0]}, "output": {"fixed": 2}}
    file = tmp_path / "mesh.yaml"
    file.write_text(yaml.safe_dump({"stages": STAGES, "load": load, "lane": {"num_blocks": 4}}))
    shown = StringIO()
    with redirect_stdout(shown):
        load_command("simulate").main(
            args=[str(file), "--what-if", "load.prompt={fixed: 8}"], standalone_mode=False
        )
    assert "as it is: refused: 9 ABOVE_KV_CAPACITY\n" in shown.getvalue()
    assert "as it is: 9 of 9 requests were longer than lane.max_context and cut\n" in shown.getvalue()
    assert "}: refused" not in shown.getvalue()
    assert "}: 9 of" not in shown.getvalue()


def test_a_load_of_nothing_takes_no_time() -> None:
    load = {"rate": 1, "duration": "0s", "prompt": {"fixed": 4}, "output": {"fixed": 3}}
    result = simulate(parse({"stages": STAGES, "load": load, "router": {"client": 0}}, "test"))
    assert (result.num_requests, result.stages[0].busy_share, result.stages[0].bubble_share) == (0, 0.0, 0.0)


def test_a_shared_prefix_is_found() -> None:
    load = {"rate": 2, "requests": 8, "prompt": {"fixed": 64}, "output": {"fixed": 2}, "shared_prefix": 48}
    assert simulate(spec(load=load, lane={})).cached_share == pytest.approx(7 / 8 * 48 / 64)
    assert simulate(spec(load=load | {"shared_prefix": 0}, lane={})).cached_share == 0


LAYERS = {
    "stages": {"count": 4},
    "layers": {"count": 10, "cost": "1ms", "head": "2ms", "step": "0.5ms"},
}


def test_layers_are_split_by_cost_and_the_head_counts() -> None:
    one = spec(**LAYERS)
    assert one.split == (3, 3, 3, 1)
    assert [cost.nanoseconds(shape()) for cost in one.costs] == [3_500_000, 3_500_000, 3_500_000, 3_500_000]
    uneven = spec(**LAYERS | {"stages": {"split": [2, 2, 2, 4]}})
    assert uneven.costs[-1].nanoseconds(shape()) == 6_500_000


def test_variants_change_the_keys_they_name(tmp_path: Path) -> None:
    content = {
        "stages": [{"cost": "1ms"}, {"cost": "2ms"}],
        "load": {"arrivals": "at_once", "requests": 1, "prompt": {"fixed": 4}, "output": {"fixed": 3}},
        "what_if": {"slow": {"stages.1.cost": "9ms", "link": {"latency": "7ms"}}},
    }
    file = tmp_path / "mesh.yaml"
    file.write_text(yaml.safe_dump(content))
    base, variants = read(file)
    assert [cost.nanoseconds(shape()) for cost in base.costs] == [MS, 2 * MS]
    assert [cost.nanoseconds(shape()) for cost in variants["slow"].costs] == [MS, 9 * MS]
    assert variants["slow"].link.latency == 7 * MS
    names = [result.name for result in run_file(file, ["link.latency=1s"])]
    assert names == ["as it is", "slow", "link.latency=1s"]
    kinds = variant(
        content, parse_changes("load.prompt={uniform: [1, 5]},load.output.uniform=[2, 6]"), "kinds"
    ).load
    assert (kinds.prompt.uniform, kinds.output.uniform) == ((1, 5), (2, 6))
    nested = variant(
        content, {"load": {"prompt": {"lognormal": [3, 1]}}, "load.output.uniform": [2, 9]}, "nested"
    )
    assert nested.load.prompt.lognormal == (3, 1)
    assert nested.load.requests == 1
    with pytest.raises(ConfigError, match=r"load\.prompt: expected one of fixed"):
        variant(content, {"load.prompt": {"fixed": 1, "uniform": [1, 5]}}, "two kinds")
    assert parse_changes("stages.split=[1, 2],link.latency=5ms") == {
        "stages.split": [1, 2],
        "link.latency": "5ms",
    }


LOAD = {"rate": 1, "requests": 1, "prompt": {"fixed": 4}, "output": {"fixed": 3}}
STAGES = {"count": 2, "cost": "1ms"}


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ({"load": LOAD}, "stages is missing"),
        ({"stages": STAGES}, "load is missing"),
        ({"stages": STAGES, "load": LOAD, "wink": 1}, "unknown key 'wink'"),
        ({"stages": STAGES, "load": LOAD | {"speed": 1}}, "unknown key 'load.speed'"),
        ({"stages": STAGES, "load": LOAD, "link": {"latency": "fast"}}, "link.latency: expected a duration"),
        (
            {"stages": STAGES, "load": LOAD, "link": {"bandwidth": "10"}},
            "link.bandwidth: expected a bandwidth",
        ),
        ({"stages": {"count": 2, "cost": "2 apples"}, "load": LOAD}, "stages.cost: '2 apples'"),
        ({"stages": {"count": 0, "cost": "1ms"}, "load": LOAD}, "stages.count"),
        ({"stages": [], "load": LOAD}, "stages: expected at least one"),
        ({"stages": [{"cost": "1ms"}, {"price": 1}], "load": LOAD}, r"stages.1.cost is missing"),
        ({"stages": {"count": 2}, "load": LOAD}, "stages.cost is missing"),
        ({"stages": {"split": [1, 2]}, "layers": {"count": 4, "cost": "1ms"}, "load": LOAD}, "expected 4"),
        ({"stages": {"count": 9}, "layers": {"count": 4, "cost": "1ms"}, "load": LOAD}, "there are 4 layers"),
        ({"stages": STAGES, "load": {**LOAD, "rate": None}}, "load: rate is missing"),
        ({"stages": STAGES, "load": {**LOAD, "requests": None}}, "load: requests or duration is missing"),
        ({"stages": STAGES, "load": {**LOAD, "prompt": {}}}, "load.prompt: expected one of fixed"),
        ({"stages": STAGES, "load": {**LOAD, "output": {"uniform": [5, 2]}}}, "load.output: uniform"),
        ({"stages": STAGES, "load": LOAD | {"rate": float("inf")}}, "load.rate: "),
        ({"stages": STAGES, "load": LOAD | {"rate": float("nan")}}, "load.rate: "),
        ({"stages": STAGES, "load": LOAD | {"requests": 10**12}}, "load.requests: "),
        (
            {"stages": STAGES, "load": {**LOAD, "rate": 1e9, "requests": None, "duration": "1h"}},
            "load: rate times duration is more than 10,000,000 requests",
        ),
        (
            {"stages": STAGES, "load": {**LOAD, "prompt": {"lognormal": [9, float("nan")]}}},
            "load.prompt: logn",
        ),
        ({"stages": STAGES, "load": LOAD | {"shared_prefix": 10**12}}, "load.shared_prefix: "),
        ({"stages": STAGES, "load": LOAD, "lane": {"num_blocks": 10**12}}, "lane.num_blocks: "),
        ({"stages": STAGES, "load": LOAD, "lane": {"max_context": 10**12}}, "lane.max_context: "),
        ({"stages": STAGES, "load": LOAD, "ring": {"latency": "9" * 30 + "h"}}, "ring.latency: .* a year"),
        ({"stages": STAGES, "load": LOAD, "link": {"bandwidth": "0.1B/s"}}, "link.bandwidth: .* a second"),
        (
            {"stages": {"count": 2, "cost": "9" * 400 + "s"}, "load": LOAD},
            "stages.cost: .* more than an hour",
        ),
        (
            {"stages": STAGES, "load": LOAD | {"prompt": {"fixed": 10000}}},
            "load.prompt: 10000 .* at most 8189",
        ),
        (
            {"stages": STAGES, "load": LOAD | {"output": {"fixed": 20000}}},
            "load.output: 20000 .* at most 8188",
        ),
        (
            {"stages": STAGES, "load": LOAD | {"prompt": {"uniform": [1, 95]}}, "lane": {"max_context": 97}},
            "load.prompt: 95 .* at most 94",
        ),
        ("nothing", "expected a mapping"),
    ],
)
def test_a_wrong_file_is_refused_by_its_key(content: Any, words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        parse(content, "mesh.yaml")


def test_a_wrong_variant_is_refused_by_its_name() -> None:
    with pytest.raises(ConfigError, match=r"what_if 'x': unknown key 'link.speed'"):
        variant({"stages": STAGES, "load": LOAD}, {"link.speed": 3}, "what_if 'x'")
    with pytest.raises(ConfigError, match="'7' is not an index below 1"):
        variant({"stages": [{"cost": "1ms"}], "load": LOAD}, {"stages.7.cost": "1ms"}, "x")
    with pytest.raises(ConfigError, match="is not KEY=VALUE"):
        parse_changes("link.latency")


def test_the_example_is_a_file_that_runs() -> None:
    example = Path(__file__).parents[2] / "examples/simulate.yaml"
    base, variants = read(example)
    assert sum(base.split) == 32
    small = base.model_copy(update={"load": base.load.model_copy(update={"requests": 30})})
    assert simulate(small).num_finished == 30
    assert len(variants) == 3


def test_a_burst_is_taken_in_whole_before_it_starts() -> None:
    arrivals = np.array([0, 0, 0, 10, 100])
    assert taken_at(arrivals, 0).tolist() == arrivals.tolist()
    assert taken_at(arrivals, 5).tolist() == [15, 15, 15, 20, 105]
