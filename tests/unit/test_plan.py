"""Splits by measured cost: arithmetic, what the command says, and what it refuses."""

from __future__ import annotations

import itertools
import json
import subprocess
import sys
from contextlib import redirect_stdout
from io import StringIO
from pathlib import Path
from typing import Any

import pytest

from stagemesh.client.cli import plan
from stagemesh.client.cli._admin import Admin
from stagemesh.client.cli._main import load_command
from stagemesh.model.config import ModelConfig
from stagemesh.model.cost import StepShape
from stagemesh.model.layer_split import Device, PartTimes, parts_from_stages, predict, propose
from stagemesh.model.rope import RopeConfig
from stagemesh.v1 import admin_pb2
from stagemesh.wire.errors import ConfigError, UnavailableError

LLAMA_8B = ModelConfig(
    hidden_size=4096,
    num_layers=32,
    num_heads=32,
    num_kv_heads=8,
    head_dim=128,
    intermediate_size=14336,
    vocab_size=128256,
    rms_norm_eps=1e-5,
    rope=RopeConfig(theta=500_000.0),
    tie_embeddings=False,
    max_context=8192,
)
H200 = Device(bytes_per_s=4.3e12, flops=700e12, itemsize=2)


@pytest.mark.parametrize("num_stages", [1, 2, 3, 4])
@pytest.mark.parametrize("head_s", [0.0, 0.5, 2.2, 7.0])
def test_no_split_is_better_than_the_proposed_one(num_stages: int, head_s: float) -> None:
    paces = [1.0, 1.3, 0.8, 1.1][:num_stages]
    parts = [PartTimes(layer_s=pace, head_s=head_s, step_s=0.2) for pace in paces]
    cuts = itertools.combinations(range(1, 10), num_stages - 1)
    splits = [tuple(end - begin for begin, end in itertools.pairwise((0, *cut, 10))) for cut in cuts]
    best = min(predict(split, parts).slowest_s for split in splits)
    proposal = propose(10, parts)
    assert sum(proposal.split) == 10
    assert proposal.slowest_s == pytest.approx(best)


def test_the_head_costs_layers_in_decode_and_next_to_nothing_in_prefill() -> None:
    decode = H200.parts(LLAMA_8B, StepShape(tokens=16, rows=16, prefill=0, context=16 * 100))
    prefill = H200.parts(LLAMA_8B, StepShape(tokens=8192, rows=1, prefill=8191, context=8192))
    assert 2.0 < decode.head_s / decode.layer_s < 2.8
    assert prefill.head_s / prefill.layer_s < 0.15
    assert propose(32, [decode] * 4).split[-1] < 8
    assert propose(32, [prefill] * 4).split == (8, 8, 8, 8)


def test_what_stages_take_says_what_their_parts_take() -> None:
    parts = parts_from_stages((8, 8, 8, 8), (8.0, 8.2, 7.8, 10.5))
    assert parts[0].layer_s == pytest.approx(1.0)
    assert parts[-1].head_s == pytest.approx(2.5)
    now, proposal = predict((8, 8, 8, 8), parts), propose(32, parts)
    assert proposal.split in {(9, 9, 8, 6), (9, 8, 9, 6), (8, 9, 9, 6)}
    assert now.slowest_s / proposal.slowest_s == pytest.approx(10.5 / 9)


def test_a_slower_device_gets_fewer_layers() -> None:
    parts = parts_from_stages((8, 8, 8), (8.0, 16.0, 12.0))
    assert [part.layer_s for part in parts[:2]] == pytest.approx([1.0, 2.0])
    proposal = propose(24, parts)
    assert proposal.split[1] < proposal.split[0]
    assert proposal.slowest_s < 16.0


def test_what_cannot_be_split_is_refused() -> None:
    with pytest.raises(ConfigError, match="5 stages, but the model has 4 layers"):
        propose(4, [PartTimes(layer_s=1, head_s=1)] * 5)
    with pytest.raises(ConfigError, match="one stage"):
        parts_from_stages((4,), (1.0,))


def make_model(folder: Path, **changes: Any) -> Path:
    shape = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_size": 64,
        "intermediate_size": 128,
        "num_hidden_layers": 6,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "vocab_size": 512,
        "max_position_embeddings": 256,
        "rms_norm_eps": 1e-5,
    }
    (folder / "config.json").write_text(json.dumps(shape | changes))
    return folder


def run(*args: str) -> Any:
    shown = StringIO()
    with redirect_stdout(shown):
        load_command("plan").main(args=[*args, "--json"], standalone_mode=False)
    return json.loads(shown.getvalue())


def test_a_model_that_fits_one_device_is_better_off_with_replicas(tmp_path: Path) -> None:
    model = str(make_model(tmp_path))
    fits = run(model, "--stages", "3")
    assert sum(fits["split"]) == 6
    assert any("3 replicas of one device beat any pipeline" in note for note in fits["notes"])
    tight = run(model, "--stages", "3", "--memory", "300KiB", "--rows", "4", "--context", "128")
    assert any("does not fit" in note for note in tight["notes"])
    # One block of two layers: 2 (K and V) x 2 layers x 16 tokens x 2 heads of 16 x 2 bytes.
    assert tight["kv_blocks"][1] == (300 * 1024 - tight["weight_bytes"][1]) // (2 * 2 * 16 * 32 * 2)


def test_parts_are_measured_here(tmp_path: Path) -> None:
    measured = run(
        str(make_model(tmp_path)), "--stages", "2", "--measure", "here", "--rows", "2", "--context", "20"
    )
    assert sum(measured["split"]) == 6
    assert all(one > 0 for one in measured["step_ms"])
    assert "measured on this machine's CPU" in measured["notes"][0]
    assert sum(measured["present_split"]) == 6
    assert measured["gain"] >= 1
    assert any("stages take by themselves" in note for note in measured["notes"])


def test_a_cpu_is_given_no_memory_of_a_gpu(tmp_path: Path) -> None:
    model = str(make_model(tmp_path))
    command = [sys.executable, "-m", "stagemesh.client.cli", "plan", model, "--stages", "3"]
    command += ["--measure", "here", "--rows", "2", "--context", "20"]
    # A process of its own: torch warns of a buffer that cannot be written once in a process.
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=True)
    assert done.stderr == ""
    assert "measured on this machine's CPU" in done.stdout
    assert "replicas" not in done.stdout
    assert "KV blocks of" not in done.stdout
    known = run(model, "--measure", "here", "--rows", "2", "--context", "20", "--memory", "1GB")
    assert len(known["kv_blocks"]) == 2
    assert any("replicas" in note for note in known["notes"])


@pytest.mark.parametrize(
    ("flags", "names"),
    [
        (["--measure", "127.0.0.1:1", "--rows", "64"], "--rows: no effect"),
        (["--measure", "127.0.0.1:1", "--context", "9", "--prefill", "1"], "--context, --prefill: no effect"),
        (["--measure", "127.0.0.1:1", "--memory", "80GB"], "--memory: no effect"),
        (["model", "--measure", "127.0.0.1:1"], "MODEL: no effect"),
        (["model", "--measure", "here", "--dtype", "float16"], "--dtype: no effect with --measure here"),
        (["model", "--measure", "here", "--device-tb-s", "1"], "--device-tb-s: no effect"),
    ],
)
def test_flags_that_change_nothing_are_refused_by_name(flags: list[str], names: str) -> None:
    with pytest.raises(ConfigError, match=names):
        run(*flags)


def test_a_worked_out_plan_says_what_it_gains_over_the_split_by_weights(tmp_path: Path) -> None:
    """The head weighs 28 layers, of which stages count a part; in prefill it is next to nothing."""
    model = str(make_model(tmp_path, vocab_size=1 << 14, num_hidden_layers=24))
    plan = run(model, "--stages", "2", "--rows", "1", "--prefill", "4096", "--device-tflops", "0.1")
    assert plan["split"] == [12, 12]
    assert plan["present_split"][0] > 12
    assert plan["gain"] == pytest.approx(max(plan["present_step_ms"]) / plan["slowest_ms"], rel=1e-3)
    assert plan["gain"] > 1.05
    assert any(f"{plan['gain']:.2f} times the throughput" in note for note in plan["notes"])


def mesh_status(step_ms: list[float], split: list[int]) -> admin_pb2.MeshStatus:
    status = admin_pb2.MeshStatus()
    lane = status.lanes.add(ring_hops_ms=0.5)
    begin = 0
    for one, count in zip(step_ms, split, strict=True):
        stage = lane.stages.add(step_ms=one)
        stage.description.layer_begin, stage.description.layer_end = begin, begin + count
        begin += count
    return status


def test_a_running_mesh_is_asked_what_its_stages_take(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Admin, "status", lambda self: mesh_status([4.0, 4.0, 8.0], [4, 4, 4]))
    found = run("--measure", "127.0.0.1:1")
    assert found["present_split"] == [4, 4, 4]
    assert sorted(found["split"][:2]) in ([5, 5], [5, 6])
    assert found["slowest_ms"] == pytest.approx(6)
    assert found["gain"] == pytest.approx(8 / 6, abs=1e-4)
    assert any("1.33 times the throughput" in note for note in found["notes"])


def test_a_mesh_that_has_measured_nothing_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Admin, "status", lambda self: mesh_status([0.0, 0.0], [4, 4]))
    with pytest.raises(UnavailableError, match="give it some load"):
        plan._of_mesh("127.0.0.1:1", None)
    with pytest.raises(ConfigError, match="--stages: 3, but the mesh"):
        plan._of_mesh("127.0.0.1:1", 3)
