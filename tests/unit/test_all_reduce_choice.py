"""How ranks on GPUs choose a way to sum: timed in graphs, rank 0's choice for all, kept by what was timed."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from stagemesh.stage.cuda import reduce
from stagemesh.stage.cuda.fused_reduce import FUSED_ROWS, FusedReducer
from stagemesh.stage.cuda.reduce import KINDS, MEASURED_ROWS, SharedReducer, time_in_graph
from stagemesh.stage.group import RankGroup


@pytest.fixture(autouse=True)
def no_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "a GPU")


class Ranks:
    """What rank 0 broadcasts, for the reducers of other ranks."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self._said: list[list[int]] = []
        ranks = self

        def agree(reducer: SharedReducer, choices: list[int]) -> list[int]:
            if reducer._group.rank == 0:
                ranks._said.append(choices)
                return choices
            return ranks._said.pop(0)

        monkeypatch.setattr(SharedReducer, "_agree", agree)


def make(kind: type[SharedReducer], rank: int = 0, rows: int = 2048) -> Any:
    reducer: Any = kind.__new__(kind)
    reducer._group = RankGroup(rank, 2)
    reducer.partial, reducer._out = torch.zeros(rows, 8), torch.zeros(rows, 8)
    return reducer


def times(fastest: Callable[[int], str], asked: list[tuple[int, str]]) -> Any:
    """A clock by which that kind is the fastest at so many rows."""

    def time_of(call: Any) -> float:
        kind, part = call.args
        asked.append((part.shape[0], kind))
        return 1.0 if kind == fastest(part.shape[0]) else 2.0

    return time_of


def by_rows(rows: int) -> str:
    return "one_shot" if rows <= 64 else "nccl" if rows <= 128 else "two_shot" if rows <= 512 else "nccl"


def test_the_crossovers_are_those_of_the_times(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    Ranks(monkeypatch)
    reducer, asked = make(SharedReducer), list[tuple[int, str]]()
    reducer.measure(tmp_path / "there" / "all-reduce.json", times(by_rows, asked))
    assert asked == [(rows, kind) for rows in MEASURED_ROWS for kind in KINDS]
    for rows in (1, 2, 33, 64, 65, 128, 129, 512, 513, 1024, 1025, 8192):
        assert reducer.kind(rows) == by_rows(rows), rows
    assert reducer.name == "one_shot to 64 rows, nccl to 128 rows, two_shot to 512 rows, nccl to 1024 rows"


def test_what_was_timed_in_graphs_is_kept_and_older_times_are_not_used(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    Ranks(monkeypatch)
    cache, asked = tmp_path / "all-reduce.json", list[tuple[int, str]]()
    old = {"a GPU x2 8 torch.float32": [1] * len(MEASURED_ROWS)}
    cache.write_text(json.dumps(old))
    make(SharedReducer).measure(cache, times(by_rows, asked))
    assert asked, "times of calls outside of graphs were used"
    kept = json.loads(cache.read_text())
    assert old.items() < kept.items()
    asked.clear()
    again = make(SharedReducer)
    again.measure(cache, times(by_rows, asked))
    assert (asked, again.kind(64), again.kind(512)) == ([], "one_shot", "two_shot")


def test_rank_0_chooses_for_all(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Clocks that differ: both make the same calls and end with one choice; only rank 0 reads and writes the cache."""
    Ranks(monkeypatch)
    first, second = list[tuple[int, str]](), list[tuple[int, str]]()
    caches = [tmp_path / "0.json", tmp_path / "1.json"]
    reducers = [make(SharedReducer, rank) for rank in range(2)]
    reducers[0].measure(caches[0], times(by_rows, first))
    reducers[1].measure(caches[1], times(lambda rows: "two_shot", second))
    assert first == second
    assert reducers[0]._crossovers == reducers[1]._crossovers
    assert [cache.exists() for cache in caches] == [True, False]


def test_ranks_that_time_it_differently_measure_the_same_sums(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    Ranks(monkeypatch)
    monkeypatch.setattr(SharedReducer, "measure", lambda reducer, *_, **__: None)

    def measure(cache: Path, fast_to: int, *, pdl: bool = False) -> tuple[int, int]:
        """What is chosen, and the calls that were timed, where one kernel is faster up to so many rows."""
        reducer, calls = make(FusedReducer, rows=FUSED_ROWS[-1]), list[int]()

        def time_of(call: Any) -> float:
            rows, together = call.args[0].shape[0], call.func.__name__ == "_fused"
            assert call.keywords == {"pdl": pdl}
            calls.append(rows)
            return 1.0 if together == (rows <= fast_to) else 2.0

        reducer.measure(cache, time_of, pdl=pdl)
        return reducer._fused_rows, len(calls)

    assert measure(tmp_path / "all", FUSED_ROWS[-1]) == (FUSED_ROWS[-1], 2 * len(FUSED_ROWS))
    assert measure(tmp_path / "some", 8) == (8, 2 * len(FUSED_ROWS))
    assert measure(tmp_path / "none", 0) == (0, 2 * len(FUSED_ROWS))
    # Kept, none too, and apart by whether kernels overlap.
    assert measure(tmp_path / "none", 8) == (0, 0)
    assert measure(tmp_path / "none", 8, pdl=True) == (8, 2 * len(FUSED_ROWS))


def test_a_call_is_timed_in_a_graph_that_all_ranks_replay_together(monkeypatch: pytest.MonkeyPatch) -> None:
    done: list[str] = []
    clock = iter([0.0, *(1.0 + index for index in range(reduce.REPLAYS - 1)), 99.0])
    """ms at each event: replays of 1 ms, and a last one that something held up."""

    class Event:
        def __init__(self, *, enable_timing: bool) -> None:
            self.at = 0.0

        def record(self) -> None:
            done.append("event")
            self.at = next(clock)

        def elapsed_time(self, end: Event) -> float:
            return end.at - self.at

    class Graph:
        def replay(self) -> None:
            done.append("replay")

    @contextlib.contextmanager
    def capture(graph: Graph, *, capture_error_mode: str) -> Iterator[None]:
        assert capture_error_mode == "thread_local"
        done.append("begin")
        yield
        done.append("end")

    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(torch.cuda, "CUDAGraph", Graph)
    monkeypatch.setattr(torch.cuda, "graph", capture)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: done.append("synchronize"))
    monkeypatch.setattr(torch.distributed, "barrier", lambda: done.append("barrier"))
    assert time_in_graph(lambda: done.append("call")) == pytest.approx(1000 / reduce.CALLS)
    warm_up = ["call"] * reduce.WARM_UPS
    captured = ["begin", *["call"] * reduce.CALLS, "end"]
    assert done[: len(warm_up) + 1 + len(captured)] == [*warm_up, "synchronize", *captured]
    timed = ["event", *["replay", "event"] * reduce.REPLAYS, "synchronize"]
    assert done[-len(timed) - 3 :] == ["replay", "synchronize", "barrier", *timed]


@pytest.mark.parametrize("content", ["", '{"a GPU x2 8 torch.float32 in a gra'])
def test_a_file_that_was_cut_off_is_measured_anew(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, content: str
) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "a GPU")
    Ranks(monkeypatch)
    cache = tmp_path / "all-reduce.json"
    cache.write_text(content)
    reducer = make(SharedReducer)
    reducer.measure(cache, times(by_rows, []))
    assert reducer.kind(64) == "one_shot"
    assert len(json.loads(cache.read_text())) == 1
    assert list(tmp_path.iterdir()) == [cache]


def test_a_folder_that_cannot_be_written_costs_the_next_start_a_measurement(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "a GPU")
    Ranks(monkeypatch)
    (tmp_path / "file").touch()
    reducer = make(SharedReducer)
    reducer.measure(tmp_path / "file" / "all-reduce.json", times(by_rows, []))
    assert reducer.kind(64) == "one_shot"
