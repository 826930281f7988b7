"""A picture of a schedule: stages as rows, microbatches as coloured bars, bubbles blank."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from stagemesh.router.simulate.simulation import Simulation
from stagemesh.router.simulate.spec import parse

NUM_STAGES = 4
SHOWN_MS = (40.0, 84.0)
COST = "2ms + 2us*prefill"
CONTENT: dict[str, Any] = {
    "stages": {"count": NUM_STAGES, "cost": COST},
    "link": {"latency": "0.1ms"},
    "ring": {"latency": "0.1ms"},
    "router": {"step": "0.8ms", "result": "0.8ms"},
    "load": {"arrivals": "at_once", "requests": 64, "prompt": {"fixed": 32}, "output": {"fixed": 64}},
    # Of prompts a quarter a step, so that there are four microbatches from the start.
    "lane": {"step_tokens": 512, "max_in_flight": NUM_STAGES},
}


@dataclass(frozen=True, slots=True)
class Bar:
    """A step on a stage, milliseconds."""

    step: int
    stage: int
    begin: float
    end: float


def schedule(lookahead: int) -> list[Bar]:
    """The steps of the scheduler over simulated stages."""
    lane = {**CONTENT["lane"], "lookahead": lookahead}
    simulation = Simulation(parse({**CONTENT, "lane": lane}, "plot"))
    bars: list[Bar] = []
    run = simulation.pipeline.run

    def record(number: int, *args: Any) -> Any:
        times = run(number, *args)
        bars.extend(
            Bar(number, stage, begin / 1e6, end / 1e6)
            for stage, (begin, end) in enumerate(zip(times.begins, times.ends, strict=True))
        )
        return times

    simulation.pipeline.run = record  # type: ignore[method-assign, assignment]
    simulation.run()
    return bars


def idle_share(bars: list[Bar], stage: int = 0) -> float:
    """Of the time shown: in which a stage has nothing to do."""
    begin, end = SHOWN_MS
    busy = sum(max(0.0, min(bar.end, end) - max(bar.begin, begin)) for bar in bars if bar.stage == stage)
    return 1 - busy / (end - begin)


def plot(path: str) -> None:
    """Draw lookahead 0 and 1 side by side."""
    import matplotlib

    matplotlib.use("agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(1, 2, figsize=(13, 3.1), sharey=True, layout="constrained")
    colours = pyplot.get_cmap("tab10").colors  # type: ignore[attr-defined]
    for axis, lookahead in zip(axes, (0, 1), strict=True):
        bars = schedule(lookahead)
        for bar in bars:
            if bar.end < SHOWN_MS[0] or bar.begin > SHOWN_MS[1]:
                continue
            axis.barh(
                bar.stage,
                bar.end - bar.begin,
                left=bar.begin,
                height=0.8,
                color=colours[bar.step % NUM_STAGES],
                edgecolor="white",
                linewidth=0.6,
            )
            if bar.begin >= SHOWN_MS[0] and bar.end <= SHOWN_MS[1]:
                axis.text(
                    (bar.begin + bar.end) / 2, bar.stage, bar.step, ha="center", va="center", fontsize=6
                )
        axis.set_xlim(SHOWN_MS)
        axis.set_xlabel("milliseconds")
        axis.set_title(f"lookahead {lookahead}: stage 0 idle {idle_share(bars):.0%} of the time", fontsize=10)
        axis.spines[["top", "right"]].set_visible(False)
    axes[0].set_yticks(range(NUM_STAGES), [f"stage {stage}" for stage in range(NUM_STAGES)])
    axes[0].invert_yaxis()
    figure.suptitle(
        f"64 streams in {NUM_STAGES} microbatches, {COST.split(' +')[0]} a stage, 0.1 ms a hop, "
        "1.6 ms from the last stage through the router to the first; numbers are steps, blanks are bubbles",
        fontsize=9,
    )
    figure.savefig(path, dpi=130)
    pyplot.close(figure)
