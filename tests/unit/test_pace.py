"""The cost model and what follows from it, in virtual time: nothing here is timed."""

from __future__ import annotations

import numpy as np
import pytest
from virtual_lane import Costs, VirtualLane, lane_limits

from stagemesh.router.config import RouterConfig
from stagemesh.router.lane.chain import Member
from stagemesh.router.lane.driving import SPARE_MICROBATCHES, depth_of, limits_of
from stagemesh.router.scheduler.cost_model import MIN_STEPS, CostModel, shape_of
from stagemesh.router.scheduler.pace import BURST, CHOICE_STEPS, Allowance
from stagemesh.router.scheduler.pipeline import Hops, PipelineTimes, choose_num_steps, cycle_s
from stagemesh.v1 import stage_pb2

MS = 1e-3
NO_WORK = np.zeros(0, np.int64)


def decode_lane(
    num_stages: int, costs: list[Costs] | Costs, *, streams: int = 64, lookahead: int = 1, **hops: float
) -> VirtualLane:
    """Streams that decode to the end of the run."""
    each = costs if isinstance(costs, list) else [costs] * num_stages
    lane = VirtualLane(lane_limits(num_stages, lookahead=lookahead), each, **hops)  # type: ignore[arg-type]
    for index in range(streams):
        lane.arrive(0.0, f"r{index}", 16, 5000)
    lane.run(8.0)
    return lane


def rate(lane: VirtualLane) -> float:
    """Tokens a second once it runs."""
    return lane.num_tokens(4.0, 8.0) / 4.0


# Cost model


def test_the_model_finds_the_terms_of_a_cost() -> None:
    generator = np.random.default_rng(1)
    model, truth = CostModel(2), np.array([4e-3, 2e-5, 1e-5, 1e-8, 3e-9])
    for _ in range(40):
        shapes = np.stack(
            [
                shape_of(
                    int(generator.integers(1, 200)),
                    int(generator.integers(100, 100_000)),
                    generator.integers(0, 4000, 2),
                    generator.integers(0, 400, 2),
                )
                for _ in range(10)
            ]
        )
        for stage, factor in enumerate((1.0, 3.0)):
            noise = generator.normal(1.0, 0.01, len(shapes))
            model.observe(stage, shapes, factor * (shapes @ truth) * noise)
    asked = shape_of(64, 30_000, np.array([1000]), np.array([256]))
    assert model.predict(asked) == pytest.approx([asked @ truth, 3 * (asked @ truth)], rel=0.02)


def test_what_was_never_told_apart_is_still_predicted() -> None:
    """Steps that are all alike: their own time is known, and no term is negative."""
    model = CostModel(1)
    shape = shape_of(16, 1600, NO_WORK, NO_WORK)
    model.observe(0, np.tile(shape, (MIN_STEPS, 1)), np.full(MIN_STEPS, 5 * MS))
    assert model.ready
    assert model.predict(shape) == pytest.approx([5 * MS], rel=1e-3)
    assert (model.coefficients >= 0).all()


def test_a_hiccup_is_not_a_cost_and_a_slower_stage_is_believed() -> None:
    model = CostModel(1)
    shape = shape_of(16, 1600, NO_WORK, NO_WORK)
    model.observe(0, np.tile(shape, (100, 1)), np.full(100, 5 * MS))
    model.observe(0, shape[None], np.array([2.0]))
    assert model.predict(shape)[0] < 5.5 * MS
    for _ in range(200):
        model.observe(0, np.tile(shape, (10, 1)), np.full(10, 10 * MS))
    assert model.predict(shape) == pytest.approx([10 * MS], rel=0.05)


def test_positions_within_a_budget_cost_it() -> None:
    model = CostModel(1)
    model._rows = [[0.0, 0.0, 1e-5, 1e-8, 1e-8]]
    few = [model.positions_within([4 * MS], start) for start in (0, 1000, 10_000, 50_000)]
    assert few == sorted(few, reverse=True)
    for start, count in zip((0, 1000, 10_000), few, strict=False):
        assert model.chunk_seconds(start, count)[0] == pytest.approx(4 * MS, rel=0.02)


def test_the_stage_with_least_left_bounds_a_chunk() -> None:
    model = CostModel(3)
    model._rows = [[1 * MS, 0.0, position_s, 0.0, 0.0] for position_s in (0.01 * MS, 0.04 * MS, 0.0)]
    assert model.positions_within([8 * MS, 4 * MS, 0.0], 0) == pytest.approx(100, abs=1)
    assert model.positions_within([1 * MS, 8 * MS, 0.0], 0) == pytest.approx(100, abs=1)
    assert model.positions_within([0.0, 8 * MS, 8 * MS], 0) == 0
    assert model.chunk_seconds(0, 100) == pytest.approx([1 * MS, 4 * MS, 0.0])


def test_positions_that_cost_nothing_fit_without_bound() -> None:
    model = CostModel(1)
    assert model.positions_within([0.0], 0) > 1_000_000


def test_a_later_chunk_is_a_block_or_the_rest_of_a_prompt_and_no_smaller() -> None:
    """It would read all the context before it for the sake of a few positions."""
    model = CostModel(1)
    model._rows = [[0.0, 0.0, 0.1 * MS, 0.0, 0.0]]
    left_s = [4.05 * MS]
    first = Allowance(model, left_s, floor=1, enough=16)
    assert first.most(0, 1000) == 40
    assert Allowance(model, [0.85 * MS], floor=1, enough=16).most(0, 1000) == 8, (
        "the first may be of any size"
    )
    for used, remaining, most in (
        (32, 1000, 0),
        (32, 9, 0),
        (32, 8, 8),
        (32, 3, 3),
        (24, 1000, 16),
        (24, 20, 16),
    ):
        allowance = Allowance(model, left_s, floor=1, enough=16)
        allowance.spend(0, used)
        assert allowance.most(0, remaining) == most, (used, remaining)


# Microbatches in flight


def test_a_cycle_is_bound_by_the_slowest_stage_the_ring_or_the_results() -> None:
    step = np.array([2 * MS, 3 * MS])
    assert cycle_s(step, 4, Hops(1 * MS, 1 * MS), 1) == pytest.approx(12 * MS)
    assert cycle_s(step, 1, Hops(1 * MS, 1 * MS), 1) == pytest.approx(6 * MS)
    assert cycle_s(step, 1, Hops(1 * MS, 15 * MS), 1) == pytest.approx(10 * MS)
    assert cycle_s(step, 1, Hops(1 * MS, 15 * MS), 0) == pytest.approx(20 * MS)


def test_fewer_steps_than_stages_where_one_stage_is_much_slower() -> None:
    """Small batches, whose head takes as long as everything else: two in flight keep it busy."""
    step_s = np.array([[1.0, 1.0, 1.0, 3.0 + 0.1 / count] for count in range(1, 7)]) * MS
    assert choose_num_steps(step_s, np.ones(6), 4, Hops(), 1) == 2


def test_more_steps_than_stages_where_hops_are_long() -> None:
    """Rows cost and the constant does not: smaller steps cost nothing and hide the hops."""
    step_s = np.array([[24 * MS / count] * 4 for count in range(1, 7)])
    assert choose_num_steps(step_s, np.ones(6), 4, Hops(ring=6 * MS), 1) >= 5


def test_a_small_gain_changes_nothing() -> None:
    for second_ms, chosen in ((4.95, 1), (4.5, 2)):
        step_s = np.array([[10 * MS], [second_ms * MS]])
        assert choose_num_steps(step_s, np.ones(2), 1, Hops(ring=0.1 * MS), 1) == chosen


def members(*, cores: int, threads: int, device: str = "cpu", count: int = 3) -> list[Member]:
    described = stage_pb2.DescribeResponse(
        host_id="one",
        num_cores=cores,
        threads_per_rank=threads,
        ranks=[stage_pb2.RankInfo(device=device)],
        num_blocks=100,
        block_size=16,
        max_slots=64,
        max_context=512,
    )
    return [Member(index, f"127.0.0.1:{index + 1}", described) for index in range(count)]


@pytest.mark.parametrize(("cores", "threads", "at_once"), [(2, 2, 1), (4, 2, 2), (6, 2, 3)])
def test_stages_that_share_cores_bound_what_is_in_flight(cores: int, threads: int, at_once: int) -> None:
    config = RouterConfig(model="m", stages=("127.0.0.1:1",))
    limits = limits_of(config, members(cores=cores, threads=threads))
    most = at_once if at_once < 3 else 3 + SPARE_MICROBATCHES
    assert (limits.num_microbatches, limits.max_microbatches) == (at_once, most)
    assert limits.depth == depth_of(most, config.lookahead) == most + 1
    assert limits.consecutive_blocks


def test_what_the_router_was_told_is_how_its_lane_is_driven() -> None:
    config = RouterConfig(
        model="m",
        stages=("a", "b", "c"),
        lookahead=3,
        prefix_cache=False,
        itl_target_ms=25.0,
        step_tokens=77,
        max_waiting=5,
        max_sequences=9,
    )
    limits = limits_of(config, members(cores=3, threads=1))
    assert (limits.lookahead, limits.prefix_cache, limits.itl_target_s) == (3, False, 0.025)
    assert (limits.step_tokens, limits.max_waiting, limits.max_slots) == (77, 5, 27)
    assert limits.depth == limits.max_microbatches * 3 + 1


def test_a_number_that_was_asked_for_is_kept() -> None:
    config = RouterConfig(model="m", stages=("127.0.0.1:1",), max_in_flight=2)
    limits = limits_of(config, members(cores=1, threads=1, device="cuda:0"))
    assert (limits.num_microbatches, limits.max_microbatches, limits.depth) == (2, 0, 3)
    assert not limits.consecutive_blocks


@pytest.mark.parametrize("num_stages", [1, 2, 4, 8])
def test_a_pipeline_does_the_work_of_its_stages(num_stages: int) -> None:
    """64 streams; what is lost is the hops and nothing else."""
    step = 8 * MS
    lane = decode_lane(
        num_stages, Costs(constant=step), hop_s=0.2 * MS, control_s=0.2 * MS, answer_s=0.4 * MS
    )
    ring = num_stages * 0.2 * MS if num_stages > 1 else 0.0
    assert rate(lane) == pytest.approx(64 / (num_stages * step + ring), rel=0.01)
    state = lane.scheduler.pace.state()
    assert state.num_microbatches == num_stages
    assert state.step_s == pytest.approx([step] * num_stages, rel=0.01)


def test_a_slow_stage_costs_what_it_is_slower_and_is_named() -> None:
    costs = [Costs(constant=8 * MS), Costs(constant=12 * MS), Costs(constant=8 * MS), Costs(constant=8 * MS)]
    lane = decode_lane(4, costs, hop_s=0.2 * MS, control_s=0.2 * MS, answer_s=0.4 * MS)
    state = lane.scheduler.pace.state()
    assert state.limiting_stage == 1
    cycle = cycle_s(np.array(state.step_s), state.num_microbatches, Hops(state.ring_s, state.trip_s), 1)
    # Three steps in flight keep the slow stage busy: all of 64 run every 36.8 ms, where four would take 48.
    assert state.num_microbatches == 3
    assert rate(lane) == pytest.approx(64 / cycle, rel=0.02)


def test_hops_are_found_whatever_the_stages_clocks_say() -> None:
    costs = [Costs(constant=3 * MS)] * 3
    limits = lane_limits(3)
    lanes = [
        VirtualLane(limits, costs, hop_s=1 * MS, control_s=1 * MS, answer_s=2 * MS, clock_offsets_s=offsets)
        for offsets in ((), (5.0, 900.0, 20.0))
    ]
    for lane in lanes:
        for index in range(12):
            lane.arrive(0.0, f"r{index}", 4, 500)
        lane.run(2.0)
        state = lane.scheduler.pace.state()
        assert state.ring_s == pytest.approx(3 * MS, rel=0.05)
        assert state.trip_s == pytest.approx(5 * MS, rel=0.1)


@pytest.mark.parametrize("polluted_share", [0.0, 0.3, 0.8])
def test_a_hop_that_was_held_up_does_not_change_the_number_in_flight(polluted_share: float) -> None:
    """Two stages that keep each other busy with two steps in flight; a hop that stood in a queue looks long."""
    step_ns, hop_ns, queue_ns = 10_000_000, 100_000, 30_000_000
    times, generator = PipelineTimes(2), np.random.default_rng(3)
    numbers, num_steps = np.arange(1, 201), 200
    for number in numbers.tolist():
        times.sent(number, shape_of(32, 3200, NO_WORK, NO_WORK), max(number - 2, 0), number * 0.01)
    late = np.where(generator.random((num_steps, 2)) < polluted_share, queue_ns, 0)
    begins = np.zeros((num_steps, 2), np.int64)
    for index in range(num_steps):
        sampled = begins[index - 2, 1] + step_ns if index >= 2 else 0
        begins[index, 0] = sampled + hop_ns + late[index, 0]
        begins[index, 1] = begins[index, 0] + step_ns + hop_ns + late[index, 1]
    for stage in range(2):
        report = np.zeros((num_steps, 6), np.int64)
        report[:, 0], report[:, 2], report[:, 4] = begins[:, stage], 1000, step_ns
        report[:, 0] -= 1000
        times.reported(stage, numbers, report)
    hops = times.hops()
    assert hops.ring == pytest.approx(0.2 * MS, rel=0.01)
    step_s = np.array([[5 * MS + 10 * MS / count] * 2 for count in range(1, 5)])
    clean = choose_num_steps(step_s, np.ones(4), 2, Hops(ring=0.2 * MS), 1)
    assert choose_num_steps(step_s, np.ones(4), 2, hops, 1) == clean == 2
    assert (hops.usual_ring > 10 * MS) == (polluted_share > 0)


# Lookahead


@pytest.fixture(scope="module")
def delayed() -> dict[tuple[int, float], VirtualLane]:
    """Four stages of 8 ms, without and with 50 ms of delay on the results alone."""
    return {
        (lookahead, delay): decode_lane(
            4,
            Costs(constant=8 * MS),
            lookahead=lookahead,
            hop_s=0.2 * MS,
            control_s=0.2 * MS,
            answer_s=0.4 * MS + delay,
        )
        for lookahead in (0, 2, 3)
        for delay in (0.0, 50 * MS)
    }


@pytest.mark.parametrize("lookahead", [2, 3])
def test_lookahead_that_is_deep_enough_hides_late_results(
    lookahead: int, delayed: dict[tuple[int, float], VirtualLane]
) -> None:
    assert rate(delayed[lookahead, 50 * MS]) > 0.97 * rate(delayed[lookahead, 0.0])


def test_without_lookahead_late_results_cost_what_is_predicted(
    delayed: dict[tuple[int, float], VirtualLane],
) -> None:
    lane = delayed[0, 50 * MS]
    # Through the stages, two of three hops and to the first, and the result's way back.
    expected = 64 / (4 * 8 * MS + 4 * 0.2 * MS + 0.4 * MS + 50 * MS)
    assert rate(lane) == pytest.approx(expected, rel=0.02)
    assert 64 / lane.scheduler.pace.state().cycle_s == pytest.approx(expected, rel=0.02)


# Equal steps, and prefill


def test_steps_cost_the_same_and_do_not_hold_the_same_count() -> None:
    """A few streams have much more context than the others, and cells cost."""
    costs = Costs(constant=1 * MS, row=0.01 * MS, cell=0.2e-6)
    lane = VirtualLane(lane_limits(2), [costs] * 2, hop_s=0.1 * MS)
    for index in range(40):
        lane.arrive(0.0, f"r{index}", 6000 if index < 5 else 100, 3000)
    lane.run(20.0)
    seconds, counts = [], []
    for step in lane.steps[-40:]:
        positions = np.array([len(one.request.prompt) + one.num_generated for one in step.sequences])
        seconds.append(costs.of(step, positions))
        counts.append(len(step.slots))
    assert max(seconds) / min(seconds) < 1.1
    assert max(counts) > min(counts)


def test_one_with_much_context_goes_with_few_others() -> None:
    """It reads as many cells as the rest together: dealt by count, one step would cost twice the other."""
    costs = Costs(constant=0.2 * MS, row=0.01 * MS, cell=0.5e-6)
    lane = VirtualLane(lane_limits(2, max_microbatches=0), [costs] * 2, hop_s=0.1 * MS)
    lane.arrive(0.0, "much", 6000, 2000)
    for index in range(20):
        lane.arrive(0.0, f"r{index}", 200, 2000)
    lane.run(6.0)
    alone = [
        len(step.slots)
        for step in lane.steps[-40:]
        if any(one.request.request_id == "much" for one in step.sequences)
    ]
    assert alone
    assert max(alone) < 8


def test_rows_that_cost_next_to_nothing_are_dealt_by_number() -> None:
    """A row costs less than the context of another, and all of it together nothing beside what any step takes."""
    costs = Costs(constant=8 * MS, row=0.1e-6, cell=0.01e-6)
    lane = VirtualLane(lane_limits(2, max_microbatches=0), [costs] * 2, hop_s=0.1 * MS)
    for index in range(40):
        lane.arrive(0.0, f"r{index}", 6000 if index < 4 else 100, 3000)
    for index in range(10):  # that end: rows of one number say nothing of what a row costs
        lane.arrive(0.0, f"short{index}", 100, 50 + 20 * index)
    lane.run(20.0)
    coefficients = lane.scheduler.pace.costs.coefficients[0]
    assert coefficients[3] * 6000 > 100 * coefficients[1], "context is no more than rows: this shows nothing"
    assert {len(step.slots) for step in lane.steps[-40:]} <= set(range(18, 23))


def mixed_lane(costs: Costs, **fields: object) -> VirtualLane:
    """64 streams decode when prompts of 4,000 tokens come, four a second."""
    lane = VirtualLane(lane_limits(4, **fields), [costs] * 4, hop_s=0.2 * MS, answer_s=0.4 * MS)  # type: ignore[arg-type]
    for index in range(64):
        lane.arrive(0.0, f"r{index}", 100, 4000)
    for index in range(40):
        lane.arrive(5.0 + index / 4, f"long{index}", 4000, 20)
    lane.run(15.0)
    return lane


def test_a_chunk_with_much_context_behind_it_is_smaller() -> None:
    costs = Costs(constant=3 * MS, row=0.05 * MS, position=0.02 * MS, cell=0.5e-6)
    lane = mixed_lane(costs)
    chunks: dict[str, list[tuple[int, int]]] = {}
    for step in lane.steps:
        for sequence, count in zip(
            step.sequences[step.num_decodes :], step.counts[step.num_decodes :], strict=True
        ):
            done = chunks.setdefault(sequence.request.request_id, [])
            done.append((sum(one for _, one in done), int(count)))
    alone = [done for name, done in chunks.items() if name.startswith("long") and len(done) > 4]
    assert alone
    early = np.mean([count for done in alone for start, count in done[:-1] if start < 1000])
    late = np.mean([count for done in alone for start, count in done[:-1] if start > 3000])
    assert late < early
    assert all(sum(count for _, count in done) <= 4000 for done in alone)


def test_long_prompts_do_not_stall_those_that_decode() -> None:
    costs = Costs(constant=3 * MS, row=0.05 * MS, position=0.02 * MS)
    lane = mixed_lane(costs)
    streams = [np.diff(lane.token_times[f"r{index}"]) for index in range(64)]
    quiet = np.median(
        np.concatenate(
            [np.diff([at for at in lane.token_times[f"r{index}"] if 2 < at < 5]) for index in range(64)]
        )
    )
    assert max(float(one[50:].max()) for one in streams) < 5 * quiet
    assert len(lane.token_times["long0"]) == 20


@pytest.mark.parametrize("target_ms", [22.0, 26.0])
def test_an_inter_token_target_is_held_by_holding_back_prefill(target_ms: float) -> None:
    costs = Costs(constant=3 * MS, row=0.05 * MS, position=0.02 * MS)
    free, held = mixed_lane(costs), mixed_lane(costs, itl_target_s=target_ms * MS)
    loaded = [lane.intervals(since=6.5) for lane in (free, held)]
    assert np.percentile(loaded[0], 95) > target_ms * MS, "the target is no bound: this shows nothing"
    assert np.percentile(loaded[1], 95) <= target_ms * MS
    # The router's own figure is of a sample of the rows.
    assert held.scheduler.pace.state().itl_p95_s == pytest.approx(
        np.percentile(held.intervals(since=5.0), 95), rel=0.03
    )


@pytest.mark.parametrize("num_microbatches", [1, 6])
def test_a_token_waits_for_all_steps_in_flight_or_for_all_stages_that_it_passes(
    num_microbatches: int,
) -> None:
    """Whichever are more are to keep within the target as predicted: what is measured comes too late for the first."""
    target_s = 120 * MS
    limits = lane_limits(
        4, max_microbatches=0, num_microbatches=num_microbatches, itl_target_s=target_s, step_tokens=100_000
    )
    lane = VirtualLane(limits, [Costs(constant=2 * MS, position=0.02 * MS)] * 4)
    for index in range(12):
        lane.arrive(0.0, f"r{index}", 16, 5000)
    lane.arrive(1.0, "prompt", 500, 1)
    lane.run(2.0)
    pace, rows = lane.scheduler.pace, 12 // num_microbatches
    pace.running(12, 1200, 1, 90_000)
    count = pace.allowance(rows, 100 * rows).most(0, 90_000)
    step_s = pace.costs.predict(shape_of(rows, 100 * rows, np.array([0]), np.array([count])))
    assert 0.5 * target_s < cycle_s(step_s, num_microbatches, Hops(), 1) <= target_s


def test_what_is_not_predicted_counts_against_the_target_all_the_same() -> None:
    """Without lookahead every token waits for the router too, which no hop of the ring shows."""
    costs = Costs(constant=3 * MS, row=0.05 * MS, position=0.02 * MS)
    limits = lane_limits(4, lookahead=0, itl_target_s=34 * MS)
    lane = VirtualLane(limits, [costs] * 4, hop_s=0.2 * MS, control_s=4 * MS, answer_s=8 * MS)
    for index in range(64):
        lane.arrive(0.0, f"r{index}", 100, 4000)
    for index in range(40):
        lane.arrive(5.0 + index / 4, f"long{index}", 4000, 20)
    lane.run(15.0)
    assert np.percentile(lane.intervals(since=6.5), 95) <= 34 * MS


def test_a_target_that_leaves_room_costs_prompts_little() -> None:
    """It could be held with half of what prefill there is in a step: nobody should wait for seconds."""
    costs = Costs(constant=4 * MS, row=0.02 * MS, position=0.01 * MS)
    first_token_s = {}
    for target_ms in (0.0, 22.0):
        limits = lane_limits(4, itl_target_s=target_ms * MS)
        lane = VirtualLane(limits, [costs] * 4, hop_s=0.3 * MS, control_s=0.3 * MS, answer_s=0.4 * MS)
        for index in range(48):
            lane.arrive(0.0, f"r{index}", 64, 1800)
        came = {f"prompt{index}": 4.0 + index * 0.2 for index in range(90)}
        for index, (name, when) in enumerate(came.items()):
            lane.arrive(when, name, 500 + index * 377 % 1500, 20)
        lane.run(30.0)
        first_token_s[target_ms] = np.median(
            [lane.token_times[name][0] - when for name, when in came.items()]
        )
    assert np.percentile(lane.intervals(since=6.0), 95) <= 22 * MS
    assert first_token_s[22.0] < 5 * first_token_s[0.0]


def test_a_target_that_decodes_alone_missed_is_not_held_against_later_prompts() -> None:
    costs = Costs(constant=4 * MS, row=0.1 * MS, position=0.01 * MS)
    limits = lane_limits(4, itl_target_s=24 * MS)
    lane = VirtualLane(limits, [costs] * 4, hop_s=0.3 * MS, control_s=0.3 * MS, answer_s=0.4 * MS)
    for index in range(108):
        lane.arrive(0.0, f"r{index}", 16, 300 if index < 100 else 1500)
    came = {f"prompt{index}": 12.0 + index / 4 for index in range(30)}
    for name, when in came.items():
        lane.arrive(when, name, 1500, 8)
    lane.run(40.0)
    alone = np.diff(lane.token_times["r0"])
    assert np.median(alone) > 24 * MS, "the target was kept: this shows nothing"
    assert np.median([lane.token_times[name][0] - when for name, when in came.items()]) < 1.0


def test_a_target_that_cannot_be_held_does_not_starve_prefill() -> None:
    costs = Costs(constant=3 * MS, row=0.05 * MS, position=0.02 * MS)
    lane = mixed_lane(costs, itl_target_s=1 * MS)
    done = sum(len(times) == 20 for name, times in lane.token_times.items() if name.startswith("long"))
    assert done > 2


def test_a_burst_after_a_trickle_keeps_every_stage_busy_at_once() -> None:
    """What a few streams were best served with is not what a burst waits for to be looked at again."""
    costs = [Costs(constant=time, row=0.01 * MS, position=0.011 * MS) for time in (3 * MS, 3.6 * MS)]
    lane = VirtualLane(
        lane_limits(2, step_tokens=4096), costs, hop_s=0.1 * MS, control_s=0.3 * MS, answer_s=0.3 * MS
    )
    lane.arrive(0.0, "first", 16, 500)
    lane.run(2.4)
    assert lane.scheduler.pace.num_microbatches == 1
    began, busy, start = len(lane.steps), lane.busy_s.copy(), lane.now
    for index in range(256):
        lane.arrive(start, f"r{index}", 512, 64)
    lane.run(start + 1.0)
    assert len(lane.steps) - began < 40
    assert (lane.busy_s - busy).min() > 0.9


def trickle(times_ms: tuple[float, ...], **costs: float) -> VirtualLane:
    """One stream, for which one step in flight is best, and the number in flight has just been looked at."""
    each = [Costs(constant=time * MS, **costs) for time in times_ms]
    lane = VirtualLane(lane_limits(len(each)), each, hop_s=0.1 * MS, control_s=0.3 * MS, answer_s=0.3 * MS)
    lane.arrive(0.0, "first", 16, 5000)
    lane.run(2.4)
    assert lane.scheduler.pace.num_microbatches == 1
    assert len(lane.steps) % CHOICE_STEPS < 4, "it will soon be looked at anyhow: this shows nothing"
    return lane


@pytest.mark.parametrize("position_ms", [0.011, 0.0001])
def test_a_burst_is_looked_at_by_the_steps_it_will_fill(position_ms: float) -> None:
    """Before one of them has run; and however little its positions cost, the more steps the more of them are done."""
    lane = trickle((3, 3.6), row=0.01 * MS, position=position_ms * MS)
    busy, start = lane.busy_s.copy(), lane.now
    for index in range(64):
        lane.arrive(start, f"r{index}", 8000, 64)
    lane.run(start + 0.2)
    assert (lane.busy_s - busy).max() > 0.95 * 0.2


def test_a_burst_does_not_bring_more_steps_where_a_target_bounds_what_they_carry() -> None:
    """The prompts it has cannot fill more: more of them would only be smaller, and make every token wait for longer."""
    costs = [Costs(constant=time * MS, row=0.05 * MS, position=0.02 * MS) for time in (2, 8, 2, 2)]
    limits = lane_limits(4, itl_target_s=30 * MS)
    lane = VirtualLane(limits, costs, hop_s=0.1 * MS, control_s=0.3 * MS, answer_s=0.3 * MS)
    for index in range(8):
        lane.arrive(0.0, f"stream{index}", 16, 5000)
    for index in range(40):
        lane.arrive(2.4, f"r{index}", 2000, 4)
    lane.run(5.4)
    assert lane.scheduler.backlog > BURST * limits.step_tokens * limits.max_microbatches, (
        "it is no burst any more"
    )
    assert np.percentile(lane.intervals(since=2.6), 95) <= 30 * MS


def test_many_streams_where_there_was_one_are_looked_at_at_once() -> None:
    lane = trickle((3, 3.6), row=0.02 * MS, position=0.001 * MS)
    busy, start, began = lane.busy_s.copy(), lane.now, len(lane.steps)
    for index in range(200):
        lane.arrive(start, f"r{index}", 16, 20)
    lane.run(start + 0.1)
    assert (lane.busy_s - busy).max() > 0.95 * 0.1
    assert len(lane.steps) - began < CHOICE_STEPS - 4


def test_a_few_streams_that_are_left_of_many_are_looked_at_at_once() -> None:
    """They run as fast as before the many came, which had three steps in flight: with these they would take half again
    as long."""
    costs = [Costs(constant=time * MS, row=0.1 * MS, position=0.001 * MS) for time in (2, 8, 2, 2)]
    lane = VirtualLane(lane_limits(4), costs, hop_s=0.1 * MS, control_s=0.3 * MS, answer_s=0.3 * MS)
    for index in range(4):
        lane.arrive(0.0, f"stream{index}", 16, 5000)
    lane.run(2.4)
    before = np.median(lane.intervals(since=2.0))
    for index in range(200):
        lane.arrive(2.4, f"r{index}", 16, 34)
    lane.run(3.5)
    assert lane.scheduler.pace.num_microbatches == 3
    when = 3.5
    while lane.scheduler.num_running > 4:
        when += 0.01
        lane.run(when)
    began = len(lane.steps)
    lane.run(when + 0.15)
    assert np.median(lane.intervals(since=when + 0.03)) < 1.1 * before
    assert began // CHOICE_STEPS == len(lane.steps) // CHOICE_STEPS, (
        "it was looked at anyhow: this shows nothing"
    )


def test_what_a_burst_was_best_served_with_is_not_kept_when_it_is_over() -> None:
    """The few that stream beside it go on as fast as before it, though most of the last steps were full of prompts."""
    costs = [Costs(constant=time * MS, row=0.05 * MS, position=0.02 * MS) for time in (2, 8, 2, 2)]
    lane = VirtualLane(lane_limits(4), costs, hop_s=0.1 * MS, control_s=0.3 * MS, answer_s=0.3 * MS)
    for index in range(8):
        lane.arrive(0.0, f"stream{index}", 16, 5000)
    lane.run(2.4)
    before = np.median(lane.intervals(since=2.0))
    for index in range(24):
        lane.arrive(2.4, f"r{index}", 1000, 1)
    lane.run(2.6)
    assert lane.scheduler.pace.num_microbatches > 4, "it was served no other way: this shows nothing"
    when = 2.6
    while lane.scheduler.backlog:
        when += 0.01
        lane.run(when)
    over = when + 0.05
    lane.run(over + 0.25)
    assert np.median(lane.intervals(since=over)) < 1.1 * before


def test_a_burst_of_prompts_that_cost_next_to_nothing_is_not_dealt_over_many_steps() -> None:
    lane = VirtualLane(
        lane_limits(2), [Costs(constant=8 * MS, position=0.0015 * MS)] * 2, hop_s=0.1 * MS, answer_s=0.3 * MS
    )
    for index in range(16):
        lane.arrive(0.0, f"before{index}", 16, 50)
    lane.run()
    assert lane.scheduler.pace.costs.ready
    began, start = len(lane.steps), lane.now
    for index in range(64):
        lane.arrive(start, f"r{index}", 16, 50)
    lane.run()
    admitted = [len(step.changes.admitted) for step in lane.steps[began:]]
    assert admitted[:3] == [32, 32, 0]


def test_while_nobody_has_had_a_token_prompts_need_not_wait_for_even_steps() -> None:
    costs = Costs(constant=2 * MS, row=0.02 * MS, position=0.01 * MS)
    lane = VirtualLane(lane_limits(4), [costs] * 4, hop_s=0.1 * MS, answer_s=0.3 * MS)
    for index in range(16):
        lane.arrive(0.0, f"before{index}", 16, 50)
    lane.run()
    began, start = len(lane.steps), lane.now
    for index in range(96):
        lane.arrive(start, f"r{index}", 16, 50)
    lane.arrive(start + 30 * MS, "late", 16 * 96, 50)
    lane.run()
    assert [len(step.changes.admitted) for step in lane.steps[began:]][:3] == [32, 32, 32]
    late = [step for step in lane.steps if any(one.request.request_id == "late" for one in step.sequences)]
    assert late[0].num_tokens < 512, "now others stream"


@pytest.mark.parametrize(
    "of_prefill", [{"position": 0.0175 * MS}, {"pair": 0.0175 / 64 * MS}], ids=["positions", "pairs"]
)
def test_a_burst_is_dealt_over_few_steps_where_no_other_stage_could_wait(
    of_prefill: dict[str, float],
) -> None:
    """Each step more costs what any step costs, before every answer's end; the costs are those of an 8B model on a GPU.
    Of prompts of about one length nobody can tell positions from pairs: noise decides which the model takes them for."""
    costs = Costs(constant=5.8 * MS, row=0.009 * MS, **of_prefill)
    lane = VirtualLane(lane_limits(1, max_slots=256, step_tokens=8192), [costs])
    for begins in (0.0, 4.0):
        for index in range(64):
            lane.arrive(begins + index * 0.3 * MS, f"at{begins}-{index}", 112 + index % 32, 161)
    lane.run(8.0)
    ends = [lane.token_times[f"at4.0-{index}"][-1] for index in range(64)]
    steps = 160 * (5.8 + 64 * 0.009) * MS
    prefill = 64 * 128 * 0.0175 * MS
    assert max(ends) - 4.0 < 1.13 * (steps + prefill)


@pytest.mark.parametrize(("num_stages", "num_microbatches"), [(4, 3), (8, 7), (4, 5)])
def test_rows_that_do_not_divide_evenly_all_get_on_alike(num_stages: int, num_microbatches: int) -> None:
    limits = lane_limits(num_stages, max_microbatches=0, num_microbatches=num_microbatches)
    lane = VirtualLane(limits, [Costs(constant=2 * MS)] * num_stages, hop_s=0.1 * MS, answer_s=0.2 * MS)
    for index in range(64):
        lane.arrive(0.0, f"r{index}", 16, 5000)
    lane.run(8.0)
    counts = [len(times) for times in lane.token_times.values()]
    assert min(counts) >= max(counts) - 4
