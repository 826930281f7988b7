"""What stops a process from starting: one line that names it, no traceback, an exit code above 0."""

from __future__ import annotations

import json
import logging
import re
import shutil
import socket
import struct
from collections.abc import Iterator
from pathlib import Path

import gguf
import numpy as np
import pytest
from mesh_processes import START_TIMEOUT_S, Service, address_of, start_router, start_stage

from stagemesh.client.cli import main


@pytest.fixture(autouse=True)
def logging_as_it_was() -> Iterator[None]:
    """A command sets up the log of its process, which here is the tests'."""
    root = logging.getLogger()
    handlers, level = list(root.handlers), root.level
    yield
    root.handlers[:] = handlers
    root.setLevel(level)


def only_line(capsys: pytest.CaptureFixture[str], *args: str) -> str:
    """The error line of a command that must fail."""
    with pytest.raises(SystemExit) as ended:
        main(list(args))
    assert ended.value.code in (1, 2)
    captured = capsys.readouterr()
    return check_line(captured.out + captured.err)


def check_line(output: str) -> str:
    assert "Traceback" not in output
    lines = [line for line in output.splitlines() if line.startswith("error: ")]
    assert len(lines) == 1, output
    assert output.splitlines()[-1] == lines[0]
    return lines[0]


def stage_line(capsys: pytest.CaptureFixture[str], model: Path | str, *flags: str) -> str:
    return only_line(capsys, "stage", "--model", str(model), "--listen", "127.0.0.1:0", *flags)


def router_line(capsys: pytest.CaptureFixture[str], model: Path | str, *flags: str) -> str:
    ports = ("--listen", "127.0.0.1:0", "--admin", "127.0.0.1:0")
    return only_line(capsys, "router", "--model", str(model), "--stage", "127.0.0.1:9", *ports, *flags)


def up_line(capsys: pytest.CaptureFixture[str], model: Path | str, *flags: str) -> str:
    """And it is the only line: no service was started to say it."""
    ports = ("--listen", "127.0.0.1:0", "--admin", "127.0.0.1:0", "--stage-port", "0")
    with pytest.raises(SystemExit):
        main(["up", str(model), *ports, *flags])
    captured = capsys.readouterr()
    assert len(captured.err.splitlines()) == 1, captured.err
    assert captured.out == ""
    return check_line(captured.err)


@pytest.fixture
def copy(small: Path, tmp_path: Path) -> Path:
    """A copy of the small model, to be damaged."""
    return shutil.copytree(small, tmp_path / "copy")


def shard_of(folder: Path, tensor: str) -> Path:
    index = json.loads((folder / "model.safetensors.index.json").read_text())
    return folder / index["weight_map"][tensor]


@pytest.mark.parametrize("line", [stage_line, router_line, up_line])
def test_unknown_path(capsys: pytest.CaptureFixture[str], tmp_path: Path, line) -> None:
    said = line(capsys, tmp_path / "nowhere" / "model.gguf")
    assert "nowhere/model.gguf" in said
    assert ".gguf file" in said


@pytest.mark.parametrize("line", [stage_line, router_line])
def test_unknown_format(capsys: pytest.CaptureFixture[str], tmp_path: Path, line) -> None:
    (tmp_path / "weights.onnx").write_bytes(b"no model")
    assert "weights.onnx" in line(capsys, tmp_path / "weights.onnx")
    (tmp_path / "folder").mkdir()
    assert "config.json" in line(capsys, tmp_path / "folder")


def test_truncated_safetensors(capsys: pytest.CaptureFixture[str], copy: Path) -> None:
    shard = shard_of(copy, "model.layers.0.mlp.up_proj.weight")
    shard.write_bytes(shard.read_bytes()[:-100])
    said = start_and_fail(copy)
    assert shard.name in said


def start_and_fail(model: Path) -> str:
    """The error line of a real stage; damage inside a shard is found by the worker that reads it."""
    stage = start_stage(model.parent, model, 0, 1)
    try:
        assert stage.process.wait(START_TIMEOUT_S) == 1
        return check_line(stage.log.read_text())
    finally:
        stage.kill()


def test_corrupt_safetensors(capsys: pytest.CaptureFixture[str], copy: Path) -> None:
    shard = shard_of(copy, "model.embed_tokens.weight")
    shard.write_bytes(struct.pack("<Q", 1 << 60) + shard.read_bytes()[8:])
    assert shard.name in start_and_fail(copy)


def test_corrupt_index_and_configuration(capsys: pytest.CaptureFixture[str], copy: Path) -> None:
    (copy / "model.safetensors.index.json").write_text('{"weight_map": ')
    assert "model.safetensors.index.json" in stage_line(capsys, copy)
    (copy / "config.json").write_text("[1, 2")
    assert "config.json" in router_line(capsys, copy)


@pytest.mark.parametrize("line", [stage_line, router_line])
def test_unsupported_architecture(capsys: pytest.CaptureFixture[str], copy: Path, line) -> None:
    config = json.loads((copy / "config.json").read_text())
    config |= {"architectures": ["BloomForCausalLM"], "model_type": "bloom"}
    (copy / "config.json").write_text(json.dumps(config))
    said = line(capsys, copy)
    assert "bloom" in said.lower()
    assert "LlamaForCausalLM" in said or "llama" in said


def write_gguf(path: Path, *, pre: str = "smollm", architecture: str = "llama") -> Path:
    """A GGUF file whole enough to be read up to its tokenizer."""
    writer = gguf.GGUFWriter(path, architecture)
    for name, value in {
        "context_length": 64,
        "embedding_length": 32,
        "block_count": 1,
        "feed_forward_length": 64,
        "attention.head_count": 2,
        "attention.head_count_kv": 1,
        "vocab_size": 4,
    }.items():
        writer.add_uint32(f"{architecture}.{name}", value)
    writer.add_float32(f"{architecture}.attention.layer_norm_rms_epsilon", 1e-5)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(pre)
    writer.add_token_list(["a", "b", "ab", "<|end|>"])
    writer.add_token_merges(["a b"])
    writer.add_eos_token_id(3)
    shapes = {
        "token_embd": (4, 32),
        "output_norm": (32,),
        "blk.0.attn_norm": (32,),
        "blk.0.ffn_norm": (32,),
        "blk.0.attn_q": (32, 32),
        "blk.0.attn_k": (16, 32),
        "blk.0.attn_v": (16, 32),
        "blk.0.attn_output": (32, 32),
        "blk.0.ffn_gate": (64, 32),
        "blk.0.ffn_up": (64, 32),
        "blk.0.ffn_down": (32, 64),
    }
    for name, shape in shapes.items():
        writer.add_tensor(f"{name}.weight", np.ones(shape, np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def test_unsupported_pre_tokenizer(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    said = router_line(capsys, write_gguf(tmp_path / "odd.gguf", pre="poet-v9"))
    assert "tokenizer.ggml.pre" in said
    assert "poet-v9" in said
    assert "smollm" in said
    assert "llama-bpe" in said


def test_unsupported_gguf_architecture(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    said = stage_line(capsys, write_gguf(tmp_path / "odd.gguf", architecture="bloom"))
    assert "bloom" in said
    assert "llama" in said


@pytest.mark.parametrize("share", [0.02, 0.5, 0.99])
def test_truncated_gguf(capsys: pytest.CaptureFixture[str], tmp_path: Path, share: float) -> None:
    whole = write_gguf(tmp_path / "whole.gguf").read_bytes()
    (tmp_path / "cut.gguf").write_bytes(whole[: int(len(whole) * share)])
    assert "cut.gguf" in stage_line(capsys, tmp_path / "cut.gguf")


def test_corrupt_gguf(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    whole = bytearray(write_gguf(tmp_path / "bad.gguf").read_bytes())
    (tmp_path / "bad.gguf").write_bytes(b"GGML" + whole[4:])
    assert "bad.gguf" in stage_line(capsys, tmp_path / "bad.gguf")
    whole[8:24] = b"\xff" * 16  # more tensors and keys than any file has
    (tmp_path / "bad.gguf").write_bytes(whole)
    assert "bad.gguf" in stage_line(capsys, tmp_path / "bad.gguf")


def test_bad_settings_of_a_stage(capsys: pytest.CaptureFixture[str], small: Path) -> None:
    assert "3/3" in stage_line(capsys, small, "--stage", "3/3")
    assert "0:9" in stage_line(capsys, small, "--layers", "0:9")
    assert "--kv-memory" in stage_line(capsys, small, "--kv-memory", "10")
    assert "--max-context" in stage_line(capsys, small, "--max-context", "4096")
    assert "cuda" in stage_line(capsys, small, "--device", "cuda")


def test_a_listener_open_to_the_world_is_meant(capsys: pytest.CaptureFixture[str], small: Path) -> None:
    for command in ("stage", "router"):
        flags = ("--stage", "127.0.0.1:9") if command == "router" else ()
        said = only_line(capsys, command, "--model", str(small), *flags, "--listen", "0.0.0.0:0")
        assert "--insecure" in said


def test_unknown_key_in_mesh_yaml(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    file = tmp_path / "mesh.yaml"
    file.write_text("model: m\nstages:\n- {address: '127.0.0.1:1', tpp: 2}\n")
    for command in (("router",), ("stage", "--index", "0"), ("up",)):
        said = only_line(capsys, *command, "--config", str(file))
        assert "tpp" in said
        assert "mesh.yaml" in said


@pytest.mark.parametrize("command", [("router",), ("stage", "--index", "0"), ("up",), ("simulate",)])
def test_a_file_that_is_no_text(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, command: tuple[str, ...]
) -> None:
    file = tmp_path / "mesh.yaml"
    file.write_bytes(b"model: \xff\xfe\n")
    said = only_line(capsys, *command, *(() if command[0] == "simulate" else ("--config",)), str(file))
    assert "mesh.yaml: not UTF-8" in said


@pytest.mark.parametrize("line", [stage_line, router_line, up_line])
def test_names_that_no_model_can_have(capsys: pytest.CaptureFixture[str], line) -> None:
    assert "a..b/c" in line(capsys, "a..b/c")
    assert "--model is empty" in line(capsys, "")


def test_files_that_cannot_be_written(
    capsys: pytest.CaptureFixture[str], small: Path, tmp_path: Path
) -> None:
    for key in ("--step-log", "--event-log"):
        assert f"{key}: " in router_line(capsys, small, key, str(tmp_path / "nowhere" / "log"))
    assert "--ready-file: " in up_line(capsys, small, "--ready-file", str(tmp_path / "nowhere" / "file"))


def test_a_script_that_does_not_parse_starts_no_simulated_stage(
    capsys: pytest.CaptureFixture[str], small: Path
) -> None:
    said = stage_line(capsys, small, "--engine", "sim", "--cost", "much")
    assert "--cost: 'much'" in said


@pytest.fixture
def taken() -> Iterator[str]:
    """The address of somebody who listens."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        yield f"127.0.0.1:{server.getsockname()[1]}"


def test_port_in_use(capsys: pytest.CaptureFixture[str], small: Path, taken: str) -> None:
    for command, key in (("stage", "--listen"), ("router", "--listen"), ("router", "--admin")):
        flags = ("--stage", "127.0.0.1:9", "--listen", "127.0.0.1:0") if command == "router" else ()
        flags += ("--admin", "127.0.0.1:0") if (command, key) == ("router", "--listen") else ()
        said = only_line(capsys, command, "--model", str(small), *flags, key, taken)
        assert key in said
        assert taken in said


def test_a_metrics_port_in_use_is_all_a_router_ends_with(small: Path, tmp_path: Path, taken: str) -> None:
    """Its public server listens by then."""
    router = start_router(tmp_path, small, ["127.0.0.1:9"], ("--metrics", taken))
    try:
        assert router.process.wait(START_TIMEOUT_S) == 2
        assert taken in check_line(router.log.read_text())
    finally:
        router.kill()


def test_port_of_another_stage(lone_stage: Service, wide: Path, tmp_path: Path) -> None:
    """Two gRPC servers on one port would share it silently; the second must refuse, the first serve on."""
    address = address_of(lone_stage)
    second = start_stage(tmp_path, wide, 0, 1, listen=address)
    try:
        assert second.process.wait(START_TIMEOUT_S) == 2
        assert address in check_line(second.log.read_text())
    finally:
        second.kill()
    assert lone_stage.process.poll() is None


CHAINS = {
    "another model": ("small", 1, "another model"),
    "an overlap": ("wide", 2, "layers 0:1 are on two stages"),
}


@pytest.mark.parametrize("what", CHAINS)
def test_a_chain_that_does_not_fit(
    lone_stage: Service, request: pytest.FixtureRequest, tmp_path: Path, what: str
) -> None:
    """The router says so, and goes on looking: a stage may be replaced."""
    model, count, words = CHAINS[what]
    addresses = [address_of(lone_stage)] * count
    router = start_router(tmp_path, request.getfixturevalue(model), addresses)
    try:
        line = router.said(f"the stages do not make a lane: .*{re.escape(words)}.*").group()
        assert addresses[0] in line
        assert router.stop() == 0
    finally:
        router.kill()


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (("--stages", "99"), "99 stages asked for, but the model has"),
        (("--tp", "99"), "--tp is 99, but the model has"),
        (("--kv-memory", "1KiB"), "--kv-memory 1024: one KV block"),
        (("--max-context", "9999999"), "--max-context 9999999: the model's context is"),
        (("--log-level", "loud"), "--log-level: 'loud' is not a level"),
    ],
)
def test_up_starts_nothing_that_cannot_be(
    capsys: pytest.CaptureFixture[str], small: Path, flags: tuple[str, ...], words: str
) -> None:
    assert up_line(capsys, small, *flags).startswith(f"error: {words}")
