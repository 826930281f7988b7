"""The event log: what happened to a scheduler happens again, byte for byte."""

from __future__ import annotations

import io
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from scheduled_lane import make_limits, make_request
from virtual_lane import Costs, VirtualLane, lane_limits

from stagemesh.router.scheduler import Scheduler, Step
from stagemesh.router.scheduler.event_log import EventLog, replay
from stagemesh.router.scheduler.pipeline import COMPUTE
from stagemesh.wire.errors import ConfigError, StagemeshError


class LoggedScheduler:
    """What a lane does with its scheduler and its log."""

    def __init__(self, scheduler: Scheduler, log: EventLog) -> None:
        self._scheduler = scheduler
        self._log = log
        log.open(scheduler.limits, 7)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._scheduler, name)

    def submit(self, request: Any, now: float) -> None:
        self._scheduler.submit(request, now)
        self._log.submit(request, now)

    def expire(self, now: float) -> Any:
        if len(deltas := self._scheduler.expire(now)):
            self._log.expire(now)
        return deltas

    def take_result(self, number: int, token_ids: Any, now: float) -> Any:
        deltas = self._scheduler.take_result(number, token_ids, now)
        self._log.result(number, token_ids, now)
        return deltas

    def take_timings(self, stage: int, numbers: Any, times_ns: Any) -> None:
        self._scheduler.take_timings(stage, numbers, times_ns)
        self._log.timings(stage, numbers, times_ns)

    def next_step(self, now: float) -> Step | None:
        step = self._scheduler.next_step(now)
        self._log.step(step, now)
        return step


class WatchedScheduler(LoggedScheduler):
    """On a machine with hiccups that gets slower, watched by `status` or a scrape."""

    watched_after: tuple[int, ...] = ()
    """What stages have reported."""

    def take_timings(self, stage: int, numbers: Any, times_ns: Any) -> None:
        times_ns = times_ns.copy()
        times_ns[:, COMPUTE] *= np.where(numbers % 7 == 0, 20, 1 + numbers // 50)
        super().take_timings(stage, numbers, times_ns)
        if stage in self.watched_after:
            self._scheduler.pace.state()


def recorded() -> tuple[str, Scheduler]:
    """Two hundred requests under pressure: hits, preemptions, deadlines, an inter-token target."""
    limits = lane_limits(3, num_blocks=600, max_slots=40, itl_target_s=0.02)
    lane = VirtualLane(limits, [Costs(constant=2e-3, row=3e-5, position=1e-5)] * 3, hop_s=3e-4, answer_s=5e-4)
    file = io.StringIO()
    lane.scheduler = LoggedScheduler(lane.scheduler, EventLog(file))  # type: ignore[assignment]
    generator = np.random.default_rng(4)
    for index in range(200):
        when = index * 0.02
        lane.arrive(
            when,
            f"r{index % 150}" if index < 150 else f"again{index}",
            int(generator.integers(1, 400)),
            int(generator.integers(1, 200)),
            priority=int(generator.integers(-1, 2)),
            **({"deadline": when + 1.0} if index % 7 == 0 else {}),
        )
    lane.run()
    return file.getvalue(), lane.scheduler


def agrees(lines: list[str]) -> bool:
    """Whether every step is made again as it was."""
    try:
        return all(step.made == step.logged for step in replay(lines))
    except StagemeshError:  # such as a result for a step that was not made this time
        return False


def test_a_recorded_run_replayed_makes_equal_steps() -> None:
    text, scheduler = recorded()
    steps = list(replay(text.splitlines()))
    made = [step for step in steps if step.logged]
    assert len(made) > 300
    assert len(made) < len(steps)
    assert all(step.made == step.logged for step in steps)
    assert scheduler.num_preemptions > 0, "nothing was preempted: this shows little"


@pytest.mark.parametrize("watched_after", [(0, 1), (0,)])
def test_looking_at_a_scheduler_changes_none_of_its_steps(watched_after: tuple[int, ...]) -> None:
    lane = VirtualLane(lane_limits(2), [Costs(constant=2e-2, row=3e-4, position=1e-4)] * 2)
    file = io.StringIO()
    watched = WatchedScheduler(lane.scheduler, EventLog(file))
    watched.watched_after = watched_after
    lane.scheduler = watched  # type: ignore[assignment]
    # Waves far apart: between them nothing is asked of what was learnt, but by who looks.
    for index in range(60):
        lane.arrive(index // 20 * 5.0, f"r{index}", 300 + index, 100)
    lane.run()
    assert agrees(file.getvalue().splitlines())


def test_a_replay_that_goes_another_way_shows() -> None:
    text, _ = recorded()
    lines = text.splitlines()
    first = next(index for index, line in enumerate(lines) if '"submit"' in line)
    del lines[first]
    assert not agrees(lines)


@pytest.mark.parametrize(
    "lines", [["no json"], ['{"event":"abort","id":"a"}'], ['{"event":"open","limits":{},"epoch":1}']]
)
def test_what_is_no_log_is_refused_by_line(lines: list[str]) -> None:
    with pytest.raises(ConfigError, match="line 1"):
        list(replay(lines))


def test_every_field_of_a_request_survives() -> None:
    file = io.StringIO()
    log = EventLog(file)
    log.open(make_limits(), 1)
    request = replace(make_request("a", stops=True, priority=3), deadline=9.5)
    log.submit(request, 1.0)
    log.step(Scheduler(make_limits()).next_step(1.0), 1.0)
    (step,) = replay(file.getvalue().splitlines())
    twin = Scheduler(make_limits())
    twin.submit(request, 1.0)
    expected = twin.next_step(1.0)
    assert expected
    assert step.logged == b""
    assert step.made
