"""The scheduler alone: what a step costs the router, from the result before it to the bytes that go out.

python benchmarks/scheduler.py [--json]. One process, no stages: results come back at once, with
tokens drawn beforehand. A step is `take_result` of an earlier one, `next_step`, and its encoding.
"""

from __future__ import annotations

import argparse
import itertools
import time
from collections import deque

import numpy as np
from report import Report

from stagemesh.router.scheduler import Limits, Request, Sampling, Scheduler, Step
from stagemesh.router.scheduler.step import encode

ROWS = 512
STEPS = 1_000
WARM_UP = 64
VOCAB_SIZE = 128_000
TARGETS_MS = {0.0: (0.5, 0.1), 0.05: (1.0, 0.4)}
"""By share of the rows that change in a step: target and stretch."""
CPU_TARGET_US = (5.0, 2.0)


def limits(num_microbatches: int = 1) -> Limits:
    """Of a lane of GPUs with room for everything."""
    rows = ROWS * num_microbatches
    return Limits(
        num_blocks=rows * 256,
        block_size=16,
        max_slots=rows + ROWS,
        max_blocks=2048,
        max_waiting=4096,
        step_tokens=1 << 16,
        num_stages=num_microbatches,
        num_microbatches=num_microbatches,
        depth=num_microbatches + 1,
        lookahead=1,
        consecutive_blocks=False,
    )


class Driver:
    """A scheduler whose steps are answered in order, as many in flight as it allows.

    Args:
        lane: Its limits.
        share: Of the rows of a step: how many end in it, to be replaced by new requests.
    """

    def __init__(self, lane: Limits, share: float) -> None:
        self.scheduler = Scheduler(lane)
        self._numbers = itertools.count()
        self._random = np.random.default_rng(5)
        self._lifetime = round(1 / share) if share else 1 << 14
        self._in_flight: deque[Step] = deque()
        self._ready: list[Request] = []
        for _ in range(ROWS * lane.num_microbatches):
            # They end one after another, not all at once.
            tokens = int(self._random.integers(1, self._lifetime + 1)) if share else self._lifetime
            self.scheduler.submit(self._request(tokens), 0.0)

    def turn(self) -> tuple[int, int]:
        """One step; returns its nanoseconds and how many tokens came back."""
        sampled = self._in_flight[0].sample if self._in_flight else np.zeros(0, np.bool_)
        tokens = self._random.integers(0, VOCAB_SIZE, int(np.count_nonzero(sampled)), dtype=np.uint32)
        # Requests are made by the public side, which is not measured here.
        while len(self._ready) < ROWS:
            self._ready.append(self._request(self._lifetime))
        began_ns = time.perf_counter_ns()
        ends = 0
        if self._in_flight:
            step = self._in_flight.popleft()
            ends = len(self.scheduler.take_result(step.number, tokens, began_ns / 1e9).ends)
        for _ in range(ends):
            self.scheduler.submit(self._ready.pop(), began_ns / 1e9)
        while next_step := self.scheduler.next_step(began_ns / 1e9):
            encode(next_step, 1).SerializeToString()
            self._in_flight.append(next_step)
        return time.perf_counter_ns() - began_ns, len(tokens)

    def _request(self, max_tokens: int) -> Request:
        number = next(self._numbers)
        prompt = np.array([number % VOCAB_SIZE, *range(15)], np.uint32)
        return Request(
            request_id=f"r{number}",
            prompt=prompt,
            max_tokens=max_tokens,
            sampling=Sampling(temperature=0.0),
            end_token_ids=frozenset({VOCAB_SIZE + 1}),
        )


def step_times_ms(share: float, steps: int = STEPS) -> list[float]:
    """Milliseconds of each of `steps` steps of 512 rows, of which `share` change."""
    driver = Driver(limits(), share)
    for _ in range(WARM_UP):
        driver.turn()
    return [driver.turn()[0] / 1e6 for _ in range(steps)]


def cpu_us_per_token(num_microbatches: int = 4, steps: int = STEPS) -> float:
    """Of four microbatches of 512 rows, 1% of which change in a step: CPU of this process for a token."""
    driver = Driver(limits(num_microbatches), 0.01)
    for _ in range(WARM_UP):
        driver.turn()
    tokens, began = 0, time.process_time()
    for _ in range(steps):
        tokens += driver.turn()[1]
    return (time.process_time() - began) * 1e6 / tokens


def add_rows(report: Report, steps: int = STEPS) -> None:
    """The rows of issue 3 that need nothing but the scheduler."""
    for share, (target, stretch) in TARGETS_MS.items():
        times = step_times_ms(share, steps)
        report.add(
            f"scheduler, step of {ROWS}, {share:.0%} changed"
            if share
            else f"scheduler, step of {ROWS}, unchanged",
            float(np.median(times)),
            "ms",
            target=target,
            stretch=stretch,
            at_most=True,
            reference=f"median of {steps}; p99 {np.percentile(times, 99):.3f} ms",
        )
    report.add(
        "scheduler alone, CPU per token",
        cpu_us_per_token(steps=steps),
        "us",
        target=CPU_TARGET_US[0],
        stretch=CPU_TARGET_US[1],
        at_most=True,
        reference=f"4 microbatches of {ROWS}, 1% of the rows change in a step",
    )


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    parser.add_argument("--steps", type=int, default=STEPS, help=f"steps to measure (default {STEPS})")
    options = parser.parse_args()
    report = Report("scheduler", options.json)
    add_rows(report, options.steps)
    report.finish()


if __name__ == "__main__":
    main()
