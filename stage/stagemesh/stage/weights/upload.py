"""Weights from a file to a device, the reading beside the copying."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, replace
from queue import SimpleQueue

import torch

from stagemesh.stage.weights.piece import Piece
from stagemesh.stage.weights.reader import WeightReader

NUM_BUFFERS = 4
NUM_THREADS = 3
BUFFER_ELEMENTS = 1 << 24
"""32 MiB of 16-bit weights: long copies, and 128 MiB of pinned memory in all."""


@dataclass(slots=True)
class _Buffer:
    """Host memory that one chunk passes through; free again when its copy has ended."""

    memory: torch.Tensor
    copied: torch.cuda.Event | None = None


class Uploader:
    """Reads pieces on threads into pinned memory and copies each chunk from there on a stream of its own.

    Args:
        reader: Read from several threads at once.
        device: Where the tensors are; on a CPU the memory is not pinned and the copies are plain ones.
        dtype: Of the tensors.
        buffer_elements: Of a chunk at most, unless one row, or one head of q and k, is longer.
    """

    def __init__(
        self,
        reader: WeightReader,
        device: torch.device,
        dtype: torch.dtype,
        *,
        buffer_elements: int = BUFFER_ELEMENTS,
    ) -> None:
        self._reader = reader
        self._dtype = dtype
        self._elements = buffer_elements
        self._stream = torch.cuda.Stream(device) if device.type == "cuda" else None
        self._free: SimpleQueue[_Buffer] = SimpleQueue()
        for _ in range(NUM_BUFFERS):
            self._free.put(_Buffer(self._allocate(buffer_elements)))
        self._threads = ThreadPoolExecutor(NUM_THREADS, thread_name_prefix="weights")
        # Never more than there are buffers: then the oldest always gets one, and with it everything moves.
        self._reading: deque[tuple[torch.Tensor, Future[tuple[_Buffer, torch.Tensor]]]] = deque()

    def add(self, out: torch.Tensor, piece: Piece) -> Iterator[int]:
        """Fill `out` with a piece; yields elements on their way to the device, of this and earlier pieces."""
        for target, part in _chunks(out, piece, self._elements):
            if len(self._reading) == NUM_BUFFERS:
                yield self._copy_oldest()
            self._reading.append((target, self._threads.submit(self._read, target.shape, part)))

    def finish(self) -> Iterator[int]:
        """Copy what is left and wait until all of it is on the device; yields as `add` does."""
        while self._reading:
            yield self._copy_oldest()
        if self._stream is not None:
            self._stream.synchronize()

    def close(self) -> None:
        """End the threads, whatever they still have to read."""
        self._threads.shutdown(cancel_futures=True)

    def _read(self, shape: torch.Size, piece: Piece) -> tuple[_Buffer, torch.Tensor]:
        buffer = self._free.get()
        if buffer.copied is not None:
            buffer.copied.synchronize()
        if buffer.memory.numel() < shape.numel():
            buffer.memory = self._allocate(shape.numel())
        chunk = buffer.memory[: shape.numel()].view(shape)
        self._reader.read_into(chunk, piece)
        return buffer, chunk

    def _copy_oldest(self) -> int:
        target, future = self._reading.popleft()
        buffer, chunk = future.result()
        if self._stream is None:
            target.copy_(chunk)
        else:
            with torch.cuda.stream(self._stream):
                target.copy_(chunk, non_blocking=True)
                buffer.copied = torch.cuda.Event()
                buffer.copied.record(self._stream)
        self._free.put(buffer)
        return target.numel()

    def _allocate(self, elements: int) -> torch.Tensor:
        return torch.empty(elements, dtype=self._dtype, pin_memory=self._stream is not None)


def _chunks(out: torch.Tensor, piece: Piece, elements: int) -> Iterator[tuple[torch.Tensor, Piece]]:
    """Cuts a piece by rows; q and k between heads, since a reader may reorder the rows of a head."""
    width = len(piece.columns) if len(piece.full_shape) > 1 else 1
    unit = piece.head_dim if piece.part in ("q", "k") else 1
    step = max(1, elements // width // unit) * unit
    for begin in range(0, len(piece.rows), step):
        rows = piece.rows[begin : begin + step]
        yield (
            out[begin : begin + len(rows)],
            replace(piece, rows=rows, target_row=piece.target_row + begin),
        )
