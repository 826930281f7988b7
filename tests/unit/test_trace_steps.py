"""Steps, gaps and shares out of a profiler trace, and the floors beside them."""

from __future__ import annotations

import gzip
import importlib
import json
from pathlib import Path
from typing import Any

import pytest
from benchmarks_for_tests import BENCHMARKS, import_benchmark


@pytest.fixture
def trace_steps(monkeypatch: pytest.MonkeyPatch) -> Any:
    return import_benchmark(monkeypatch, "trace_steps")


def write_trace(path: Path, num_steps: int) -> Path:
    """Steps of 100 us: a copy of 2, then a graph of 10 kernels of 8 us from 10 on; every fifth comes 30 late."""
    events: list[dict[str, Any]] = [{"ph": "M", "name": "process_name"}]

    def add(name: str, begin: float, length: float, correlation: int, kind: str = "kernel") -> None:
        arguments = {"correlation": correlation}
        events.append({"ph": "X", "cat": kind, "name": name, "ts": begin, "dur": length, "args": arguments})

    at = 1000.0
    for step in range(num_steps):
        at += 30 if step % 5 == 4 else 0
        add("Memcpy HtoD (Pinned -> Device)", at, 2, 2 * step, "gpu_memcpy")
        names = ["nvjet_tst"] * 6 + [
            "BatchPrefillWithPagedKVCacheKernel",
            "_norm",
            "_rope_append",
            "_score_part",
        ]
        for index, name in enumerate(names):
            add(name, at + 10 + 8 * index, 8, 2 * step + 1)
        at += 100
    events.append({"ph": "X", "cat": "cuda_runtime", "name": "cudaGraphLaunch", "ts": 0, "dur": 9})
    with gzip.open(path, "wt") as file:
        json.dump({"traceEvents": events}, file)
    return path


def test_gaps_between_replays(trace_steps: Any, tmp_path: Path) -> None:
    spans = trace_steps.read_spans(write_trace(tmp_path / "t.json.gz", 23))
    steps = trace_steps.steps_of(spans)
    assert len(steps) == 20
    gaps = trace_steps.gaps_us(steps)
    assert len(gaps) == 19
    assert (min(gaps), max(gaps)) == (20, 50)
    assert sum(gap == 50 for gap in gaps) == 4
    assert trace_steps.quantile(gaps, 0.99) == 50
    assert trace_steps.quantile(gaps, 0.5) == 20
    assert trace_steps.quantile([1.0], 0.99) == 1.0
    assert trace_steps.gap_parts_us(spans, steps) == {"copies": 2, "before copies": 10, "after copies": 8}


def test_every_microsecond_is_somewhere(trace_steps: Any, tmp_path: Path) -> None:
    spans = trace_steps.read_spans(write_trace(tmp_path / "t.json.gz", 23))
    steps = trace_steps.steps_of(spans)
    times = trace_steps.times_by_kind(spans, steps)
    assert sum(times.values()) == pytest.approx((steps[-1].end - steps[0].begin) / len(steps))
    assert times["linears"] == pytest.approx(48)
    for kind in ("attention", "norms", "sampling", "rope, activation, tables"):
        assert times[kind] == pytest.approx(8), kind
    # 19 copies of 2 between 20 steps; the rest of the gaps is idle.
    assert times["copies"] == pytest.approx(2 * 19 / 20)
    assert times["launch gaps"] == pytest.approx((15 * 18 + 4 * 48) / 20)


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("nvjet_sm90_tst_64x8_64x16_2x1_v_bz_splitK_TNT", "linears"),
        ("void cublasLt::splitKreduce_kernel<32, 16, int, float>", "linears"),
        ("void flashinfer::PersistentVariableLengthMergeStatesKernel<8u>", "attention"),
        ("ncclDevKernel_SendRecv(ncclDevKernelArgsStorage<4096ul>)", "link"),
        ("ncclDevKernel_AllReduce_Sum_bf16_RING_LL", "all-reduce"),
        ("_norm", "norms"),
        ("_silu_mul", "rope, activation, tables"),
        ("_take", "sampling"),
        ("Memcpy DtoH (Device -> Pinned)", "copies"),
        ("something_else", "other"),
    ],
)
def test_kinds(trace_steps: Any, name: str, kind: str) -> None:
    assert trace_steps.kind_of(name) == kind


def test_floors_of_the_8b_shape(monkeypatch: pytest.MonkeyPatch) -> None:
    module = import_benchmark(monkeypatch, "where_time_goes")
    config = json.loads((BENCHMARKS / "shapes" / "llama-3.1-8b" / "config.json").read_text())
    machine = module.Machine(tb_s=4.17, tflops=790.0)
    floors = module.floors_us(config, machine, batch=1, context=128, stages=1, tp=1)
    assert floors["linears"] == pytest.approx(3600, rel=0.01)  # 15.0 GB: the 3.6 ms
    many = module.floors_us(config, machine, batch=512, context=128, stages=1, tp=1)
    assert many["linears"] == pytest.approx(2 * 7.5e9 * 512 / 790e12 * 1e6, rel=0.01)
    half = module.floors_us(config, machine, batch=1, context=128, stages=1, tp=2)
    assert half["linears"] == pytest.approx(floors["linears"] / 2)
    assert half["all-reduce"] > 0 == floors["all-reduce"]


def test_rows_of_traced_steps_have_run_since_they_were_admitted(
    trace_steps: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    traces = importlib.import_module("gpu_traces")
    (tmp_path / "traces").mkdir()
    write_trace(tmp_path / "traces" / "rank-7-rows-64.json.gz", 23)
    lines = [
        {"measure": "throughput", "requests": 64, "output_tokens": 64 * 75, "steps": 105.0},
        {"measure": "decode", "batch": 64, "itl_ms_steady": 7.5},
    ]
    (tmp_path / "trace.jsonl").write_text("\n".join(json.dumps(line) for line in lines))
    found = traces.read_traced(tmp_path, [1, 64])
    assert list(found.traces) == [64]
    assert found.step_ms == {64: 7.5}
    # 20 of 23 steps count; the last request was admitted 30 steps after the first, the mean one after 15.
    begin = 30 + traces.SKIP + 3
    assert found.mean_context[64] == 128 + (begin + begin + 20) / 2 - 15
