"""The rows of the GPU benchmarks, worked out from the lines of their runs. Pure."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

Lines = Sequence[Mapping[str, Any]]
GROUPS = "ABCD"


@dataclass(frozen=True, slots=True, kw_only=True)
class GPURow:
    """One figure of the table."""

    name: str
    group: str
    unit: str
    value: float | None
    target: float | None = None
    stretch: float | None = None
    at_most: bool = False
    """The target is a ceiling."""
    reference: str = ""
    """vLLM's figure of the same machine; or why there is no value."""
    runs: tuple[str, ...] = ()
    """The runs it comes from, ours first."""


class Runs:
    """The lines of every run that was carried out, by its name."""

    def __init__(self, lines: Mapping[str, Lines]) -> None:
        self._lines = lines

    def find(self, run: str, measure: str, **facts: object) -> Mapping[str, Any] | None:
        """The last line of a measure with these facts."""
        for line in reversed(self._lines.get(run, ())):
            if line["measure"] == measure and all(line.get(key) == value for key, value in facts.items()):
                return line
        return None

    def get(self, run: str, measure: str, key: str, **facts: object) -> float | None:
        """A number of such a line."""
        line = self.find(run, measure, **facts)
        value = None if line is None else line.get(key)
        return float(value) if isinstance(value, int | float) else None

    def why(self, run: str) -> str:
        """Why a run has no such figure."""
        if run not in self._lines:
            return f"{run} was not run"
        error = self.find(run, "error")
        return f"{run}: {error['what']}" if error else f"{run} did not measure it"

    def fallback(self, run: str) -> str:
        """What a run of ours fell back to, if anything; such a run counts as not run."""
        engine = self.find(run, "engine")
        if engine is None or "links" not in engine:
            return ""
        for stage, (transport, reason) in enumerate(engine["links"]):
            if len(engine["links"]) > 1 and transport != "nccl":
                return f"{run}: the link of stage {stage} is {transport} ({reason})"
        described = [stage.get("description", {}) for stage in engine["status"]["lanes"][0]["stages"]]
        for rank in (rank for stage in described for rank in stage.get("ranks", ())):
            if not str(rank.get("device", "")).startswith("cuda"):
                return f"{run}: a rank computes on {rank.get('device')}"
            attention = str(rank.get("backends", {}).get("attention", "flashinfer"))
            if not attention.startswith("flashinfer"):
                return f"{run}: attention is {attention}"
        return ""

    def tok_s(self, run: str, requests: int) -> float | None:
        """Output tokens per second of a throughput measurement."""
        return self.get(run, "throughput", "output_tok_s", requests=requests)

    def step_ms(self, run: str, batch: int) -> float | None:
        """Steady step time of a decode measurement."""
        return self.get(run, "decode", "itl_ms_steady", batch=batch)


def rows_of_group(group: str, runs: Runs) -> list[GPURow]:
    """Every row of a group; one that was not measured has no value and says why."""
    return {"A": _rows_a, "B": _rows_b, "C": _rows_c, "D": _rows_d}[group](runs)


def _rows_a(runs: Runs) -> list[GPURow]:
    rows = [
        _against(
            runs,
            f"step, batch {batch}",
            "A",
            "ms",
            ("ours-1x1", runs.step_ms("ours-1x1", batch)),
            ("vllm-1x1", runs.step_ms("vllm-1x1", batch)),
            published=published,
            stretch=stretch,
            at_most=True,
        )
        for batch, published, stretch in (
            (1, 4.92, 4.4),
            (16, 5.19, 4.6),
            (64, 6.00, 5.4),
            (256, 10.97, 10.0),
        )
    ]
    for requests, peer, published in ((512, "vllm-1x1", 9677.0), (2048, "vllm-1x1-2048", 9570.0)):
        rows.append(
            _against(
                runs,
                f"{requests:,} requests, output",
                "A",
                "tok/s",
                ("ours-1x1", runs.tok_s("ours-1x1", requests)),
                (peer, runs.tok_s(peer, requests)),
                published=published,
                stretch_factor=1.15,
            )
        )
    rows.append(
        _against(
            runs,
            "KV tokens at the same memory share",
            "A",
            "tokens",
            ("ours-1x1", runs.get("ours-1x1", "engine", "kv_tokens")),
            ("vllm-1x1", runs.get("vllm-1x1", "engine", "kv_tokens")),
            published=897280.0,
        )
    )
    rows.append(
        _against(
            runs,
            "start to ready, warm caches",
            "A",
            "s",
            ("ours-1x1-warm", runs.get("ours-1x1-warm", "engine", "start_s")),
            ("vllm-1x1-2048", runs.get("vllm-1x1-2048", "engine", "start_s")),
            factor=0.5,
            stretch=15.0,
            at_most=True,
        )
    )
    ours, theirs = runs.step_ms("ours-1x1", 64), runs.step_ms("transformers-1", 64)
    rows.append(
        _ratio(
            runs,
            "decode at batch 64 over transformers' generate",
            "A",
            ("ours-1x1", None if ours is None else 64e3 / ours),
            ("transformers-1", None if theirs is None else 64e3 / theirs),
            target=3.0,
        )
    )
    return rows


def _rows_b(runs: Runs) -> list[GPURow]:
    # The larger figure of one GPU in this lease, whichever run it comes from.
    one = _largest(
        [
            (run, _larger(runs, run, counts))
            for run, counts in (("ours-1x1-b", (512, 1024)), ("ours-1x1", (512, 2048)))
        ]
    )
    return [
        _against(
            runs,
            "2 stages, 512 requests, output",
            "B",
            "tok/s",
            ("ours-2x1", runs.tok_s("ours-2x1", 512)),
            ("vllm-pp2", runs.tok_s("vllm-pp2", 512)),
            published=16112.0,
            stretch_factor=1.1,
        ),
        _ratio(
            runs,
            "2 stages, 1,024 requests, over our one GPU",
            "B",
            ("ours-2x1", runs.tok_s("ours-2x1", 1024)),
            one,
            target=1.75,
            stretch=1.9,
        ),
        *_of_the_load(runs, "B", "ours-2x1", 1024),
        _against(
            runs,
            "TP=2, step, batch 1",
            "B",
            "ms",
            ("ours-1x2", runs.step_ms("ours-1x2", 1)),
            ("vllm-tp2", runs.step_ms("vllm-tp2", 1)),
            published=3.51,
            stretch=3.0,
            at_most=True,
        ),
        _against(
            runs,
            "TP=2, 512 requests, output",
            "B",
            "tok/s",
            ("ours-1x2", runs.tok_s("ours-1x2", 512)),
            ("vllm-tp2", runs.tok_s("vllm-tp2", 512)),
            published=15836.0,
            stretch_factor=1.15,
        ),
    ]


def _rows_c(runs: Runs) -> list[GPURow]:
    ours = "ours-4x1"
    headline = runs.tok_s(ours, 2048)
    best = _largest(
        [("vllm-pp4", runs.tok_s("vllm-pp4", 512)), ("vllm-pp4-2048", runs.tok_s("vllm-pp4-2048", 2048))]
    )
    one = _larger(runs, "ours-1x1-c", (512, 2048))
    tp4 = runs.tok_s("vllm-tp4-2048", 2048)
    rows = [
        _own(
            runs,
            "4 stages, 2,048 requests, output",
            "C",
            "tok/s",
            (ours, headline),
            target=31000.0,
            stretch=36000.0,
            reference=f"vLLM TP=4, 2,048 sequences: {_told(tp4)}",
        ),
        _ratio(runs, "the same over vLLM PP=4's best", "C", (ours, headline), best, target=1.3),
        _ratio(
            runs,
            "the same as a share of four single GPUs",
            "C",
            (ours, headline),
            ("ours-1x1-c", None if one is None else 4 * one),
            target=0.78,
            stretch=0.90,
        ),
        *_of_the_load(runs, "C", ours, 2048, busy=0.93, busy_stretch=0.97, us_per_token=5.0, ms_per_step=1.0),
        _against(
            runs,
            "4 stages, 512 requests, output",
            "C",
            "tok/s",
            (ours, runs.tok_s(ours, 512)),
            ("vllm-pp4", runs.tok_s("vllm-pp4", 512)),
            published=14527.0,
            factor=1.4,
            stretch=24000.0,
        ),
    ]
    for batch, target, stretch in ((64, 7.0, 4.8), (256, 9.0, 5.8)):
        theirs = runs.step_ms("vllm-pp4", batch)
        rows.append(
            _own(
                runs,
                f"4 stages, step, {batch} sequences in all",
                "C",
                "ms",
                (ours, runs.step_ms(ours, batch)),
                target=target,
                stretch=stretch,
                at_most=True,
                reference=f"vLLM PP=4: {_told(theirs)} ms",
            )
        )
    rows.append(
        _against(
            runs,
            "2 stages x TP=2, 512 requests, output",
            "C",
            "tok/s",
            ("ours-2x2", runs.tok_s("ours-2x2", 512)),
            ("vllm-2x2", runs.tok_s("vllm-2x2", 512)),
            published=23432.0,
            stretch_factor=1.15,
        )
    )
    return rows


def _rows_d(runs: Runs) -> list[GPURow]:
    ours = _largest([(run, runs.tok_s(run, 1024)) for run in ("ours-70b-2x2", "ours-70b-4x1")])
    theirs = _largest(
        [(run, runs.tok_s(run, 1024)) for run in ("vllm-70b-tp4", "vllm-70b-pp4", "vllm-70b-2x2")]
    )
    return [
        _ratio(
            runs,
            "70B shape, 1,024 requests: our best layout over vLLM's",
            "D",
            ours,
            theirs,
            target=1.0,
            stretch=1.3,
        )
    ]


Figure = tuple[str, float | None]
"""A run and its figure."""


def _of_the_load(
    runs: Runs,
    group: str,
    run: str,
    requests: int,
    *,
    busy: float | None = None,
    busy_stretch: float | None = None,
    us_per_token: float | None = None,
    ms_per_step: float | None = None,
) -> list[GPURow]:
    """What one load cost the stages and the scheduler; without targets it is there to be known."""
    load = runs.find(run, "throughput", requests=requests) or {}
    shares = load.get("busy_shares")
    return [
        _own(
            runs,
            "the same: busy share of the slowest stage",
            group,
            "share",
            (run, max(shares) if shares else None),
            target=busy,
            stretch=busy_stretch,
            reference=f"each stage: {shares}",
        ),
        _own(
            runs,
            "the same: scheduler CPU per token",
            group,
            "us",
            (run, load.get("router_cpu_us_per_token")),
            target=us_per_token,
            at_most=True,
            reference=f"workers beside it: {load.get('router_workers_cpu_s')} s in all",
        ),
        _own(
            runs,
            "the same: scheduler CPU per step",
            group,
            "ms",
            (run, load.get("router_cpu_ms_per_step")),
            target=ms_per_step,
            at_most=True,
            reference=f"{load.get('steps')} steps",
        ),
    ]


def _against(
    runs: Runs,
    name: str,
    group: str,
    unit: str,
    ours: Figure,
    theirs: Figure,
    *,
    published: float | None = None,
    factor: float = 1.0,
    stretch: float | None = None,
    stretch_factor: float | None = None,
    at_most: bool = False,
) -> GPURow:
    """A row whose target is vLLM's figure of this machine, times `factor`."""
    peer = theirs[1]
    if peer is None:
        reference = f"no target: {runs.why(theirs[0])}"
    else:
        reference = f"vLLM here {_told(peer)} {unit}"
    if published is not None:
        reference += f"; vLLM on H200, published {published:,g}"
    return _row(
        runs,
        GPURow(
            name=name,
            group=group,
            unit=unit,
            value=ours[1],
            target=None if peer is None else factor * peer,
            stretch=stretch_factor * peer if stretch_factor and peer is not None else stretch,
            at_most=at_most,
            reference=reference,
            runs=(ours[0], theirs[0]),
        ),
    )


def _ratio(
    runs: Runs,
    name: str,
    group: str,
    ours: Figure,
    theirs: Figure,
    *,
    target: float,
    stretch: float | None = None,
) -> GPURow:
    """A row that is one figure over another."""
    value = ours[1] / theirs[1] if ours[1] is not None and theirs[1] else None
    reference = f"{ours[0]} {_told(ours[1])}, {theirs[0]} {_told(theirs[1])} tok/s"
    if value is None:
        missing = ours[0] if ours[1] is None else theirs[0]
        reference = f"{runs.why(missing)}; {reference}"
    row = GPURow(
        name=name,
        group=group,
        unit="x",
        value=value,
        target=target,
        stretch=stretch,
        reference=reference,
        runs=(ours[0], theirs[0]),
    )
    return _row(runs, row)


def _own(
    runs: Runs,
    name: str,
    group: str,
    unit: str,
    ours: Figure,
    *,
    target: float | None,
    stretch: float | None = None,
    at_most: bool = False,
    reference: str = "",
) -> GPURow:
    """A row with a target of its own, or with none."""
    return _row(
        runs,
        GPURow(
            name=name,
            group=group,
            unit=unit,
            value=ours[1],
            target=target,
            stretch=stretch,
            at_most=at_most,
            reference=reference,
            runs=(ours[0],),
        ),
    )


def _row(runs: Runs, row: GPURow) -> GPURow:
    """The row, or without its value if one of our runs behind it fell back to something slower."""
    fallback = next(
        (text for text in (runs.fallback(run) for run in row.runs if run.startswith("ours")) if text), ""
    )
    why = ""
    if fallback:
        why = f"counts as not run: {fallback}"
    elif (row.value is None and runs.find(row.runs[0], "spec") is None) or (
        row.value is None and not row.reference
    ):
        why = runs.why(row.runs[0])
    if not why or row.reference.startswith(why):
        return row
    return GPURow(
        name=row.name,
        group=row.group,
        unit=row.unit,
        value=None,
        target=row.target,
        stretch=row.stretch,
        at_most=row.at_most,
        reference=f"{why}; {row.reference}" if row.reference else why,
        runs=row.runs,
    )


def _larger(runs: Runs, run: str, requests: Sequence[int]) -> float | None:
    found = [value for count in requests if (value := runs.tok_s(run, count)) is not None]
    return max(found, default=None)


def _largest(figures: Sequence[Figure]) -> Figure:
    known = [(run, value) for run, value in figures if value is not None]
    return max(known, key=lambda figure: figure[1]) if known else figures[0]


def _told(value: float | None) -> str:
    return "not measured" if value is None else f"{value:,.4g}" if value < 1000 else f"{value:,.0f}"
