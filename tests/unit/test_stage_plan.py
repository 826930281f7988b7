"""Settings of a stage that cannot be met together."""

from __future__ import annotations

import ctypes
import json
from pathlib import Path
from typing import Any

import pytest

from stagemesh.stage import gpus, plan
from stagemesh.stage.config import StageConfig
from stagemesh.stage.gpus import Gpu, memory_in_use, settled_memory_in_use
from stagemesh.stage.memory import SPARE_BYTES
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


GIB = 1 << 30
PAIR = (Gpu(0, "a GPU", 80 * GIB, "0a"), Gpu(1, "a GPU", 80 * GIB, "0b"))


class FakeNvml:
    """Free bytes by the names that NVML has for GPUs."""

    def __init__(self, free: dict[bytes, int]) -> None:
        self._free = free
        self.open = 0

    def nvmlInit_v2(self) -> int:
        self.open += 1
        return 0

    def nvmlShutdown(self) -> int:
        self.open -= 1
        return 0

    def nvmlDeviceGetHandleByUUID(self, name: bytes, handle: Any) -> int:
        if name not in self._free:
            return 6
        handle._obj.value = 1 + list(self._free).index(name)
        return 0

    def nvmlDeviceGetMemoryInfo(self, handle: Any, memory: Any) -> int:
        memory._obj.free = list(self._free.values())[handle.value - 1]
        return 0


def test_what_others_hold_is_asked_by_the_names_of_the_gpus(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    nvml = FakeNvml({b"GPU-ff": 1, b"MIG-0b": 79 * GIB, b"GPU-0a": 50 * GIB})
    monkeypatch.setattr(ctypes, "CDLL", lambda name: nvml)
    assert memory_in_use(PAIR) == (30 * GIB, GIB)
    assert memory_in_use((Gpu(0, "idle", 49 * GIB, "0a"),)) == (0,)
    assert not caplog.records
    assert memory_in_use((*PAIR, Gpu(2, "unheard of", GIB, "0c"))) == (0, 0, 0)
    assert "is not known, and not counted: NVML says 6 of GPU 2 (0c)" in caplog.text
    assert nvml.open == 0


def test_without_nvml_nothing_is_counted(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def missing(name: str) -> None:
        raise OSError(f"{name}: cannot open shared object file")

    monkeypatch.setattr(ctypes, "CDLL", missing)
    assert memory_in_use(PAIR) == (0, 0)
    assert "not counted: there is no libnvidia-ml.so.1" in caplog.text


@pytest.mark.parametrize(
    ("readings", "settled", "looks"),
    [
        pytest.param([7, 0], 7, 1, id="harmless"),
        pytest.param([40, 30, 0, 5], 0, 3, id="ended processes"),
        pytest.param([40, 40, 0], 40, 2, id="a process that stays"),
        pytest.param([40, 45, 0], 45, 2, id="a process that grows"),
    ],
)
def test_memory_of_ended_processes_is_waited_for(
    monkeypatch: pytest.MonkeyPatch, readings: list[int], settled: int, looks: int
) -> None:
    left = iter(readings)
    monkeypatch.setattr(gpus, "memory_in_use", lambda gpus: (next(left) * GIB,))
    monkeypatch.setattr(gpus, "SETTLE_STEP_S", 0)
    assert settled_memory_in_use(PAIR[:1], 0.1) == (settled * GIB,)
    assert len(list(left)) == len(readings) - looks


def test_the_plan_leaves_others_what_they_hold(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "config.json").write_text(json.dumps(SHAPE))
    config = StageConfig(model=str(tmp_path), load_format="dummy", device="cuda", tp=2, max_step_tokens=512)
    asked: list[float] = []

    def in_use(gpus: tuple[Gpu, ...], harmless_share: float) -> tuple[int, ...]:
        asked.append(harmless_share)
        return (0, 60 * GIB)

    monkeypatch.setattr(plan, "list_gpus", lambda: PAIR)
    monkeypatch.setattr(plan, "settled_memory_in_use", in_use)
    first = plan_stage(config)
    assert first.used_bytes == (0, 60 * GIB)
    assert asked == [pytest.approx(1 - config.memory_share)]
    assert first.memory is not None
    assert [rank.budget for rank in first.memory.ranks] == [72 * GIB, 20 * GIB - SPARE_BYTES]
    assert first.num_blocks == first.memory.ranks[1].num_blocks
    # A worker plans what its leader did, whatever is held by then.
    assert plan_stage(config, used_bytes=first.used_bytes).num_blocks == first.num_blocks
    assert len(asked) == 1
    assert plan_stage(config, used_bytes=(0, 0)).num_blocks > 3 * first.num_blocks
