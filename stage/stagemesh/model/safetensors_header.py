"""The header of a safetensors file, read without its weights and without torch."""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from pathlib import Path

from stagemesh.wire.errors import ModelError

_MAX_HEADER_BYTES = 100_000_000  # the format's own limit
_BYTES = {"F64": 8, "F32": 4, "F16": 2, "BF16": 2, "I64": 8, "I32": 4, "I16": 2, "I8": 1, "U8": 1, "BOOL": 1}


@dataclass(frozen=True, slots=True, kw_only=True)
class TensorInfo:
    """Where a tensor lies in its file."""

    dtype: str
    """As the format writes it: F32, F16, BF16, ..."""
    shape: tuple[int, ...]
    begin: int
    """Byte of the file."""
    end: int
    """Byte of the file, exclusive."""


def read_safetensors_header(path: Path) -> dict[str, TensorInfo]:
    """Reads the tensor table of a safetensors file and checks it against the file's size.

    Raises:
        ModelError: The file is missing, truncated or damaged.
    """
    try:
        size = path.stat().st_size
        with path.open("rb") as file:
            length = int.from_bytes(file.read(8), "little")
            if size < 8 or length > min(_MAX_HEADER_BYTES, size - 8):
                raise ModelError(
                    f"{path} is truncated or not a safetensors file: its first 8 bytes ask for a header of "
                    f"{length} bytes, but the file has {size} bytes; download it again"
                )
            raw = file.read(length)
    except OSError as error:
        raise ModelError(f"cannot read {path}: {error.strerror}; expected a safetensors file") from error
    try:
        table = json.loads(raw)
        table.pop("__metadata__", None)
        tensors = {name: _read_info(entry, 8 + length) for name, entry in table.items()}
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ModelError(
            f"{path} is damaged: its header is no tensor table ({error}); download it again"
        ) from error
    end = max((info.end for info in tensors.values()), default=8 + length)
    if end != size:
        raise ModelError(
            f"{path} is truncated or damaged: its tensors end at byte {end}, but the file ends at {size}; "
            "download it again"
        )
    for name, info in tensors.items():
        num_bytes = math.prod(info.shape) * _BYTES.get(info.dtype, 0)
        if info.dtype in _BYTES and num_bytes != info.end - info.begin:
            raise ModelError(
                f"{path} is damaged: tensor {name} {list(info.shape)} of {info.dtype} takes "
                f"{info.end - info.begin} bytes, expected {num_bytes}"
            )
    return tensors


def _read_info(entry: dict[str, object], base: int) -> TensorInfo:
    offsets, shape = entry["data_offsets"], entry["shape"]
    if not isinstance(offsets, list) or not isinstance(shape, list):
        raise TypeError("data_offsets and shape must be lists")
    begin, end = (int(offset) for offset in offsets)
    if not 0 <= begin <= end:
        raise ValueError(f"data_offsets {offsets}")
    return TensorInfo(
        dtype=str(entry["dtype"]), shape=tuple(int(n) for n in shape), begin=base + begin, end=base + end
    )
