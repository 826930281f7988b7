"""A lane in virtual time: the scheduler over stages whose costs and hops a test scripts. Nothing sleeps."""

from __future__ import annotations

import heapq
import zlib
from collections import defaultdict
from dataclasses import dataclass, field

import numpy as np

from stagemesh.router.lane.driving import SPARE_MICROBATCHES, depth_of
from stagemesh.router.scheduler import Limits, Request, Sampling, Scheduler, Step

REPORT_S = 0.25


@dataclass(frozen=True, kw_only=True)
class Costs:
    """Seconds of a step: a sum of terms."""

    constant: float = 0.0
    row: float = 0.0
    """Of a decode."""
    position: float = 0.0
    """Of a prompt."""
    cell: float = 0.0
    """Of a KV cell read."""
    pair: float = 0.0
    """Of a prompt's position and a cell before it."""

    def of(self, step: Step, ends: np.ndarray) -> float:
        counts = step.counts[step.num_decodes :]
        return (
            self.constant
            + self.row * step.num_decodes
            + self.position * int(counts.sum())
            + self.cell * float(ends.sum())
            + self.pair * float((counts * (ends[step.num_decodes :] - counts / 2)).sum())
        )


def lane_limits(
    num_stages: int, *, lookahead: int = 1, max_microbatches: int | None = None, **fields: object
) -> Limits:
    """As the router would drive stages on hosts of their own."""
    most = num_stages + (SPARE_MICROBATCHES if num_stages > 1 else 0)
    if max_microbatches is not None:
        most = max_microbatches
    values: dict[str, object] = {
        "num_blocks": 100_000,
        "block_size": 16,
        "max_slots": 512 * num_stages,
        "max_blocks": 512,
        "max_waiting": 100_000,
        "step_tokens": 512,
        "num_stages": num_stages,
        "num_microbatches": num_stages,
        "max_microbatches": most,
        "depth": depth_of(most or num_stages, lookahead),
        "lookahead": lookahead,
        "consecutive_blocks": False,
    }
    return Limits(**(values | fields))  # type: ignore[arg-type]


@dataclass(repr=False)
class VirtualLane:
    """Runs requests that arrive at given times, as fast as the stages' costs allow.

    Hops are seconds: between stages and round the ring, from the router to the stages, and of results back.
    """

    limits: Limits
    costs: list[Costs]
    hop_s: float = 0.0
    control_s: float = 0.0
    answer_s: float = 0.0
    now: float = 0.0
    scheduler: Scheduler = field(init=False)
    steps: list[Step] = field(default_factory=list)
    token_times: dict[str, list[float]] = field(default_factory=lambda: defaultdict(list))
    busy_s: np.ndarray = field(init=False)
    clock_offsets_s: tuple[float, ...] = ()
    """Of each stage's clock: what it reports means nothing on another's."""

    def __post_init__(self) -> None:
        self.scheduler = Scheduler(self.limits)
        count = len(self.costs)
        self.busy_s = np.zeros(count)
        self._free = [0.0] * count
        self._ended: dict[int, float] = {}
        self._positions: dict[int, int] = defaultdict(int)
        self._reports: list[list[tuple[int, list[float], float]]] = [[] for _ in self.costs]
        self._events: list[tuple[float, int, str, object]] = []
        self._serial = 0

    def at(self, when: float, what: str, value: object = None) -> None:
        self._serial += 1
        heapq.heappush(self._events, (when, self._serial, what, value))

    def arrive(self, when: float, name: str, prompt: int, max_tokens: int, **fields: object) -> None:
        """A request whose prompt nobody else has."""
        generator = np.random.default_rng(zlib.crc32(name.encode()))
        request = Request(
            request_id=name,
            prompt=generator.integers(0, 1000, prompt, dtype=np.uint32),
            max_tokens=max_tokens,
            sampling=Sampling(temperature=0.0),
            **fields,  # type: ignore[arg-type]
        )
        self.at(when, "arrival", request)

    def run(self, until: float = float("inf")) -> None:
        """Until nothing is left to do, or that time."""
        self.at(self.now + REPORT_S, "report")
        while self._events and self._events[0][0] <= until:
            self.now, _, what, value = heapq.heappop(self._events)
            if what == "arrival":
                assert isinstance(value, Request)
                self.scheduler.submit(value, self.now)
            elif what == "result":
                assert isinstance(value, Step)
                count = int(np.count_nonzero(value.sample))
                deltas = self.scheduler.take_result(value.number, np.full(count, 5, np.uint32), self.now)
                for sequence in deltas.sequences:
                    self.token_times[sequence.request.request_id].append(self.now)
            elif what == "report":
                self._report()
                if self._events:
                    self.at(self.now + REPORT_S, "report")
            if self._events and self._events[0][0] <= self.now:
                continue
            self.scheduler.expire(self.now)
            while step := self.scheduler.next_step(self.now):
                self._send(step)

    def _send(self, step: Step) -> None:
        self.steps.append(step)
        for sequence in step.changes.admitted:
            self._positions[sequence.slot] = sequence.first_position
        ends = np.array([self._positions[slot] for slot in step.slots.tolist()]) + step.counts
        for slot, end in zip(step.slots.tolist(), ends.tolist(), strict=True):
            self._positions[slot] = end
        came = self.now + self.control_s
        source = int(step.input_steps.max())
        ready = self._ended.get(source, 0.0) + (self.hop_s if len(self.costs) > 1 else 0.0)
        for stage, costs in enumerate(self.costs):
            free = max(self._free[stage], came)
            begin = max(free, ready)
            cost = costs.of(step, ends)
            end = begin + cost
            offset = self.clock_offsets_s[stage] if self.clock_offsets_s else 0.0
            self._reports[stage].append(
                (step.number, [came + offset, free - came, begin - free, 0.0, cost, 0.0], end)
            )
            self.busy_s[stage] += cost
            self._free[stage] = end
            ready = end + self.hop_s
        self._ended[step.number] = end
        self._ended.pop(step.number - 1000, None)
        self.at(end + self.answer_s, "result", step)

    def _report(self) -> None:
        for stage, waiting in enumerate(self._reports):
            done = [entry for entry in waiting if entry[2] <= self.now]
            self._reports[stage] = waiting[len(done) :]
            if done:
                numbers = np.array([entry[0] for entry in done])
                times = np.array([entry[1] for entry in done])
                self.scheduler.take_timings(stage, numbers, np.round(times * 1e9).astype(np.int64))

    def intervals(self, since: float = 0.0) -> np.ndarray:
        """Inter-token seconds of all requests, of tokens after `since`."""
        parts = [np.diff(np.array(times)[np.array(times) >= since]) for times in self.token_times.values()]
        return np.concatenate(parts) if parts else np.zeros(0)

    def num_tokens(self, begin: float, end: float) -> int:
        return sum(begin <= at < end for times in self.token_times.values() for at in times)
