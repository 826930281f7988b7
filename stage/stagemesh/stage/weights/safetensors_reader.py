"""Weights from safetensors, one file or sharded."""

from __future__ import annotations

import threading
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open

from stagemesh.model.safetensors_header import TensorInfo, read_safetensors_header
from stagemesh.model.source import ModelSource
from stagemesh.stage.weights.piece import Piece
from stagemesh.stage.weights.reader import WeightReader, check_shape
from stagemesh.wire.errors import ModelError

_NAMES = {
    "embed": "model.embed_tokens.weight",
    "head": "lm_head.weight",
    "norm": "model.norm.weight",
    "attn_norm": "model.layers.{}.input_layernorm.weight",
    "mlp_norm": "model.layers.{}.post_attention_layernorm.weight",
    "q": "model.layers.{}.self_attn.q_proj.weight",
    "k": "model.layers.{}.self_attn.k_proj.weight",
    "v": "model.layers.{}.self_attn.v_proj.weight",
    "o": "model.layers.{}.self_attn.o_proj.weight",
    "gate": "model.layers.{}.mlp.gate_proj.weight",
    "up": "model.layers.{}.mlp.up_proj.weight",
    "down": "model.layers.{}.mlp.down_proj.weight",
}
_DTYPES = ("F32", "F16", "BF16", "F64")


class SafetensorsReader(WeightReader):
    """Opens a shard file when a tensor in it is first asked for: files of other stages need not be there."""

    def __init__(self, source: ModelSource) -> None:
        self._source = source
        self._files: dict[Path, tuple[Any, dict[str, TensorInfo]]] = {}
        self._stack = ExitStack()
        self._lock = threading.Lock()

    def read_into(self, out: torch.Tensor, piece: Piece) -> None:
        name = _NAMES[piece.part].format(piece.layer)
        path = self._source.weight_files.get(name)
        if path is None:
            raise ModelError(
                f"{self._source.path} has no tensor {name}, expected {list(piece.full_shape)}; "
                "the model is incomplete, download it again"
            )
        with self._lock:
            file, header = self._open(path, name)
        info = header.get(name)
        if info is None:
            raise ModelError(
                f"{path} has no tensor {name}, expected {list(piece.full_shape)} by the model's index"
            )
        check_shape(path, name, info.shape, piece)
        if info.dtype not in _DTYPES:
            raise ModelError(
                f"{path}: tensor {name} has type {info.dtype}, which is not supported; "
                f"supported: {', '.join(_DTYPES)}"
            )
        rows, columns = piece.rows, piece.columns
        part = file.get_slice(name)
        if len(info.shape) == 1 or len(columns) == info.shape[1]:
            out.copy_(part[rows.start : rows.stop])
        else:
            out.copy_(part[rows.start : rows.stop, columns.start : columns.stop])

    def close(self) -> None:
        self._files.clear()
        self._stack.close()

    def _open(self, path: Path, name: str) -> tuple[Any, dict[str, TensorInfo]]:
        if path not in self._files:
            if not path.exists():
                raise ModelError(f"shard file {path} is missing; this stage needs tensor {name} from it")
            header = read_safetensors_header(path)
            try:
                file = self._stack.enter_context(safe_open(path, framework="pt"))
            except Exception as error:
                raise ModelError(f"cannot read {path}: {error}; download it again") from error
            self._files[path] = (file, header)
        return self._files[path]
