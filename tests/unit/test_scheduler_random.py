"""The scheduler under random events: whatever comes in whatever order, every answer is the model's."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace

import numpy as np
from hypothesis import HealthCheck, note, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule
from scheduled_lane import ScheduledLane, make_limits, make_request

MAX_REQUESTS = 25


class SchedulerMachine(RuleBasedStateMachine):
    """submit, abort, steps and late results in any order."""

    def __init__(self) -> None:
        super().__init__()
        self.lane = ScheduledLane(make_limits())

    @initialize(
        num_blocks=st.sampled_from([8, 12, 20, 200]),
        max_slots=st.sampled_from([1, 2, 8]),
        step_tokens=st.sampled_from([1, 3, 8, 64]),
        num_microbatches=st.integers(1, 4),
        lookahead=st.integers(0, 3),
        depth=st.integers(1, 6),
        adaptive=st.booleans(),
        itl_target_s=st.sampled_from([0.0, 0.02]),
    )
    def start(
        self,
        num_blocks: int,
        max_slots: int,
        step_tokens: int,
        num_microbatches: int,
        lookahead: int,
        depth: int,
        adaptive: bool,
        itl_target_s: float,
    ) -> None:
        limits = make_limits(
            num_blocks=num_blocks,
            max_blocks=num_blocks,
            max_slots=max_slots,
            step_tokens=step_tokens,
            num_microbatches=num_microbatches,
            lookahead=lookahead,
            depth=depth,
            num_stages=2,
            max_microbatches=4 if adaptive else 0,
            itl_target_s=itl_target_s,
        )
        note(str(limits))
        self.lane = ScheduledLane(limits)

    @precondition(lambda self: len(self.lane.requests) < MAX_REQUESTS)
    @rule(
        length=st.integers(1, 20),
        tokens=st.integers(1, 20),
        stops=st.booleans(),
        priority=st.integers(-1, 1),
        lifetime=st.none() | st.floats(0.0, 2.0),
    )
    def submit(self, length: int, tokens: int, stops: bool, priority: int, lifetime: float | None) -> None:
        tokens = min(tokens, self.lane.limits.num_blocks * 4 - length + 1)
        name = f"r{len(self.lane.requests)}"
        request = make_request(name, length, tokens, stops=stops, priority=priority)
        if lifetime is not None:
            request = replace(request, deadline=self.lane.now + lifetime)
        self.lane.submit(request)

    @precondition(lambda self: self.lane.scheduler.live)
    @rule(data=st.data())
    def abort(self, data: st.DataObject) -> None:
        names = [sequence.request.request_id for sequence in self.lane.scheduler.live]
        self.lane.abort(data.draw(st.sampled_from(names)))

    @rule(count=st.integers(1, 6))
    def form_steps(self, count: int) -> None:
        for _ in range(count):
            self.lane.step()

    @rule(seconds=st.floats(0.0, 1.0))
    def time_passes(self, seconds: float) -> None:
        self.lane.now += seconds
        self.lane.expire()

    @rule(
        stage=st.integers(0, 1),
        milliseconds=st.lists(st.floats(0.0, 50.0), min_size=6, max_size=6),
        count=st.integers(1, 12),
    )
    def report(self, stage: int, milliseconds: list[float], count: int) -> None:
        """Times that make no sense together: what is learnt may be wrong, and must not do harm."""
        numbers = np.array([step.number for step in self.lane.steps[-count:]], np.int64)
        times_ns = np.tile(np.array(milliseconds) * 1e6, (len(numbers), 1)).astype(np.int64)
        self.lane.scheduler.take_timings(stage, numbers, times_ns)

    @precondition(lambda self: self.lane.in_flight)
    @rule()
    def take_result(self) -> None:
        self.lane.result()

    @rule(count=st.integers(1, 8))
    def go_on(self, count: int) -> None:
        for _ in range(count):
            if self.lane.step() is None and self.lane.in_flight:
                self.lane.result()

    @invariant()
    def counts_add_up(self) -> None:
        scheduler = self.lane.scheduler
        live = len(self.lane.requests) - len(self.lane.finished)
        assert scheduler.num_running + scheduler.num_waiting == live == len(scheduler.live)
        assert scheduler.num_running <= self.lane.limits.max_slots
        assert 0 <= scheduler.pool.num_free <= scheduler.pool.num_blocks

    @invariant()
    def blocks_are_owned_by_those_that_run(self) -> None:
        """By one sequence each, unless it is shared for its prefix; what nobody's table has is free."""
        scheduler = self.lane.scheduler
        slots = scheduler.running.slots
        owned: Counter[int] = Counter()
        for sequence in scheduler.live:
            if sequence.slot >= 0:
                table = slots.tables[sequence.slot, : slots.num_blocks[sequence.slot]].tolist()
                assert len(set(table)) == len(table)
                owned.update(table)
        assert scheduler.pool.num_free == scheduler.pool.num_blocks - len(owned)
        assert all(scheduler.pool._owners[block] == count for block, count in owned.items())

    @invariant()
    def the_backlog_is_what_is_left_of_prompts(self) -> None:
        scheduler = self.lane.scheduler
        left = 0
        for sequence in scheduler.live:
            done = int(scheduler.running.slots.position[sequence.slot]) if sequence.slot >= 0 else 0
            left += max(len(sequence.to_prefill) - done, 0)
        assert scheduler.backlog == left
        # What waits beyond the free slots and blocks cannot start, whatever steps may carry.
        waiting = sorted((one for one in scheduler.live if one.slot < 0), key=lambda one: one.waits_before)
        blocks = np.cumsum([len(one.to_prefill) // scheduler.limits.block_size + 1 for one in waiting])
        slots = len(scheduler.running.slots.free)
        room = min(slots, int(np.searchsorted(blocks, scheduler.pool.num_free, side="right")))
        assert scheduler._at_hand()[1] == left - sum(len(one.to_prefill) for one in waiting[room:])

    def teardown(self) -> None:
        self.lane.run_to_end()
        self.lane.check_end()


TestScheduler = SchedulerMachine.TestCase
TestScheduler.settings = settings(
    max_examples=120, stateful_step_count=40, deadline=None, suppress_health_check=list(HealthCheck)
)
