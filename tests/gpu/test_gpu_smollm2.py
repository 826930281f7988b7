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
PROMPTS = (
    "The capital of France is",
    "def fibonacci(n):\n",
    "Once upon a time",
    "Water boils at 100 degrees Celsius at sea level, and on a mountain",
    "import os\n\nfor name in os.listdir('.'):\n",
    "The French Revolution began in 1789 with",
    "Dear Sir or Madam, I am writing to complain about the train",
    "Plants turn light, water and carbon dioxide into",
    "To bake bread you need flour,",
    "SELECT name, price FROM products WHERE",
    "The three laws of motion say that",
    "My grandmother always told me that the sea",
    "Question: What is the largest planet? Answer:",
    "A gas expands when it is heated because",
    "1, 1, 2, 3, 5, 8, 13,",
    "The train arrived at the empty station, and nobody",
    "In computer science, a queue is",
    "She opened the letter with trembling hands. It said:",
    "The heart pumps blood through",
    "Moscow is to Russia as Madrid is to",
    "#include <stdio.h>\n\nint main(void) {\n",
    "Good evening, and welcome to the news. Today",
    "The price of copper rose by",
    "If a triangle has two equal sides, then",
)
"""So many, since the errors of a sequence go together: those of its first position reach all the others."""


@pytest.fixture(scope="module")
def demo() -> Path:
    """Where `make model` puts it, or STAGEMESH_DEMO_MODEL."""
    root = Path(__file__).parents[2] / ".cache" / "models"
    given = os.environ.get("STAGEMESH_DEMO_MODEL")
    for path in ([Path(given)] if given else []) + sorted(root.rglob(NAME)):
        if path.is_file():
            return path
    pytest.skip("the demo model is not here: make model, or STAGEMESH_DEMO_MODEL=FILE")


@pytest.fixture(scope="module")
def reference(demo: Path) -> Reference:
    """The judge, read once: a GGUF takes transformers half a minute."""

    def load(dtype: torch.dtype) -> AutoModelForCausalLM:
        model = AutoModelForCausalLM.from_pretrained(
            str(demo.parent), gguf_file=demo.name, dtype=dtype, attn_implementation="sdpa"
        )
        return model.to(DEVICE).eval()

    return Reference(load(torch.float32), load(torch.bfloat16))


@pytest.mark.parametrize(
    "tps",
    [
        (1,),
        pytest.param((1, 1), marks=pytest.mark.gpus(2)),
        pytest.param((2,), marks=pytest.mark.gpus(2)),
    ],
    ids=["1", "2stages", "TP2"],
)
def test_smollm2(tps: tuple[int, ...], demo: Path, reference: Reference, tmp_path: Path) -> None:
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
