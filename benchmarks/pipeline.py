"""The pipeline's rows: how much of P stages' capacity a mesh delivers, what the control plane costs, and whether the
simulator tells the truth.

    python benchmarks/pipeline.py --json [--quick] [--only decode] [--plot docs/schedule.png]

Stages are simulated: real leaders, workers, local queues, gRPC links and ordering, and an engine that sleeps for a
scripted cost. Efficiency is delivered tokens/s at the client over (N/P tokens per scripted time of the slowest
stage), with N streams. What is delivered is counted in a process of its own over one Session.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TypeVar

from pipeline_runs import DecodeRun, LaneFacts, decode_run, mixed_load, mixed_run
from pipeline_simulated import compare, simulated_hour
from report import Report
from schedule_plot import plot

T = TypeVar("T")
STREAMS = 64
SLOWER = 1.5
DELAY_S = 0.05
RUNS = 3
"""Of decode and mixed load, each on a mesh of its own: rows are of the median run."""
DEEP = 4
"""Lookahead that covers DELAY_S: 4 rounds of 4 microbatches of 8 ms."""


class Pipeline:
    """The rows, by group.

    Args:
        report: Gets them.
        quick: Shorter windows.
    """

    def __init__(self, report: Report, quick: bool) -> None:
        self._report = report
        self._quick = quick
        self._seconds = 4.0 if quick else 8.0
        self.decodes: list[list[DecodeRun]] = []

    def groups(self) -> dict[str, Callable[[], None]]:
        """What --only names, in the order of a whole run."""
        return {
            "decode": self.decode,
            "slow-stage": self.slow_stage,
            "mixed": self.mixed,
            "delay": self.delay,
            "simulate": self.simulate,
            "scheduler": lambda: self._script("scheduler.py"),
            "streams": lambda: self._script("streams.py", *(["--quick"] if self._quick else [])),
        }

    def decode(self) -> None:
        """Decode alone, every stage alike."""
        for stages, cost_ms, target, stretch in (
            (2, 8.0, 0.95, 0.98),
            (4, 8.0, 0.95, 0.98),
            (8, 8.0, 0.95, 0.98),
            (4, 2.0, 0.85, 0.95),
        ):
            run = self._decode([f"{cost_ms:g}ms"] * stages, cost_ms)
            self._report.add(
                f"decode, {cost_ms:g} ms a stage, P = {stages}, {STREAMS} streams",
                run.efficiency,
                "",
                target=target,
                stretch=stretch,
                reference=f"{run.rate:.0f} of {run.ideal_rate:.0f} tokens/s; {run.hop_ms:.2f} ms a hop on average; "
                f"{_facts(run.facts)}; {_of([run.efficiency for run in self.decodes[-1]])}",
            )

    def slow_stage(self) -> None:
        """One stage slower: the lane runs at its pace, and nothing else may cost."""
        slowest = 8.0 * SLOWER
        run = self._decode(["8ms", "8ms", f"{slowest:g}ms", "8ms"], slowest)
        self._report.add(
            f"one of 4 stages {SLOWER:g} times slower: cost beyond it",
            100 * (1 - run.efficiency),
            "%",
            target=3,
            stretch=1,
            at_most=True,
            reference=f"{run.rate:.0f} of {run.ideal_rate:.0f} tokens/s that the slowest stage allows; "
            f"{_facts(run.facts)}; {_of([100 * (1 - run.efficiency) for run in self.decodes[-1]])}",
        )

    def _decode(self, costs: Sequence[str], slowest_ms: float) -> DecodeRun:
        """The median of RUNS; all are kept for the simulator."""
        runs = [decode_run(costs, slowest_ms, STREAMS, self._seconds) for _ in range(RUNS)]
        self.decodes.append(runs)
        return _middle(runs, lambda run: run.efficiency)

    def mixed(self) -> None:
        """Prompts and answers of every length, arriving at random."""
        for share in (1.2, 0.8):
            load = mixed_load(share, 16.0 if self._quick else 24.0)
            runs = [mixed_run(load) for _ in range(RUNS)]
            where = f"{len(load.requests)} requests in {load.duration_s:.0f} s, {load.about}"
            if share > 1:
                run = _middle(runs, lambda run: run.busy_share)
                self._report.add(
                    f"mixed load at {share:.0%}: share of the slowest stage's capacity",
                    run.busy_share,
                    "",
                    target=0.92,
                    stretch=0.97,
                    reference=f"scripted compute over time, from its reports; {where}; {_facts(run.facts)}; "
                    f"{_of([run.busy_share for run in runs])}",
                )
            else:
                run = _middle(runs, lambda run: run.itl_ratio)
                self._report.add(
                    f"mixed load at {share:.0%}: p99 / median inter-token time",
                    run.itl_ratio,
                    "x",
                    target=2.0,
                    stretch=1.5,
                    at_most=True,
                    reference=f"{run.itl_p99_ms:.1f} / {run.itl_p50_ms:.1f} ms at the client; {where}; "
                    f"{_facts(run.facts)}; {_of([run.itl_ratio for run in runs])}",
                )
            self._compare(
                f"mixed load at {share:.0%}",
                [compare(load.spec(run.facts), run.measured, load.requests) for run in runs],
            )

    def delay(self) -> None:
        """The result stream alone delayed: lookahead covers it, and without it it is paid in full."""
        costs = ["8ms"] * 4
        base, deep, prompt, plain = (
            decode_run(
                costs, 8.0, STREAMS, self._seconds, ["--lookahead", str(lookahead)], result_delay_s=delay_s
            )
            for delay_s, lookahead in ((0.0, DEEP), (DELAY_S, DEEP), (0.0, 0), (DELAY_S, 0))
        )
        self._report.add(
            f"results {DELAY_S * 1e3:.0f} ms late, lookahead {DEEP}: throughput lost",
            100 * (1 - deep.rate / base.rate),
            "%",
            target=3,
            at_most=True,
            reference=f"{deep.rate:.0f} against {base.rate:.0f} tokens/s through the same proxy without delay; "
            f"{_facts(deep.facts)}",
        )
        period_s = STREAMS / prompt.rate
        predicted = STREAMS / (period_s + DELAY_S)
        self._report.add(
            f"results {DELAY_S * 1e3:.0f} ms late, lookahead 0: off what is predicted",
            100 * abs(plain.rate / predicted - 1),
            "%",
            target=5,
            at_most=True,
            reference=f"{plain.rate:.0f} tokens/s; {predicted:.0f} = {STREAMS} streams every {period_s * 1e3:.1f} ms, which is "
            f"their period through the same proxy without delay, and {DELAY_S * 1e3:.0f} ms",
        )

    def simulate(self) -> None:
        """How fast `stagemesh simulate` is, and how true on the rows above."""
        result = simulated_hour()
        self._report.add(
            "simulate: 64 stages, 10,000 requests over an hour",
            result.real_s,
            "s",
            target=60,
            stretch=20,
            at_most=True,
            reference=f"8 ms a stage, {result.num_finished} requests, {result.num_steps} steps, "
            f"{result.output_tokens} tokens, virtual {result.virtual_s:.0f} s",
        )
        for runs in self.decodes:
            self._compare(
                runs[0].name,
                [compare(run.spec(), run.measured, run.requests, run.burst_spec()) for run in runs],
            )

    def _compare(self, name: str, compared: Sequence[tuple[float, str]]) -> None:
        """The median of the runs' greatest differences."""
        worst, about = _middle(compared, lambda one: one[0])
        self._report.add(
            f"simulate against the mesh: {name}",
            100 * worst,
            "%",
            target=5,
            stretch=2,
            at_most=True,
            reference=f"{about}; {_of([100 * worst for worst, _ in compared])}",
        )

    def _script(self, name: str, *options: str) -> None:
        """The rows of another benchmark, as it prints them."""
        script = Path(__file__).with_name(name)
        done = subprocess.run(
            [sys.executable, str(script), "--json", *options],
            stdout=subprocess.PIPE,
            check=False,
            timeout=600,
        )
        if done.returncode:
            self._report.add(name, None, "", reference=f"{name} ended with exit code {done.returncode}")
            return
        for row in json.loads(done.stdout)["results"]:
            self._report.take(row)


def _middle(runs: Sequence[T], key: Callable[[T], float]) -> T:
    """The median one."""
    return sorted(runs, key=key)[len(runs) // 2]


def _of(values: Sequence[float]) -> str:
    return f"median of {', '.join(f'{value:.4g}' for value in sorted(values))}"


def _facts(facts: LaneFacts) -> str:
    return f"{facts.num_microbatches} microbatches, ring hops {facts.ring_hops_ms:.2f} ms"


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    parser.add_argument("--quick", action="store_true", help="shorter windows")
    parser.add_argument("--only", action="append", metavar="GROUP", help="one group of rows; repeatable")
    parser.add_argument("--plot", metavar="FILE.png", help="draw a schedule with and without lookahead")
    options = parser.parse_args()
    report = Report("pipeline", options.json)
    groups = Pipeline(report, options.quick).groups()
    if unknown := set(options.only or ()) - set(groups):
        parser.error(f"--only {', '.join(sorted(unknown))}: expected of {', '.join(groups)}")
    if options.plot:
        plot(options.plot)
        report.note(f"{options.plot} is drawn")
    for name, measure in groups.items():
        if (options.only and name in options.only) or (not options.only and not options.plot):
            _measured(report, name, measure)
    report.finish()


def _measured(report: Report, name: str, measure: Callable[[], None]) -> None:
    try:
        measure()
    except Exception as error:  # noqa: BLE001 - a row that could not be measured says why, the others go on
        report.add(name, None, "", reference=f"not measured: {type(error).__name__}: {error}")


if __name__ == "__main__":
    main()
