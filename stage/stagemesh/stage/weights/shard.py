"""Loads the shard of one rank of one stage."""

from __future__ import annotations

from collections.abc import Callable

import torch

from stagemesh.model.deal import RankDeal
from stagemesh.model.shard_shapes import shard_shapes
from stagemesh.model.source import ModelSource
from stagemesh.stage.weights.gguf_reader import GGUFWeightReader
from stagemesh.stage.weights.piece import plan_pieces
from stagemesh.stage.weights.reader import WeightReader
from stagemesh.stage.weights.safetensors_reader import SafetensorsReader
from stagemesh.wire.errors import ModelError

Progress = Callable[[int, int], None]
"""Called with bytes of the shard filled so far and bytes in all."""


def load_shard(
    source: ModelSource,
    layers: range,
    rank: RankDeal,
    *,
    dtype: torch.dtype,
    has_embedding: bool,
    has_head: bool,
    progress: Progress | None = None,
) -> dict[str, torch.Tensor]:
    """Reads a rank's share of a stage's layers, on the CPU, under the names and shapes of `shard_shapes`.

    Layers keep the model's own numbers. Where the head is tied and the stage has the embedding too, 'head'
    and 'embed' are one tensor.

    Raises:
        ModelError: A tensor is missing or of a wrong shape or type, or a file is truncated; it names which.
    """
    shapes = shard_shapes(source.config, layers, rank, has_embedding=has_embedding, has_head=has_head)
    pieces = plan_pieces(source.config, layers, rank, has_embedding=has_embedding, has_head=has_head)
    tied = has_embedding and has_head and source.config.tie_embeddings
    if tied:
        del shapes["head"]
    itemsize = dtype.itemsize
    total = itemsize * sum(torch.Size(shape).numel() for shape in shapes.values())
    done = 0
    shard: dict[str, torch.Tensor] = {}
    with _open_reader(source) as reader:
        for piece in pieces:
            if piece.target not in shard:
                shard[piece.target] = torch.empty(shapes[piece.target], dtype=dtype)
            out = shard[piece.target][piece.target_row : piece.target_row + len(piece.rows)]
            reader.read_into(out, piece)
            done += out.numel() * itemsize
            if progress is not None:
                progress(done, total)
    if tied:
        shard["head"] = shard["embed"]
    return shard


def _open_reader(source: ModelSource) -> WeightReader:
    if source.kind == "gguf":
        return GGUFWeightReader(source)
    if source.kind == "safetensors":
        return SafetensorsReader(source)
    raise ModelError(
        f"model folder {source.path} has no weights; give the stage --load-format dummy or a full model"
    )
