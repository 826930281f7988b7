"""What the GPU benchmarks run: which system on which layout, with which load, by group."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

System = Literal["ours", "vllm", "transformers"]
SHAPE_8B = "llama-3.1-8b"
SHAPE_70B = "llama-3.1-70b"


@dataclass(frozen=True, slots=True, kw_only=True)
class RunSpec:
    """One start of one system, and what is measured on it."""

    name: str
    group: str
    """A, B, C or D."""
    system: System
    stages: int = 1
    """Pipeline stages; vLLM's PP."""
    tp: int = 1
    preset: str = SHAPE_8B
    """A shape's name, or the path of a folder with one."""
    sizes: tuple[int, ...] = ()
    """Batches of the decode measurement."""
    requests: tuple[int, ...] = ()
    """Numbers of requests, a throughput measurement each; vLLM takes one."""
    max_sequences: int = 512
    """Running at once; ours: for each stage."""
    step_tokens: int = 8192
    memory_share: float = 0.9
    reps: int = 2
    """Of decode."""
    estimate_s: int
    """Wall time, start and end included; of groups A and B as two H100 took it."""

    @property
    def num_gpus(self) -> int:
        """GPUs it takes."""
        return self.stages * self.tp


DECODE_A = (1, 16, 64, 256)

RUNS: tuple[RunSpec, ...] = (
    RunSpec(name="ours-1x1", group="A", system="ours", sizes=DECODE_A, requests=(512, 2048), estimate_s=145),
    RunSpec(name="ours-1x1-warm", group="A", system="ours", estimate_s=30),
    RunSpec(name="vllm-1x1", group="A", system="vllm", sizes=DECODE_A, requests=(512,), estimate_s=185),
    RunSpec(name="vllm-1x1-2048", group="A", system="vllm", requests=(2048,), estimate_s=150),
    RunSpec(name="transformers-1", group="A", system="transformers", sizes=(64,), estimate_s=40),
    RunSpec(name="ours-2x1", group="B", system="ours", stages=2, requests=(512, 1024), estimate_s=50),
    RunSpec(name="ours-1x2", group="B", system="ours", tp=2, sizes=(1,), requests=(512,), estimate_s=40),
    RunSpec(name="ours-1x1-b", group="B", system="ours", requests=(512, 1024), estimate_s=70),
    RunSpec(name="vllm-pp2", group="B", system="vllm", stages=2, requests=(512,), estimate_s=120),
    RunSpec(name="vllm-tp2", group="B", system="vllm", tp=2, sizes=(1,), requests=(512,), estimate_s=140),
    RunSpec(
        name="ours-4x1",
        group="C",
        system="ours",
        stages=4,
        sizes=(64, 256),
        requests=(2048, 512),
        estimate_s=110,
    ),
    RunSpec(name="ours-2x2", group="C", system="ours", stages=2, tp=2, requests=(512,), estimate_s=50),
    RunSpec(name="ours-1x1-c", group="C", system="ours", requests=(512, 2048), estimate_s=130),
    RunSpec(
        name="vllm-pp4",
        group="C",
        system="vllm",
        stages=4,
        sizes=(64, 256),
        requests=(512,),
        estimate_s=190,
    ),
    RunSpec(
        name="vllm-pp4-2048",
        group="C",
        system="vllm",
        stages=4,
        requests=(2048,),
        max_sequences=2048,
        step_tokens=16384,
        estimate_s=170,
    ),
    RunSpec(
        name="vllm-tp4-2048",
        group="C",
        system="vllm",
        tp=4,
        requests=(2048,),
        max_sequences=2048,
        estimate_s=160,
    ),
    RunSpec(name="vllm-2x2", group="C", system="vllm", stages=2, tp=2, requests=(512,), estimate_s=150),
    RunSpec(
        name="ours-70b-2x2",
        group="D",
        system="ours",
        stages=2,
        tp=2,
        preset=SHAPE_70B,
        requests=(1024,),
        estimate_s=180,
    ),
    RunSpec(
        name="ours-70b-4x1",
        group="D",
        system="ours",
        stages=4,
        preset=SHAPE_70B,
        requests=(1024,),
        estimate_s=180,
    ),
    RunSpec(
        name="vllm-70b-tp4",
        group="D",
        system="vllm",
        tp=4,
        preset=SHAPE_70B,
        requests=(1024,),
        max_sequences=1024,
        estimate_s=240,
    ),
    RunSpec(
        name="vllm-70b-pp4",
        group="D",
        system="vllm",
        stages=4,
        preset=SHAPE_70B,
        requests=(1024,),
        max_sequences=1024,
        estimate_s=240,
    ),
    RunSpec(
        name="vllm-70b-2x2",
        group="D",
        system="vllm",
        stages=2,
        tp=2,
        preset=SHAPE_70B,
        requests=(1024,),
        max_sequences=1024,
        estimate_s=240,
    ),
)


def runs_of(groups: str, names: str = "") -> list[RunSpec]:
    """The runs of groups ("A" or "A,B"), or those of them named ("ours-1x1,vllm-1x1"), in that order.

    Raises:
        ValueError: A group or run that does not exist.
    """
    wanted = groups.split(",")
    known_groups = sorted({run.group for run in RUNS})
    for group in wanted:
        if group not in known_groups:
            raise ValueError(f"--group {group}: expected some of {', '.join(known_groups)}")
    runs = [run for run in RUNS if run.group in wanted]
    if names:
        chosen = names.split(",")
        for name in chosen:
            if name not in [run.name for run in runs]:
                raise ValueError(f"--runs {name}: group {groups} has {', '.join(run.name for run in runs)}")
        by_name = {run.name: run for run in runs}
        runs = [by_name[name] for name in chosen]
    return runs
