"""Opening GGUF files, whole and damaged."""

from __future__ import annotations

from pathlib import Path

import gguf
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from stagemesh.model.gguf_file import open_gguf
from stagemesh.wire.errors import ModelError

TOKENS = ["<s>", "ä", "日本", "x" * 300, ""]


@pytest.fixture(scope="module")
def file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("gguf") / "tiny.gguf"
    writer = gguf.GGUFWriter(str(path), "llama")
    writer.add_name("tiny")
    writer.add_uint32("some.u32", 7)
    writer.add_int32("some.i32", -7)
    writer.add_float32("some.f32", 0.5)
    writer.add_bool("some.bool", True)
    writer.add_uint64("some.u64", 1 << 40)
    writer.add_array("some.ints", [1, -2, 3])
    writer.add_array("some.floats", [0.5, 1.5])
    writer.add_token_list(TOKENS)
    writer.add_bos_token_id(1)
    rng = np.random.default_rng(0)
    for name, kind in [("a", "F32"), ("b", "F16"), ("c", "Q4_1"), ("d", "BF16")]:
        values = rng.standard_normal((6, 64)).astype(np.float32)
        ggml_type = gguf.GGMLQuantizationType[kind]
        writer.add_tensor(name, gguf.quants.quantize(values, ggml_type), raw_dtype=ggml_type)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def test_metadata_is_plain_values(file: Path) -> None:
    metadata = open_gguf(file).metadata
    assert metadata["general.architecture"] == "llama"
    assert metadata["some.u32"] == 7
    assert metadata["some.i32"] == -7
    assert metadata["some.f32"] == 0.5
    assert metadata["some.bool"] is True
    assert metadata["some.u64"] == 1 << 40
    assert metadata["some.ints"] == [1, -2, 3]
    assert metadata["some.floats"] == [0.5, 1.5]
    assert metadata["tokenizer.ggml.tokens"] == TOKENS
    assert {type(value) for value in metadata.values()} <= {str, int, float, bool, list}


def test_tensors_equal_the_gguf_packages(file: Path) -> None:
    ours = open_gguf(file).tensors
    theirs = gguf.GGUFReader(str(file)).tensors
    assert list(ours) == [tensor.name for tensor in theirs] == ["a", "b", "c", "d"]
    for tensor in theirs:
        mine = ours[tensor.name]
        assert mine.shape == (6, 64)
        assert mine.type_name == tensor.tensor_type.name
        assert mine.data.dtype == tensor.data.dtype
        assert mine.data.tobytes() == tensor.data.tobytes()


def test_tokenizer_arrays_can_be_left_out(file: Path) -> None:
    whole, lean = open_gguf(file), open_gguf(file, tokenizer=False)
    assert set(whole.metadata) - set(lean.metadata) == {"tokenizer.ggml.tokens"}
    assert lean.metadata["tokenizer.ggml.bos_token_id"] == 1
    assert lean.metadata["some.ints"] == [1, -2, 3]
    assert lean.tensors.keys() == whole.tensors.keys()


def test_every_truncation_is_noticed(file: Path, tmp_path: Path) -> None:
    raw = file.read_bytes()
    tensor = open_gguf(file).tensors["d"]
    end = tensor.offset + tensor.data.nbytes
    cut = tmp_path / "cut.gguf"
    for size in [*range(0, 1200, 7), tensor.offset, end - 1]:
        cut.write_bytes(raw[:size])
        for tokenizer in (True, False):
            with pytest.raises(ModelError, match=r"cut\.gguf"):
                open_gguf(cut, tokenizer=tokenizer)
    with pytest.raises(ModelError, match=f"tensor d ends at byte {end}, but the file ends at {end - 1}"):
        open_gguf(cut)
    cut.write_bytes(raw[:end])
    assert "d" in open_gguf(cut).tensors


@settings(max_examples=300, deadline=None)
@given(st.lists(st.tuples(st.integers(0, 1100), st.integers(0, 255)), min_size=1, max_size=6))
def test_damage_never_ends_in_another_error(
    file: Path, tmp_path_factory: pytest.TempPathFactory, changes: list[tuple[int, int]]
) -> None:
    raw = bytearray(file.read_bytes())
    for position, value in changes:
        raw[position] = value
    damaged = tmp_path_factory.getbasetemp() / "damaged.gguf"
    damaged.unlink(missing_ok=True)  # never rewritten under a live mapping
    damaged.write_bytes(raw)
    try:
        open_gguf(damaged)
    except ModelError as error:
        assert "\n" not in str(error)  # noqa: PT017 - both outcomes are right


def test_what_is_not_gguf_is_named(tmp_path: Path) -> None:
    other = tmp_path / "other.gguf"
    other.write_bytes(b"PK\x03\x04" + bytes(100))
    with pytest.raises(ModelError, match=r"other\.gguf is not a GGUF file"):
        open_gguf(other)
    with pytest.raises(ModelError, match=r"cannot read .*missing\.gguf"):
        open_gguf(tmp_path / "missing.gguf")
    other.write_bytes(b"GGUF\x00\x00\x00\x03" + bytes(100))
    with pytest.raises(ModelError, match="big-endian"):
        open_gguf(other)
    other.write_bytes(b"GGUF\x09\x00\x00\x00" + bytes(100))
    with pytest.raises(ModelError, match="version 9; supported are 2 and 3"):
        open_gguf(other)
