"""The loop in virtual time: the same Scheduler as in a router, with arrivals and results as its only events.

A step's way through the stages is known when the step is made (pipeline.py), and results come in the order of
the steps. So the events are two sorted sequences, and no queue of events is needed.
"""

from __future__ import annotations

import time
from collections import Counter, deque
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from stagemesh.model.cost import StepShape
from stagemesh.router.bubble import ActiveTime, bubble_share
from stagemesh.router.scheduler import Scheduler, Step, StepDeltas
from stagemesh.router.simulate.limits import lane_limits
from stagemesh.router.simulate.load import END_TOKEN, draw
from stagemesh.router.simulate.pipeline import StepTimes, VirtualPipeline
from stagemesh.router.simulate.result import Percentiles, SimulationResult, StageResult
from stagemesh.router.simulate.spec import SimulationSpec
from stagemesh.wire.errors import InvalidArgumentError, ResourceExhaustedError

Int64 = npt.NDArray[np.int64]

REPORT_NS = 250_000_000
"""Stages say so often where their time went, as real ones do ..."""
LEARNING_NS = 20_000_000_000
LEARNT_REPORT_NS = 10_000_000_000
"""... and after LEARNING_NS so often: their costs do not change, the scheduler keeps no more than the last steps of a
report, and most of a long run would go into reports."""
NEVER = 1 << 62
ANY_TOKEN = 1
"""What is sampled where nothing ends."""


@dataclass(frozen=True, slots=True)
class _Pending:
    """A step whose result is on its way."""

    step: Step
    sent_ns: int
    at_ns: int
    requests: Int64
    """Index of the request of each sampled row."""


class Simulation:
    """One run of a file.

    Args:
        spec: What to run.
        name: For the result.
    """

    def __init__(self, spec: SimulationSpec, name: str = "") -> None:
        self._spec = spec
        self._name = name
        self._requests = draw(spec.load, spec.lane)
        self.pipeline = VirtualPipeline(spec.costs, spec.links, spec.ring, spec.position_bytes)
        limits = lane_limits(spec.lane, self.pipeline.num_stages)
        self.scheduler = Scheduler(limits)
        self._in_flight: deque[_Pending] = deque()
        self._unreported: deque[tuple[int, StepTimes]] = deque()
        self._next_report_ns = REPORT_NS
        self._positions = np.zeros(limits.max_slots, np.int64)
        self._request_of = np.zeros(limits.max_slots, np.int64)
        self._tokens = np.full(limits.max_slots, ANY_TOKEN, np.uint32)
        count = len(self._requests)
        self._num_sampled = np.zeros(count, np.int64)
        """Tokens sampled and come back, of each request; counted where some end by a token."""
        self._last_ns = np.full(count, -1)
        """When the newest token of each request reached the router."""
        self._first_ns = np.full(count, -1)
        self._gaps: list[Int64] = []
        self._active = ActiveTime()
        self._num_finished = self._num_rows = self._num_ignored = self._num_steps = 0
        self._num_output = 0
        self._refused: Counter[str] = Counter()

    def run(self) -> SimulationResult:
        """Until every request has ended."""
        began = time.perf_counter()
        client_ns = self._spec.router.client
        arrivals = taken_at(self._requests.arrivals_ns + client_ns, self._spec.router.request).tolist()
        index, now = 0, 0
        while True:
            arrival = arrivals[index] if index < len(arrivals) else NEVER
            result = self._in_flight[0].at_ns if self._in_flight else NEVER
            if min(arrival, result) == NEVER:
                break
            now = min(arrival, result)
            while index < len(arrivals) and arrivals[index] <= now:
                self._submit(index, now)
                index += 1
            while self._in_flight and self._in_flight[0].at_ns <= now:
                self._take_result(self._in_flight.popleft(), now)
            if now >= self._next_report_ns:
                self._report(now)
            self._pump(now)
        left = self.scheduler.num_running + self.scheduler.num_waiting
        assert not left, f"{left} requests neither run nor end"
        return self._result(now + client_ns, time.perf_counter() - began)

    def _submit(self, index: int, now: int) -> None:
        try:
            self.scheduler.submit(self._requests.request(index), now / 1e9)
        except (ResourceExhaustedError, InvalidArgumentError) as error:
            self._refused[error.reason] += 1

    def _pump(self, now: int) -> None:
        leaves_ns, admit_ns = now, 0  # what the first of them takes is a part of router.step
        while step := self.scheduler.next_step(now / 1e9):
            leaves_ns += admit_ns * len(step.changes.admitted)
            admit_ns = self._spec.router.admit
            self._launch(step, leaves_ns)

    def _launch(self, step: Step, now: int) -> None:
        """Send a step: everything that will happen to it is known at once."""
        for sequence in step.changes.admitted:
            self._positions[sequence.slot] = sequence.first_position
            self._request_of[sequence.slot] = int(sequence.request.request_id)
        rows, tokens = len(step.slots), step.num_tokens
        context = 0
        if self.pipeline.uses_context:
            self._positions[step.slots] += step.counts
            context = int(self._positions[step.slots].sum())
        times = self.pipeline.run(
            step.number,
            StepShape(tokens=tokens, rows=rows, prefill=tokens - rows, context=context),
            now + self._spec.router.step,
            step.newest_input,
        )
        self._num_steps += 1
        self._num_rows += rows
        self._unreported.append((step.number, times))
        sampled = self._request_of[step.sampled_slots]
        self._in_flight.append(_Pending(step, now, int(times.ends[-1]) + self._spec.router.result, sampled))

    def _take_result(self, pending: _Pending, now: int) -> None:
        requests = pending.requests
        self._active.answered(pending.sent_ns, now)
        token_ids = self._tokens[: len(requests)]
        if self._spec.load.stops:
            self._num_sampled[requests] += 1
            token_ids = token_ids.copy()
            ends = self._requests.stops[requests] & (
                self._num_sampled[requests] == self._requests.outputs[requests]
            )
            token_ids[ends] = END_TOKEN
        deltas = self.scheduler.take_result(pending.step.number, token_ids, now / 1e9)
        self._take_deltas(pending, deltas, now)

    def _take_deltas(self, pending: _Pending, deltas: StepDeltas, now: int) -> None:
        requests = self._request_of[deltas.slots]
        self._num_ignored += len(pending.requests) - len(requests)
        self._num_output += len(requests)
        last = self._last_ns[requests]
        gaps = now - last
        if pending.step.tokens:  # of a prompt: the first token comes from such a step
            first = last < 0
            self._first_ns[requests[first]] = now
            gaps = gaps[~first]
        self._last_ns[requests] = now
        self._gaps.append(gaps)
        self._num_finished += len(deltas.ends)

    def _report(self, now: int) -> None:
        """What stages have done since the last report, as `StageReport` says it."""
        self._next_report_ns = now + (REPORT_NS if now < LEARNING_NS else LEARNT_REPORT_NS)
        done = []
        while self._unreported and self._unreported[0][1].ends[-1] <= now:
            done.append(self._unreported.popleft())
        if not done:
            return
        numbers = np.array([number for number, _ in done], np.int64)
        arrivals = np.array([times.arrival for _, times in done], np.int64)
        free, begins, ends = (
            np.stack([getattr(times, name) for _, times in done], axis=1)
            for name in ("free", "begins", "ends")
        )
        zeros = np.zeros(len(done), np.int64)
        for stage in range(self.pipeline.num_stages):
            queue, wait = free[stage] - arrivals, begins[stage] - free[stage]
            # Columns: arrival, queue, wait, receive, compute, send.
            columns = (arrivals, queue, wait, zeros, ends[stage] - begins[stage], zeros)
            self.scheduler.take_timings(stage, numbers, np.stack(columns, axis=1))

    def _result(self, end_ns: int, real_s: float) -> SimulationResult:
        requests = self._requests
        started = self._first_ns >= 0
        # Both ways: the client's clock starts when it sends.
        ttft = (self._first_ns - requests.arrivals_ns)[started] + self._spec.router.client
        busy = self.pipeline.busy_ns
        split = self._spec.split or (0,) * len(busy)
        seconds = max(end_ns, 1) / 1e9
        scheduler = self.scheduler
        return SimulationResult(
            name=self._name,
            virtual_s=seconds,
            num_requests=len(requests),
            num_finished=self._num_finished,
            num_refused=self._refused.total(),
            refused=dict(self._refused),
            num_cut=requests.num_cut,
            output_tokens=self._num_output,
            output_tokens_per_s=self._num_output / seconds,
            prompt_tokens_per_s=scheduler.num_prompt_tokens / seconds,
            ttft_ms=Percentiles.of_ns(ttft),
            inter_token_ms=Percentiles.of_ns(
                np.concatenate(self._gaps) if self._gaps else np.zeros(0, np.int64)
            ),
            num_steps=self._num_steps,
            mean_rows=self._num_rows / max(1, self._num_steps),
            num_ignored_rows=self._num_ignored,
            num_preemptions=scheduler.num_preemptions,
            cached_share=scheduler.num_cached_tokens / max(1, scheduler.num_prompt_tokens),
            limiting_stage=int(busy.argmax()),
            stages=tuple(
                StageResult(
                    layers=layers,
                    busy_share=float(one / max(end_ns, 1)),
                    bubble_share=bubble_share(float(one), self._active.total_ns),
                )
                for layers, one in zip(split, busy, strict=True)
            ),
            real_s=real_s,
        )


def taken_at(arrivals_ns: Int64, request_ns: int) -> Int64:
    """When the router has taken in each request, one after the other; a burst is taken in whole, then goes on."""
    if not len(arrivals_ns) or not request_ns:
        return arrivals_ns
    work = np.arange(1, len(arrivals_ns) + 1) * request_ns
    taken: Int64 = np.maximum.accumulate(arrivals_ns - (work - request_ns)) + work
    # Requests of one message are looked at in one turn of the loop, and their first step is formed after it.
    last = np.flatnonzero(np.append(np.diff(arrivals_ns) > 0, True))
    whole: Int64 = taken[last[np.searchsorted(last, np.arange(len(taken)))]]
    return whole


def simulate(spec: SimulationSpec, name: str = "") -> SimulationResult:
    """Run a file once."""
    return Simulation(spec, name).run()
