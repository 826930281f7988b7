"""Settings of a stage that cannot be met together."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from stagemesh.stage import plan
from stagemesh.stage.config import StageConfig
from stagemesh.stage.plan import plan_stage
from stagemesh.wire.errors import ConfigError

SHAPE = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "vocab_size": 100,
}


@pytest.mark.parametrize(
    ("settings", "why"),
    [
        ({"device": "cpu"}, "--device cpu"),
        ({}, "--device auto, and there is no GPU here"),
        ({"engine": "sim"}, "--engine sim"),
        ({"engine": "sim", "device": "cuda"}, "--engine sim"),
    ],
)
def test_gpus_for_a_stage_that_computes_on_the_cpu_are_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, settings: dict[str, Any], why: str
) -> None:
    monkeypatch.setattr(plan, "list_gpus", tuple)
    (tmp_path / "config.json").write_text(json.dumps(SHAPE))
    config = StageConfig(model=str(tmp_path), load_format="dummy", gpus="0", **settings)
    with pytest.raises(ConfigError) as caught:
        plan_stage(config)
    assert str(caught.value) == f"--gpus 0: this stage computes on the CPU ({why}); leave it out"
