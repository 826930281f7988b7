"""The simulator and a mesh of simulated engines do the same: the steps that one request takes, row for row."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from running_mesh import RunningMesh

from stagemesh.router.scheduler import Step
from stagemesh.router.simulate.simulation import Simulation
from stagemesh.router.simulate.spec import parse
from stagemesh.v1 import inference_pb2 as pb

PROMPT, OUTPUT, STEP_TOKENS = 50, 12, 16
SHAPE = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "hidden_size": 16,
    "intermediate_size": 32,
    "num_hidden_layers": 4,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "vocab_size": 100,
    "max_position_embeddings": 256,
    "rms_norm_eps": 1e-5,
}

Rows = list[tuple[int, bool]]


def simulated_steps(lookahead: int) -> list[Rows]:
    content = {
        "stages": {"count": 2, "cost": "1ms"},
        "load": {
            "arrivals": "at_once",
            "requests": 1,
            "prompt": {"fixed": PROMPT},
            "output": {"fixed": OUTPUT},
        },
        "lane": {"lookahead": lookahead, "step_tokens": STEP_TOKENS, "max_context": 256},
    }
    simulation = Simulation(parse(content, "test"))
    steps: list[Rows] = []
    next_step = simulation.scheduler.next_step

    def record(now: float) -> Step | None:
        if step := next_step(now):
            steps.append(list(zip(step.counts.tolist(), step.sample.tolist(), strict=True)))
        return step

    simulation.scheduler.next_step = record  # type: ignore[method-assign]
    assert simulation.run().output_tokens == OUTPUT
    return steps


@pytest.mark.parametrize("lookahead", [0, 1])
def test_a_request_takes_the_same_steps(tmp_path: Path, lookahead: int) -> None:
    model = tmp_path / "model"
    model.mkdir()
    (model / "config.json").write_text(json.dumps(SHAPE))
    folder = tmp_path / "logs"
    folder.mkdir()
    mesh = RunningMesh(
        folder,
        model,
        [1, 1],
        stage_flags=("--engine", "sim", "--cost", "1ms"),
        router_flags=("--lookahead", str(lookahead), "--step-tokens", str(STEP_TOKENS)),
    )
    try:
        mesh.wait_ready()
        request = pb.GenerateRequest(
            token_ids=pb.TokenIds(ids=range(3, 3 + PROMPT)),
            max_tokens=OUTPUT,
            temperature=0.0,
            ignore_eos=True,
        )
        tokens = [token for one in mesh.stub.Generate(request, timeout=30) for token in one.token_ids]
    finally:
        mesh.close()
    assert len(tokens) == OUTPUT
    lines: list[dict[str, Any]] = [json.loads(line) for line in mesh.step_log.read_text().splitlines()]
    steps = [[(count, sample) for _, count, sample in line["rows"]] for line in lines if "step" in line]
    assert steps == simulated_steps(lookahead)
