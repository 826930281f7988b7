"""A GGUF file: metadata as plain values, tensors as views of the mapped file."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from gguf.constants import GGML_QUANT_SIZES, GGMLQuantizationType
from numpy.typing import NDArray

from stagemesh.model.gguf_header import HeaderCursor
from stagemesh.wire.errors import ModelError

_MAGIC = 0x46554747  # "GGUF", little endian
_VERSIONS = (2, 3)
_DEFAULT_ALIGNMENT = 32
_PLAIN_DTYPES = {"F32": np.float32, "F16": np.float16, "F64": np.float64, "I32": np.int32}


@dataclass(frozen=True, slots=True, kw_only=True)
class GGUFTensor:
    """One tensor of the file, still quantized."""

    name: str
    """GGUF's own name, as blk.0.attn_q.weight."""
    shape: tuple[int, ...]
    """Elements, outermost first, as torch has it: [rows, cols]."""
    ggml_type: GGMLQuantizationType
    """How the elements are packed."""
    data: NDArray[Any]
    """A view of the mapped file: float32 or float16 [*shape]; else uint8 [*rows, bytes of a row]."""
    offset: int
    """Of the data, in bytes from the beginning of the file."""

    @property
    def type_name(self) -> str:
        """The packing by name, as Q4_1."""
        return str(self.ggml_type.name)


@dataclass(frozen=True, slots=True, kw_only=True)
class GGUFFile:
    """An opened GGUF file. Nothing of the tensors is in memory before it is touched."""

    path: Path
    metadata: dict[str, object]
    """Values as str, int, float, bool or list."""
    tensors: dict[str, GGUFTensor]
    """By GGUF name, in the file's order."""
    data_offset: int
    """Bytes of the header, padding included."""


def open_gguf(path: str | Path, *, tokenizer: bool = True) -> GGUFFile:
    """Opens a GGUF file and checks that every tensor lies within it.

    Args:
        path: The file.
        tokenizer: False leaves out the long tokenizer arrays (tokens, merges, scores, types): a stage worker
            does not need them.

    Raises:
        ModelError: The file is missing, not GGUF, of another version or byte order, truncated or damaged.
    """
    path = Path(path)
    try:
        mapped: NDArray[np.uint8] = np.memmap(path, dtype=np.uint8, mode="r")
    except (OSError, ValueError) as error:  # ValueError: an empty file cannot be mapped
        reason = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
        raise ModelError(f"cannot read {path}: {reason}; expected a GGUF file") from error
    cursor = HeaderCursor(path, mapped.data)
    _check_version(cursor)
    num_tensors, num_values = cursor.u64(), cursor.u64()
    metadata: dict[str, object] = {}
    for _ in range(num_values):
        key = cursor.string()
        value = cursor.value(keep_arrays=tokenizer or not key.startswith("tokenizer.ggml."))
        if value is not None:
            metadata[key] = value
    infos = [_read_info(cursor) for _ in range(num_tensors)]
    alignment = metadata.get("general.alignment", _DEFAULT_ALIGNMENT)
    if not isinstance(alignment, int) or alignment <= 0:
        raise ModelError(f"{path} is damaged: general.alignment is {alignment!r}, expected a positive number")
    data_offset = -(-cursor.offset // alignment) * alignment
    tensors: dict[str, GGUFTensor] = {}
    for name, shape, type_id, offset in infos:
        if name in tensors:
            raise ModelError(f"{path} is damaged: it has two tensors named {name}")
        tensors[name] = _map_tensor(path, mapped, name, shape, type_id, data_offset + offset)
    return GGUFFile(path=path, metadata=metadata, tensors=tensors, data_offset=data_offset)


def _check_version(cursor: HeaderCursor) -> None:
    magic = cursor.u32()
    if magic != _MAGIC:
        raise ModelError(
            f"{cursor.path} is not a GGUF file: it begins with {magic.to_bytes(4, 'little')!r}, "
            "expected b'GGUF'"
        )
    version = cursor.u32()
    if version & 0xFFFF == 0:
        raise ModelError(
            f"{cursor.path} is a big-endian GGUF file; convert it to little-endian (gguf-convert-endian)"
        )
    if version not in _VERSIONS:
        raise ModelError(f"{cursor.path} is GGUF version {version}; supported are 2 and 3")


def _read_info(cursor: HeaderCursor) -> tuple[str, tuple[int, ...], int, int]:
    name = cursor.string()
    if not name.isprintable():  # errors name tensors, and are one line
        raise ModelError(f"{cursor.path} is damaged: it has a tensor named {name!a}")
    num_dims = cursor.u32()
    if not 0 < num_dims <= 4:
        raise ModelError(
            f"{cursor.path} is damaged: tensor {name} has {num_dims} dimensions, expected 1 to 4"
        )
    dims = [cursor.u64() for _ in range(num_dims)]
    return name, tuple(reversed(dims)), cursor.u32(), cursor.u64()


def _map_tensor(
    path: Path, mapped: NDArray[np.uint8], name: str, shape: tuple[int, ...], type_id: int, offset: int
) -> GGUFTensor:
    try:
        ggml_type = GGMLQuantizationType(type_id)
    except ValueError as error:
        raise ModelError(
            f"{path}: tensor {name} has ggml type {type_id}, which this version of the gguf package "
            "does not know"
        ) from error
    block, block_bytes = GGML_QUANT_SIZES[ggml_type]
    if shape[-1] % block:
        raise ModelError(
            f"{path} is damaged: tensor {name} has rows of {shape[-1]}, expected a multiple of {block} "
            f"for {ggml_type.name}"
        )
    end = offset + math.prod(shape) // block * block_bytes
    if end > mapped.size:
        raise ModelError(
            f"{path} is truncated: tensor {name} ends at byte {end}, but the file ends at {mapped.size}; "
            "download it again"
        )
    raw = mapped[offset:end]
    dtype = _PLAIN_DTYPES.get(ggml_type.name)
    if dtype is None:
        data: NDArray[Any] = raw.reshape(*shape[:-1], shape[-1] // block * block_bytes)
    else:
        data = raw.view(dtype).reshape(shape)
    return GGUFTensor(name=name, shape=shape, ggml_type=ggml_type, data=data, offset=offset)
