"""KV memory on GPUs: few blocks, preemption, and a model that does not fit."""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np
import pytest
import torch
from gpu_mesh import REHEARSAL, GPUMesh, MeshOf
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
def test_top_p_takes_what_is_planned_for_it() -> None:
    """Of memory, for each logit that is sorted; not half of it either, which would be blocks left empty."""
    from stagemesh.stage.cuda.filtered import FilteredChoice
    from stagemesh.stage.group import RankGroup
    from stagemesh.stage.memory import FILTER_BYTES, FILTERED_ROWS

    vocab_size, device = 128_256, torch.device("cuda")
    choice = FilteredChoice(RankGroup(0, 1), [range(vocab_size)])
    logits = torch.randn(FILTERED_ROWS, vocab_size, device=device, dtype=torch.bfloat16)
    rows = torch.arange(FILTERED_ROWS, device=device)
    half, none = torch.full(rows.shape, 0.5, device=device), torch.zeros_like(rows)

    def choose() -> None:
        choice.choose(logits, rows, half, rows, rows, none.int(), half, largest_k=0)

    choose()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    choose()
    taken = (torch.cuda.max_memory_allocated() - before) / logits.numel()
    print(f"top-p takes {taken:.1f} bytes a logit")
    assert FILTER_BYTES / 2 < taken <= FILTER_BYTES


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


@pytest.mark.skipif(REHEARSAL, reason="the accounting is that of GPUs")
def test_memory_that_another_process_holds_is_left_to_it(
    model: Path, tmp_path: Path, reference: Reference
) -> None:
    """This process holds half of the GPU; a stage that may use nine tenths takes what is left, and works."""
    total = torch.cuda.get_device_properties(0).total_memory
    held = torch.empty(total // 2, dtype=torch.uint8, device="cuda:0")
    mesh = GPUMesh(tmp_path, model, (1,), share=0.9)
    try:
        mesh.wait_ready()
        told = re.search(
            r"rank 0 will hold of GPU 0 ([0-9.]+) GiB.*others hold ([0-9.]+)", mesh.stages[0].log.read_text()
        )
        assert told
        budget, others = (float(number) * 2**30 for number in told.groups())
        assert others >= held.nbytes
        assert budget == pytest.approx(total - others - 2**28, abs=2**25)
        prompt = np.random.default_rng(1).integers(0, VOCAB_SIZE, 300).tolist()
        comparison = Comparison()
        answer = read_answer(mesh.stub.Generate(make_request(prompt, 20), timeout=CALL_TIMEOUT_S))
        comparison.add(reference, prompt, answer.token_ids, None)
        comparison.check()
        free, _ = torch.cuda.mem_get_info(0)
        assert free < total // 8, "the stage did not take what there was"
    finally:
        mesh.close()
        del held
        torch.cuda.empty_cache()


@pytest.mark.skipif(REHEARSAL, reason="the accounting is that of GPUs")
def test_a_refusal_says_what_another_process_holds(tmp_path: Path) -> None:
    total = torch.cuda.get_device_properties(0).total_memory
    held = torch.empty(total // 2, dtype=torch.uint8, device="cuda:0")
    shape = Path(__file__).parents[2] / "benchmarks" / "shapes" / "llama-3.1-70b"
    stage = start_stage(tmp_path, shape, 0, 1, flags=["--load-format", "dummy", "--device", "cuda"])
    try:
        assert stage.process.wait(60) != 0
    finally:
        stage.kill()
        del held
        torch.cuda.empty_cache()
    told = re.search(r"of which other processes hold ([0-9.]+)", stage.log.read_text())
    assert told
    assert float(told[1]) * 2**30 >= total // 2
