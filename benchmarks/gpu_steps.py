"""Decode steps of one GPU by themselves: the gaps between them, and where their time goes.

    python benchmarks/gpu_steps.py --json --out build/gpu-steps

Drives the engine of one stage as its worker does, a step ahead of the device, without router and gRPC. The gap is
what the device's own clock says between the end of a step and the moment the next one has its inputs. The
profiler's trace of a few steps of each batch is kept in the folder given.
"""

from __future__ import annotations

import argparse
import gc
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from report import Report
from torch.profiler import ProfilerActivity, profile

from stagemesh.stage.config import StageConfig
from stagemesh.stage.cuda.device import CudaDevice
from stagemesh.stage.cuda.engine import CudaEngine, DeviceStep
from stagemesh.stage.cuda.parts import make_cuda_engine
from stagemesh.stage.engine.interface import StepInputs
from stagemesh.stage.engine.slots import SlotTable
from stagemesh.stage.group import RankGroup
from stagemesh.stage.plan import plan_stage
from stagemesh.v1 import stage_pb2
from stagemesh.wire.columns import F32, U32, U64, pack

SHAPE = Path(__file__).parent / "shapes" / "llama-3.1-8b"
PROMPT, BLOCK = 128, 16
KINDS = {
    "linears": ("nvjet", "gemm", "splitK", "cutlass", "gemv"),
    "attention": ("flashinfer", "_attend"),
    "norms": ("_norm",),
    "rotation, cache write": ("_rope_append",),
    "activation": ("_silu_mul",),
    "sampling": ("_score_part", "_best_part", "_take"),
    "embedding, block lists": ("_embed", "_flatten", "_change"),
    "copies": ("Memcpy", "Memset", "_transfer"),
}


class Driver:
    """A lane of one stage, as far as the engine can tell."""

    def __init__(self, engine: CudaEngine, batch: int, max_context: int, blocks: int) -> None:
        self._engine = engine
        self._free = list(range(blocks - 1, -1, -1))
        self._slots = SlotTable(
            max_slots=batch, max_blocks=-(-max_context // BLOCK), block_size=BLOCK, num_blocks=blocks
        )
        self._length = 0
        self._number = 0
        self._batch = batch
        engine.open(
            stage_pb2.OpenLaneRequest(epoch=1, num_stages=1, num_blocks=blocks, max_slots=batch, depth=2)
        )

    def prefill(self, at_once: int) -> None:
        """Prompts of every slot; the last step decodes all of them, so that the next can name its rows."""
        rng = np.random.default_rng(0)
        steps: list[int] = []
        for begin in range(0, self._batch, at_once):
            slots = list(range(begin, min(begin + at_once, self._batch)))
            count, needed = len(slots), PROMPT // BLOCK
            sampling = stage_pb2.Admissions(
                slots=pack(slots, U32),
                positions=pack([0] * count, U32),
                seeds=pack(slots, U64),
                temperatures=pack([0.0] * count, F32),
                top_ks=pack([0] * count, U32),
                top_ps=pack([1.0] * count, F32),
            )
            rows = stage_pb2.Rows(
                slots=pack(slots, U32),
                counts=pack([PROMPT] * count, U32),
                tokens=pack(rng.integers(10, 1000, PROMPT * count), U32),
            )
            blocks = [self._free.pop() for _ in range(needed * count)]
            self._run(
                admissions=sampling,
                append_slots=pack(np.repeat(slots, needed), U32),
                append_blocks=pack(blocks, U32),
                rows=rows,
            ).wait()
            steps += [self._number] * count
        self._length = PROMPT
        slots = list(range(self._batch))
        rows = stage_pb2.Rows(slots=pack(slots, U32), input_steps=pack(steps, U64))
        self._run(**self._growth(), rows=rows).wait()

    def decode(self) -> DeviceStep:
        """One token for every slot."""
        return self._run(**self._growth(), same_rows_as=self._number)

    def _growth(self) -> dict[str, bytes]:
        full = self._length % BLOCK == 0
        self._length += 1
        if not full:
            return {}
        blocks = [self._free.pop() for _ in range(self._batch)]
        return {"append_slots": pack(range(self._batch), U32), "append_blocks": pack(blocks, U32)}

    def _run(self, **fields: Any) -> DeviceStep:
        self._number += 1
        batch = self._slots.apply(stage_pb2.Step(number=self._number, **fields))
        self._slots.begin(batch)
        tokens = self._slots.input_tokens(batch, held=True)
        step = self._engine.launch(batch, StepInputs(arrived_ns=0, tokens=tokens))
        assert isinstance(step, DeviceStep)
        return step


def ahead(driver: Driver, steps: int, look: Callable[[DeviceStep, DeviceStep], None]) -> list[float]:
    """Decode with one step launched before the last one's result is read; returns milliseconds computed."""
    times, last = [], driver.decode()
    for _ in range(steps):
        following = driver.decode()
        times.append(last.wait().compute_ns / 1e6)
        look(last, following)
        last = following
    last.wait()
    return times


def gaps(driver: Driver, steps: int) -> tuple[list[float], list[float]]:
    """(milliseconds of each step, microseconds between it and the next)."""
    found: list[float] = []

    def look(last: DeviceStep, following: DeviceStep) -> None:
        found.append(following.microseconds_after(last))

    times = ahead(driver, steps, look)
    return times[16:], found[16:]


def where_time_goes(driver: Driver, steps: int, trace: Path) -> dict[str, float]:
    """Microseconds of a step by kind of kernel, from the profiler; what is no kernel's is the launch gaps'."""
    with profile(activities=[ProfilerActivity.CUDA]) as profiler:
        times = ahead(driver, steps, lambda last, following: None)
        torch.cuda.synchronize()
    profiler.export_chrome_trace(str(trace))
    shares = dict.fromkeys((*KINDS, "other"), 0.0)
    for event in profiler.key_averages():
        kind = next((kind for kind, names in KINDS.items() if any(n in event.key for n in names)), "other")
        shares[kind] += event.device_time_total / (steps + 1)
    shares["launch gaps"] = max(0.0, float(np.median(times)) * 1e3 - sum(shares.values()))
    return {kind: round(value, 1) for kind, value in shares.items()}


def main() -> None:
    """Measure, and print the rows."""
    parser = argparse.ArgumentParser(description="Gaps between decode steps, and where their time goes.")
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--steps", type=int, default=220)
    parser.add_argument("--memory-share", type=float, default=0.6)
    parser.add_argument("--batches", default="1,64,512")
    parser.add_argument(
        "--pdl", action=argparse.BooleanOptionalAction, default=True, help="programmatic dependent launch"
    )
    parser.add_argument("--out", type=Path, default=Path("build/gpu-steps"))
    options = parser.parse_args()
    options.out.mkdir(parents=True, exist_ok=True)
    config = StageConfig(
        model=str(SHAPE),
        device="cuda",
        load_format="dummy",
        memory_share=options.memory_share,
        max_context=2048,
        pdl=options.pdl,
    )
    plan = plan_stage(config)
    device = CudaDevice(plan.gpus[0].index)
    engine = make_cuda_engine(
        config, plan, RankGroup(), device, progress=lambda what, done, total: None, start_seconds={}
    )
    gc.collect()
    gc.freeze()
    report = Report("gpu_steps", as_json=options.json)
    tables = {}
    for batch in (int(text) for text in options.batches.split(",")):
        driver = Driver(engine, batch, plan.max_context, plan.num_blocks)
        driver.prefill(config.max_step_tokens // PROMPT)
        times, between = gaps(driver, options.steps)
        tables[str(batch)] = where_time_goes(driver, 8, options.out / f"trace-batch-{batch}.json.gz")
        target = 20.0 if batch == 64 else None
        name = f"gap between steps of batch {batch}"
        report.add(f"step of batch {batch}, median", float(np.median(times)), "ms")
        report.add(f"{name}, p99", float(np.percentile(between, 99)), "us", target=target, at_most=True)
        report.add(f"{name}, largest", max(between), "us", target=target, at_most=True)
    found = {
        "gpu": torch.cuda.get_device_name(),
        "backends": engine.facts().backends,
        "microseconds": tables,
    }
    (options.out / "where-time-goes.json").write_text(json.dumps(found, indent=1))
    report.note(json.dumps(found))
    report.finish()


if __name__ == "__main__":
    main()
