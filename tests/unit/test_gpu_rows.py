"""The rows of benchmarks/gpu.py, from lines as its runs leave them."""

from __future__ import annotations

from typing import Any

import pytest
from benchmarks_for_tests import import_benchmark

ON_GPU = {"lanes": [{"stages": [{"description": {"ranks": [{"device": "cuda:0 NVIDIA H200"}]}}]}]}


@pytest.fixture
def rows(monkeypatch: pytest.MonkeyPatch) -> Any:
    return import_benchmark(monkeypatch, "gpu_rows")


def engine(links: list[list[str]], **facts: object) -> dict[str, Any]:
    return {"measure": "engine", "links": links, "status": ON_GPU, **facts}


def decode(batch: int, step_ms: float) -> dict[str, Any]:
    return {"measure": "decode", "batch": batch, "itl_ms_steady": step_ms}


def throughput(requests: int, tok_s: float, **facts: object) -> dict[str, Any]:
    return {"measure": "throughput", "requests": requests, "output_tok_s": tok_s, **facts}


def table(rows: Any, group: str, runs: dict[str, Any]) -> dict[str, Any]:
    return {row.name: row for row in rows.rows_of_group(group, rows.Runs(runs))}


def test_targets_are_what_vllm_reached_here(rows: Any) -> None:
    found = table(
        rows,
        "A",
        {
            "ours-1x1": [
                engine([["local", ""]], kv_tokens=900_000),
                decode(1, 4.5),
                throughput(512, 11_000.0),
            ],
            "ours-1x1-warm": [engine([["local", ""]], start_s=18.0)],
            "vllm-1x1": [
                {"measure": "engine", "kv_tokens": 897_280},
                decode(1, 4.9),
                throughput(512, 9_700.0),
            ],
            "vllm-1x1-2048": [{"measure": "engine", "start_s": 60.0}],
        },
    )
    step = found["step, batch 1"]
    assert (step.value, step.target, step.stretch, step.at_most) == (4.5, 4.9, 4.4, True)
    many = found["512 requests, output"]
    assert (many.value, many.target) == (11_000.0, 9_700.0)
    assert many.stretch == pytest.approx(1.15 * 9_700)
    start = found["start to ready, warm caches"]
    assert (start.value, start.target) == (18.0, 30.0)
    kv = found["KV tokens at the same memory share"]
    assert (kv.value, kv.target) == (900_000, 897_280)
    assert found["step, batch 16"].value is None
    assert "ours-1x1 did not measure it" in found["step, batch 16"].reference


def test_a_fallback_counts_as_not_run(rows: Any) -> None:
    runs = {
        "ours-2x1": [engine([["grpc", "no nccl on stage 1"], ["nccl", ""]]), throughput(512, 17_000.0)],
        "vllm-pp2": [throughput(512, 16_000.0)],
    }
    row = table(rows, "B", runs)["2 stages, 512 requests, output"]
    assert row.value is None
    assert "counts as not run: ours-2x1: the link of stage 0 is grpc (no nccl on stage 1)" in row.reference
    runs["ours-2x1"][0] = engine([["nccl", ""], ["nccl", ""]])
    assert table(rows, "B", runs)["2 stages, 512 requests, output"].value == 17_000.0


def test_shares_and_ratios_of_four_stages(rows: Any) -> None:
    load = throughput(
        2048,
        33_000.0,
        busy_shares=[0.9, 0.95, 0.9, 0.88],
        router_cpu_us_per_token=4.0,
        router_cpu_ms_per_step=0.8,
    )
    runs = {
        "ours-4x1": [engine([["nccl", ""]] * 4), load],
        "ours-1x1-c": [engine([["local", ""]]), throughput(512, 9_900.0), throughput(2048, 10_000.0)],
        "vllm-pp4": [throughput(512, 14_500.0)],
        "vllm-pp4-2048": [throughput(2048, 22_000.0)],
    }
    found = table(rows, "C", runs)
    assert found["the same over vLLM PP=4's best"].value == pytest.approx(1.5)
    assert found["the same as a share of four single GPUs"].value == pytest.approx(33 / 40)
    assert found["the same: busy share of the slowest stage"].value == 0.95
    assert found["the same: scheduler CPU per token"].value == 4.0


def test_two_stages_are_held_against_the_larger_figure_of_one_gpu(rows: Any) -> None:
    load = throughput(1024, 17_000.0, router_cpu_us_per_token=7.2, router_cpu_ms_per_step=1.9)
    runs = {
        "ours-2x1": [engine([["nccl", ""], ["nccl", ""]]), load],
        "ours-1x1": [engine([["local", ""]]), throughput(512, 9_000.0), throughput(2048, 9_500.0)],
    }
    found = table(rows, "B", runs)
    ratio = found["2 stages, 1,024 requests, over our one GPU"]
    assert ratio.value == pytest.approx(17 / 9.5)
    assert ratio.runs == ("ours-2x1", "ours-1x1")
    cost = found["the same: scheduler CPU per token"]
    assert (cost.value, cost.target) == (7.2, None)
    runs["ours-1x1-b"] = [engine([["local", ""]]), throughput(1024, 10_000.0)]
    assert table(rows, "B", runs)[ratio.name].value == pytest.approx(1.7)


def test_rows_of_runs_that_were_not_made_say_so(rows: Any) -> None:
    for group in "ABCD":
        for row in rows.rows_of_group(group, rows.Runs({})):
            assert row.value is None
            assert "was not run" in row.reference, row.name
