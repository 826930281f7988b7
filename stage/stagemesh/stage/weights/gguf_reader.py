"""Weights from a GGUF file, dequantized as they are read."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from stagemesh.model.gguf_file import GGUFTensor, open_gguf
from stagemesh.model.source import ModelSource
from stagemesh.stage.weights.dequantize import SUPPORTED_TYPES, block_of, dequantize_into
from stagemesh.stage.weights.piece import Piece
from stagemesh.stage.weights.reader import WeightReader, check_shape
from stagemesh.wire.errors import ModelError

_NAMES = {
    "embed": "token_embd.weight",
    "head": "output.weight",
    "norm": "output_norm.weight",
    "attn_norm": "blk.{}.attn_norm.weight",
    "mlp_norm": "blk.{}.ffn_norm.weight",
    "q": "blk.{}.attn_q.weight",
    "k": "blk.{}.attn_k.weight",
    "v": "blk.{}.attn_v.weight",
    "o": "blk.{}.attn_output.weight",
    "gate": "blk.{}.ffn_gate.weight",
    "up": "blk.{}.ffn_up.weight",
    "down": "blk.{}.ffn_down.weight",
}
_CHUNK_ELEMENTS = 1 << 18
"""Weights dequantized at once: 1 MiB of float32, which stays in a core's cache between the passes over it."""


class GGUFWeightReader(WeightReader):
    """Slices the mapped file's rows, and its columns at whole blocks, before it dequantizes."""

    def __init__(self, source: ModelSource) -> None:
        self._path = source.path
        self._tensors = open_gguf(source.path, tokenizer=False).tensors

    def read_into(self, out: torch.Tensor, piece: Piece) -> None:
        tensor = self._find(piece)
        if len(tensor.shape) == 1:
            _fill(out.unsqueeze(0), tensor, tensor.data[None], piece.rows)
            return
        _fill(out, tensor, tensor.data[piece.rows.start : piece.rows.stop], piece.columns)
        if piece.part in ("q", "k"):
            _undo_interleave(out, piece.head_dim)

    def close(self) -> None:
        self._tensors = {}

    def _find(self, piece: Piece) -> GGUFTensor:
        name = _NAMES[piece.part].format(piece.layer)
        tensor = self._tensors.get(name)
        if tensor is None:
            raise ModelError(
                f"{self._path} has no tensor {name}, expected {list(piece.full_shape)}; "
                "the model is incomplete, download it again"
            )
        check_shape(self._path, name, tensor.shape, piece)
        if tensor.type_name not in SUPPORTED_TYPES:
            raise ModelError(
                f"{self._path}: tensor {name} has type {tensor.type_name}, which is not supported; "
                f"supported: {', '.join(SUPPORTED_TYPES)}"
            )
        return tensor


def _fill(out: torch.Tensor, tensor: GGUFTensor, rows: NDArray[Any], columns: range) -> None:
    """Fills `out` [rows, columns] from raw rows of the whole width."""
    block, block_bytes = block_of(tensor.ggml_type)
    # The columns' blocks; a cut inside a block dequantizes the whole block and drops what is outside.
    first, last = columns.start // block, -(-columns.stop // block)
    unit = block_bytes // rows.itemsize
    inside = slice(columns.start - first * block, columns.stop - first * block)
    width = (last - first) * block
    step = max(1, _CHUNK_ELEMENTS // width)
    direct = out.dtype == torch.float32 and out.is_contiguous() and len(columns) == width
    buffer = None if direct else torch.empty(step, width, dtype=torch.float32)
    for begin in range(0, len(rows), step):
        # A copy, because torch takes no read-only memory; one chunk, so it costs nothing.
        chunk = np.array(rows[begin : begin + step, first * unit : last * unit])
        target = out[begin : begin + step]
        if buffer is None:
            dequantize_into(target, chunk, tensor.ggml_type)
        else:
            whole = buffer[: len(chunk)]
            dequantize_into(whole, chunk, tensor.ggml_type)
            target.copy_(whole[:, inside])


def _undo_interleave(out: torch.Tensor, head_dim: int) -> None:
    """Reorders q or k rows, whole heads, from GGUF's interleaved rotation pairs to halves, in place.

    GGUF's converter stores rows i and i + head_dim / 2 of a Llama head next to each other.
    """
    num_rows, num_columns = out.shape
    pairs = out.view(num_rows // head_dim, head_dim // 2, 2, num_columns)
    out.copy_(pairs.transpose(1, 2).reshape(num_rows, num_columns))
