"""KV memory on GPUs: few blocks, preemption, and a model that does not fit."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from gpu_mesh import REHEARSAL, MeshOf
from gpu_reference import VOCAB_SIZE, Comparison, Reference
from mesh_calls import make_request, read_answer
from mesh_processes import start_stage
from running_mesh import CALL_TIMEOUT_S

NUM_BLOCKS = 40
"""Six requests of 10 blocks each do not fit."""


def share_for_blocks(model: Path, blocks: int) -> float:
    """The least --memory-share that leaves so many KV blocks, found by the accounting itself."""
    from stagemesh.stage.config import StageConfig
    from stagemesh.stage.plan import plan_stage
    from stagemesh.wire.errors import ConfigError

    def fits(share: float) -> bool:
        try:
            plan = plan_stage(
                StageConfig(
                    model=str(model),
                    stage="0/1",
                    device="cuda",
                    dtype="bfloat16",
                    memory_share=share,
                    max_context=2048,
                    max_graph_rows=64,
                )
            )
        except ConfigError:
            return False
        return plan.num_blocks >= blocks

    low, high = 0.0, 1.0
    for _ in range(30):
        middle = (low + high) / 2
        low, high = (low, middle) if fits(middle) else (middle, high)
    return high


@pytest.mark.skipif(REHEARSAL, reason="the accounting is that of GPUs")
def test_preemption_with_few_blocks(model: Path, mesh_of: MeshOf, reference: Reference) -> None:
    mesh = mesh_of((1,), share=share_for_blocks(model, NUM_BLOCKS))
    assert NUM_BLOCKS <= mesh.lane.num_blocks < 2 * NUM_BLOCKS
    rng = np.random.default_rng(0)
    prompts = [rng.integers(0, VOCAB_SIZE, 60 + index).tolist() for index in range(6)]
    calls = [
        mesh.stub.Generate(make_request(prompt, 100, request_id=f"p{index}"), timeout=CALL_TIMEOUT_S)
        for index, prompt in enumerate(prompts)
    ]
    answers = [read_answer(call).token_ids for call in calls]
    chunks = sum(count > 1 for step in mesh.steps() for _, count, _ in step["rows"])
    assert chunks > len(prompts), "nothing was computed a second time"
    comparison = Comparison()
    for prompt, tokens in zip(prompts, answers, strict=True):
        comparison.add(reference, prompt, tokens, None)
    comparison.check()


@pytest.mark.skipif(REHEARSAL, reason="the accounting is that of GPUs")
def test_a_model_that_does_not_fit_is_refused_with_a_layout(tmp_path: Path) -> None:
    shape = Path(__file__).parents[2] / "benchmarks" / "shapes" / "llama-3.1-70b"
    flags = ["--load-format", "dummy", "--device", "cuda", "--memory-share", "0.4"]
    stage = start_stage(tmp_path, shape, 0, 1, flags=flags)
    try:
        assert stage.process.wait(60) != 0
    finally:
        stage.kill()
    assert "the smallest layout that fits such GPUs is" in stage.log.read_text()
