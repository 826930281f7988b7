"""The scheduler under random events: whatever comes in whatever order, every answer is the model's."""

from __future__ import annotations

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
    )
    def start(
        self,
        num_blocks: int,
        max_slots: int,
        step_tokens: int,
        num_microbatches: int,
        lookahead: int,
        depth: int,
    ) -> None:
        limits = make_limits(
            num_blocks=num_blocks,
            max_blocks=num_blocks,
            max_slots=max_slots,
            step_tokens=step_tokens,
            num_microbatches=num_microbatches,
            lookahead=lookahead,
            depth=depth,
        )
        note(str(limits))
        self.lane = ScheduledLane(limits)

    @precondition(lambda self: len(self.lane.requests) < MAX_REQUESTS)
    @rule(
        length=st.integers(1, 20), tokens=st.integers(1, 20), stops=st.booleans(), priority=st.integers(-1, 1)
    )
    def submit(self, length: int, tokens: int, stops: bool, priority: int) -> None:
        tokens = min(tokens, self.lane.limits.num_blocks * 4 - length + 1)
        name = f"r{len(self.lane.requests)}"
        self.lane.submit(make_request(name, length, tokens, stops=stops, priority=priority))

    @precondition(lambda self: self.lane.scheduler.live)
    @rule(data=st.data())
    def abort(self, data: st.DataObject) -> None:
        names = [sequence.request.request_id for sequence in self.lane.scheduler.live]
        self.lane.abort(data.draw(st.sampled_from(names)))

    @rule(count=st.integers(1, 6))
    def form_steps(self, count: int) -> None:
        for _ in range(count):
            self.lane.step()

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

    def teardown(self) -> None:
        self.lane.run_to_end()
        self.lane.check_end()


TestScheduler = SchedulerMachine.TestCase
TestScheduler.settings = settings(
    max_examples=120, stateful_step_count=40, deadline=None, suppress_health_check=list(HealthCheck)
)
