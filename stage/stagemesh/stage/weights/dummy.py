"""Random weights, for measuring without a model's files."""

from __future__ import annotations

import hashlib

import torch

from stagemesh.stage.weights.piece import Piece
from stagemesh.stage.weights.reader import WeightReader

_CHUNK_ELEMENTS = 1 << 24
"""Numbers made at once: 128 MiB of scratch, enough to fill a GPU with each kernel."""
_CPU_CHUNK_ELEMENTS = 1 << 17
"""On a CPU: 1 MiB, which stays in a core's cache between the passes over it."""


class DummyReader(WeightReader):
    """Makes what it is asked to read: each value a hash of the seed, its tensor, its row and its column.

    So any split by layers or by ranks gives the same model, on any device. Norms are ones; elsewhere the values
    are uniform with variance 1 / columns, so that a product with a unit-variance vector keeps unit variance.
    """

    fills_device = True

    def __init__(self, seed: int = 0) -> None:
        self._seed = seed
        self._scratch: dict[torch.device, tuple[torch.Tensor, torch.Tensor]] = {}

    def read_into(self, out: torch.Tensor, piece: Piece) -> None:
        if len(piece.full_shape) == 1:
            out.fill_(1)
            return
        width = piece.full_shape[1]
        digest = hashlib.sha256(f"{self._seed}/{piece.part}/{piece.layer}".encode()).digest()
        key = _signed(int.from_bytes(digest[:4], "little"))
        chunk = _CPU_CHUNK_ELEMENTS if out.device.type == "cpu" else _CHUNK_ELEMENTS
        step = max(1, chunk // len(piece.columns))
        columns = torch.arange(piece.columns.start, piece.columns.stop, dtype=torch.int32, device=out.device)
        for begin in range(0, len(piece.rows), step):
            target = out[begin : begin + step]
            first = piece.rows.start + begin
            rows = torch.arange(first, first + len(target), dtype=torch.int64, device=out.device)
            # Cut to 32 bits: a tensor of more than 2^32 elements repeats itself.
            rows = rows.mul_(width).to(torch.int32)
            bits, scratch = self._buffers(target)
            torch.add(rows.unsqueeze(1), columns.unsqueeze(0), out=bits)
            _mix(bits.bitwise_xor_(key), scratch)
            # Not through a narrower type first: float16 ends at 65504.
            values = scratch.view(torch.float32)
            torch.mul(bits, (3.0 / width) ** 0.5 / (1 << 31), out=values)
            target.copy_(values)

    def close(self) -> None:
        self._scratch.clear()

    def _buffers(self, target: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Two int32 tensors shaped as `target`, the same memory each time."""
        pair = self._scratch.get(target.device)
        if pair is None or pair[0].numel() < target.numel():
            pair = (
                torch.empty(target.numel(), dtype=torch.int32, device=target.device),
                torch.empty(target.numel(), dtype=torch.int32, device=target.device),
            )
            self._scratch[target.device] = pair
        bits, scratch = (buffer[: target.numel()].view(target.shape) for buffer in pair)
        return bits, scratch


def _mix(bits: torch.Tensor, scratch: torch.Tensor) -> None:
    """Spreads 32-bit integers over all of their range, in place and one to one (lowbias32, C. Wellons)."""
    for shift, factor in ((16, 0x7FEB352D), (15, 0x846CA68B), (16, 1)):
        torch.bitwise_right_shift(bits, shift, out=scratch)
        bits.bitwise_xor_(scratch.bitwise_and_((1 << (32 - shift)) - 1))
        if factor != 1:
            bits.mul_(_signed(factor))


def _signed(value: int) -> int:
    """The int32 of the same 32 bits."""
    return value - (1 << 32) if value >= 1 << 31 else value
