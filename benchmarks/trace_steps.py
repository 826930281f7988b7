"""Device steps out of a profiler trace of decode steps by CUDA graphs. Pure."""

from __future__ import annotations

import gzip
import json
import re
import statistics
from bisect import bisect_left
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

MIN_KERNELS = 8
"""Of a graph replay; launches with fewer are a step's copies and what follows its graph."""
DROP = 3
"""Steps left out after the profiler's start, in which the pipeline of launches fills."""
KINDS: tuple[tuple[str, str], ...] = (
    ("link", r"SendRecv|ncclDevKernel_(Send|Recv)"),
    ("all-reduce", r"nccl|one_shot|two_shot|multimem|all_?reduce|symm_mem"),
    ("attention", r"Batch(Prefill|Decode)With|MergeStates|_attend|flash"),
    ("sampling", r"_score|_take|argmax|gumbel|_choose|topk|sort|softmax"),
    ("linears", r"gemm|nvjet|cutlass|xmma|cublas|splitK|gemv"),
    ("norms", r"norm"),
    ("rope, activation, tables", r"rope|silu|embed|flatten|change|_tables|add|elementwise"),
    ("copies", r"Memcpy|Memset|_transfer"),
)


@dataclass(frozen=True, slots=True)
class Span:
    """One kernel or copy, microseconds."""

    begin: float
    end: float
    name: str
    correlation: int


@dataclass(frozen=True, slots=True)
class Step:
    """One replay of a graph."""

    begin: float
    end: float
    spans: tuple[Span, ...]


def read_spans(path: Path) -> list[Span]:
    """Everything the device did, in order of its begin."""
    opener = gzip.open if path.suffix == ".gz" else open
    with opener(path, "rt") as file:
        events: Sequence[Mapping[str, Any]] = json.load(file)["traceEvents"]
    spans = [
        Span(
            begin=float(event["ts"]),
            end=float(event["ts"]) + float(event["dur"]),
            name=str(event["name"]),
            correlation=int(event.get("args", {}).get("correlation", -1)),
        )
        for event in events
        if event.get("ph") == "X" and event.get("cat") in ("kernel", "gpu_memcpy", "gpu_memset")
    ]
    return sorted(spans, key=lambda span: span.begin)


def steps_of(spans: Sequence[Span], *, drop: int = DROP) -> list[Step]:
    """The steps, without the first ones."""
    groups: dict[int, list[Span]] = {}
    for span in spans:
        groups.setdefault(span.correlation, []).append(span)
    replays = [group for group in groups.values() if len(group) >= MIN_KERNELS]
    steps = [
        Step(min(span.begin for span in group), max(span.end for span in group), tuple(group))
        for group in replays
    ]
    return sorted(steps, key=lambda step: step.begin)[drop:]


def gaps_us(steps: Sequence[Step]) -> list[float]:
    """From the end of a step's last kernel to the begin of the next one's first; copies between count as gap."""
    return [max(0.0, later.begin - earlier.end) for earlier, later in pairwise(steps)]


def gap_parts_us(spans: Sequence[Span], steps: Sequence[Step]) -> dict[str, float]:
    """What fills a gap in the median: copies, waiting for them, and waiting after the last of them for the graph."""
    begins = [span.begin for span in spans]
    parts: dict[str, list[float]] = {"copies": [], "before copies": [], "after copies": []}
    for earlier, later in pairwise(steps):
        first, last = bisect_left(begins, earlier.end), bisect_left(begins, later.begin)
        between = [span for span in spans[first:last] if span.correlation not in _numbers(earlier, later)]
        copied = sum(span.end - span.begin for span in between)
        copies_end = max((span.end for span in between), default=earlier.end)
        parts["copies"].append(copied)
        parts["before copies"].append(copies_end - earlier.end - copied)
        parts["after copies"].append(later.begin - copies_end)
    return {name: statistics.median(values) for name, values in parts.items()}


def _numbers(*steps: Step) -> set[int]:
    return {step.spans[0].correlation for step in steps}


def quantile(values: Sequence[float], share: float) -> float:
    """The least value that `share` of all do not exceed."""
    ordered = sorted(values)
    return ordered[min(len(ordered) - 1, max(0, -(-int(share * len(ordered) * 1000) // 1000) - 1))]


def kind_of(name: str) -> str:
    """What a kernel is for."""
    return next((kind for kind, pattern in KINDS if re.search(pattern, name, re.IGNORECASE)), "other")


def times_by_kind(spans: Sequence[Span], steps: Sequence[Step]) -> dict[str, float]:
    """Microseconds a step by kind, over the time from the first step's begin to the last one's end.

    Kernels that overlap count once, for the one that began first; 'launch gaps' is when the device did nothing.
    """
    begin, end = steps[0].begin, steps[-1].end
    totals: dict[str, float] = {}
    busy_until = begin
    for span in spans:
        if span.end <= begin or span.begin >= end:
            continue
        used = min(span.end, end) - max(span.begin, busy_until, begin)
        if used > 0:
            kind = kind_of(span.name)
            totals[kind] = totals.get(kind, 0.0) + used
        busy_until = max(busy_until, span.end)
    totals["launch gaps"] = (end - begin) - sum(totals.values())
    return {kind: total / len(steps) for kind, total in totals.items()}
