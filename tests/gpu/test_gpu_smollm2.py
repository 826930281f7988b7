"""The demo model on a GPU, from its GGUF file."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch
from gpu_mesh import GPUMesh
from gpu_reference import DEVICE, Comparison, Reference
from mesh_calls import generate
from transformers import AutoModelForCausalLM

from stagemesh.router.text import load_tokenizer

NAME = "SmolLM2-135M-Instruct.Q4_1.gguf"
PROMPTS = ("The capital of France is", "def fibonacci(n):\n", "Once upon a time")


@pytest.fixture(scope="module")
def demo() -> Path:
    """Where `make model` puts it, or STAGEMESH_DEMO_MODEL."""
    root = Path(__file__).parents[2] / ".cache" / "models"
    given = os.environ.get("STAGEMESH_DEMO_MODEL")
    for path in ([Path(given)] if given else []) + sorted(root.rglob(NAME)):
        if path.is_file():
            return path
    pytest.skip("the demo model is not here: make model, or STAGEMESH_DEMO_MODEL=FILE")


@pytest.mark.parametrize("tps", [(1,), pytest.param((1, 1), marks=pytest.mark.gpus(2))], ids=["1", "2stages"])
def test_smollm2(tps: tuple[int, ...], demo: Path, tmp_path: Path) -> None:
    def load(dtype: torch.dtype) -> AutoModelForCausalLM:
        model = AutoModelForCausalLM.from_pretrained(
            str(demo.parent), gguf_file=demo.name, dtype=dtype, attn_implementation="sdpa"
        )
        return model.to(DEVICE).eval()

    reference = Reference(load(torch.float32), load(torch.bfloat16))
    tokenizer = load_tokenizer(demo)
    mesh = GPUMesh(tmp_path, demo, tps)
    try:
        mesh.wait_ready()
        comparison = Comparison()
        prompts = [list(tokenizer.encode(text)) for text in PROMPTS]
        answers = [generate(mesh, prompt, 24, request_id=f"s{i}") for i, prompt in enumerate(prompts)]
        logits = mesh.logits()
        for index, (prompt, answer) in enumerate(zip(prompts, answers, strict=True)):
            comparison.add(reference, prompt, answer.token_ids, logits[f"s{index}"])
        comparison.check()
        assert "Paris" in answers[0].text
    finally:
        mesh.close()
