"""A scheduler with a stage under it, whose results come when the test says so."""

from __future__ import annotations

from collections import defaultdict, deque
from typing import Any

import numpy as np
import numpy.typing as npt
from scheduled_stage import END_TOKEN, ScheduledStage, expected_answer

from stagemesh.router.scheduler import Finish, Limits, Request, Sampling, Scheduler, Step
from stagemesh.router.scheduler.step import encode

EPOCH = 5


def make_limits(**fields: Any) -> Limits:
    """Room for everything, unless `fields` say otherwise."""
    values: dict[str, Any] = {
        "num_blocks": 100,
        "block_size": 4,
        "max_slots": 8,
        "max_blocks": 100,
        "max_waiting": 100,
        "step_tokens": 64,
        "num_microbatches": 1,
        "depth": 2,
        "lookahead": 1,
    }
    return Limits(**values | fields)


def make_request(
    name: str, length: int = 5, max_tokens: int = 4, *, stops: bool = False, priority: int = 0
) -> Request:
    """A request whose prompt is made from its name."""
    seed = sum(name.encode())
    return Request(
        request_id=name,
        prompt=(np.arange(length, dtype=np.uint32) * 3 + seed) % 40,
        max_tokens=max_tokens,
        sampling=Sampling(temperature=0.0),
        end_token_ids=frozenset([END_TOKEN] if stops else []),
        priority=priority,
    )


class ScheduledLane:
    """Checks every step and result as it passes."""

    def __init__(self, limits: Limits) -> None:
        self.limits = limits
        self.now = 0.0
        self.scheduler = Scheduler(limits)
        self.stage = ScheduledStage(limits)
        self.requests: dict[str, Request] = {}
        self.answers: dict[str, list[int]] = defaultdict(list)
        self.finished: dict[str, Finish] = {}
        self.steps: list[Step] = []
        self.in_flight: deque[tuple[Step, npt.NDArray[np.uint32]]] = deque()
        self.num_ignored = 0
        """Sampled rows whose request had ended when the result came."""
        self._num_sampled: dict[str, int] = defaultdict(int)
        self._num_known: dict[str, int] = defaultdict(int)

    def submit(self, request: Request) -> None:
        self.scheduler.submit(request, self.now)
        self.requests[request.request_id] = request

    def abort(self, request_id: str) -> None:
        (delta,) = self.scheduler.abort(request_id)
        assert delta.finish is Finish.ABORT
        assert not delta.token_ids
        self._end(request_id, Finish.ABORT)

    def expire(self) -> None:
        """End those whose deadline has passed."""
        for delta in self.scheduler.expire(self.now):
            assert delta.request.deadline <= self.now
            self._end(delta.request.request_id, Finish.DEADLINE)

    def step(self) -> Step | None:
        """Form and run a step; its result waits."""
        step = self.scheduler.next_step(self.now)
        if step is None:
            return None
        self.steps.append(step)
        assert 0 < step.num_tokens <= self.limits.step_tokens
        for sequence, sampled in zip(step.sequences, step.sample.tolist(), strict=True):
            name = sequence.request.request_id
            assert name not in self.finished, "a row for a request that has ended"
            if sampled:
                unseen = self._num_sampled[name] - self._num_known[name]
                assert unseen <= self.limits.lookahead
                self._num_sampled[name] += 1
                assert self._num_sampled[name] <= self.requests[name].max_tokens, "a sample past max_tokens"
        self.in_flight.append((step, self.stage.run(encode(step, EPOCH))))
        assert len(self.in_flight) == self.scheduler.num_in_flight <= self.limits.depth
        return step

    def result(self) -> int:
        """Deliver the oldest result; returns how many tokens were anybody's."""
        step, tokens = self.in_flight.popleft()
        names = [
            sequence.request.request_id
            for sequence, sampled in zip(step.sequences, step.sample.tolist(), strict=True)
            if sampled
        ]
        for name in names:
            self._num_known[name] += 1
        self.num_ignored += sum(name in self.finished for name in names)
        deltas = self.scheduler.take_result(step.number, tokens, self.now)
        for delta in deltas:
            name = delta.request.request_id
            assert name not in self.finished, "tokens after the end"
            self.answers[name] += delta.token_ids
            if delta.finish:
                self._end(name, delta.finish)
        return len(deltas.token_ids)

    def run_to_end(self, num_turns: int = 20_000) -> None:
        """Until every request has ended; within `num_turns`, or somebody starves."""
        for _ in range(num_turns):
            if len(self.finished) == len(self.requests) and not self.in_flight:
                return
            if self.step() is None:
                assert self.in_flight, (
                    f"stuck: {self.scheduler.num_running} run, {self.scheduler.num_waiting} wait"
                )
                self.result()
        raise AssertionError("somebody starves")

    def check_end(self) -> None:
        """Everything is as it was before, and every answer is the model's."""
        assert self.scheduler.pool.num_free == self.limits.num_blocks
        assert not self.scheduler.pool._claimed.any()
        assert self.scheduler.num_running == self.scheduler.num_waiting == 0
        for name, request in self.requests.items():
            expected, answer = expected_answer(request), self.answers[name]
            if self.finished[name] in (Finish.ABORT, Finish.DEADLINE):
                assert answer == expected[: len(answer)]
                continue
            assert answer == expected
            stopped = expected[-1] in request.end_token_ids
            assert self.finished[name] is (Finish.STOP if stopped else Finish.LENGTH)

    def _end(self, name: str, finish: Finish) -> None:
        assert name not in self.finished, f"{name} ended twice"
        self.finished[name] = finish
