"""Loads the shard of one rank of one stage."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, closing

import torch

from stagemesh.model.deal import RankDeal
from stagemesh.model.shard_shapes import shard_shapes
from stagemesh.model.source import ModelSource
from stagemesh.stage.weights.dummy import DummyReader
from stagemesh.stage.weights.gguf_reader import GGUFWeightReader
from stagemesh.stage.weights.piece import Piece, plan_pieces
from stagemesh.stage.weights.reader import WeightReader
from stagemesh.stage.weights.safetensors_reader import SafetensorsReader
from stagemesh.stage.weights.upload import Uploader
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
    device: torch.device | str = "cpu",
    dummy: bool = False,
    seed: int = 0,
    progress: Progress | None = None,
) -> dict[str, torch.Tensor]:
    """Reads a rank's share of a stage's layers, under the names and shapes of `shard_shapes`.

    Layers keep the model's own numbers. Where the head is tied and the stage has the embedding too, 'head'
    and 'embed' are one tensor. On another device than the CPU, files are read while what was read before is
    copied there. With `dummy`, random weights of `seed` take the place of the files; they are made on the
    device.

    Raises:
        ModelError: A tensor is missing or of a wrong shape or type, or a file is truncated; it names which.
    """
    device = torch.device(device)
    shapes = shard_shapes(source.config, layers, rank, has_embedding=has_embedding, has_head=has_head)
    pieces = plan_pieces(source.config, layers, rank, has_embedding=has_embedding, has_head=has_head)
    tied = has_embedding and has_head and source.config.tie_embeddings
    if tied:
        del shapes["head"]
    total = dtype.itemsize * sum(torch.Size(shape).numel() for shape in shapes.values())
    done = 0
    shard: dict[str, torch.Tensor] = {}
    with DummyReader(seed) if dummy else _open_reader(source) as reader:
        for elements in _fill(shard, shapes, pieces, reader, device, dtype):
            done += elements * dtype.itemsize
            if progress is not None:
                progress(done, total)
    if tied:
        shard["head"] = shard["embed"]
    return shard


def _fill(
    shard: dict[str, torch.Tensor],
    shapes: dict[str, tuple[int, ...]],
    pieces: list[Piece],
    reader: WeightReader,
    device: torch.device,
    dtype: torch.dtype,
) -> Iterator[int]:
    """Reads all pieces into `shard`, whose tensors it makes; yields elements as they are done."""
    with ExitStack() as stack:
        uploader = None
        if device.type != "cpu" and not reader.fills_device:
            uploader = stack.enter_context(closing(Uploader(reader, device, dtype)))
        for piece in pieces:
            if piece.target not in shard:
                shard[piece.target] = torch.empty(shapes[piece.target], dtype=dtype, device=device)
            out = shard[piece.target][piece.target_row : piece.target_row + len(piece.rows)]
            if uploader is not None:
                yield from uploader.add(out, piece)
            else:
                reader.read_into(out, piece)
                yield out.numel()
        if uploader is not None:
            yield from uploader.finish()


def _open_reader(source: ModelSource) -> WeightReader:
    if source.kind == "gguf":
        return GGUFWeightReader(source)
    if source.kind == "safetensors":
        return SafetensorsReader(source)
    raise ModelError(
        f"model folder {source.path} has no weights; give the stage --load-format dummy or a full model"
    )
