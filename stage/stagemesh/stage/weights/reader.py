"""How weights come out of a file, whatever its format."""

from __future__ import annotations

from abc import ABC, abstractmethod
from types import TracebackType

import torch

from stagemesh.stage.weights.piece import Piece
from stagemesh.wire.errors import ModelError


class WeightReader(ABC):
    """Reads rectangles of tensors. Opened in the worker that keeps the result, closed when it has them.

    read_into may be called from several threads at once.
    """

    fills_device = False
    """Whether `out` may be on any device. Otherwise it must be on the CPU."""

    @abstractmethod
    def read_into(self, out: torch.Tensor, piece: Piece) -> None:
        """Fills `out` [rows, columns], or [rows] of a vector, in its dtype, with the piece.

        Reads no more of the file than the piece's rows. q and k come out in the half-rotation layout.

        Raises:
            ModelError: The tensor is missing, of another shape, or of a type that cannot be read.
        """

    @abstractmethod
    def close(self) -> None:
        """Lets go of the file and its mapped pages."""

    def __enter__(self) -> WeightReader:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def check_shape(where: object, name: str, shape: tuple[int, ...], piece: Piece) -> None:
    """Raises ModelError unless the tensor measures what the model's configuration says."""
    if shape != piece.full_shape:
        raise ModelError(
            f"{where}: tensor {name} has shape {list(shape)}, expected {list(piece.full_shape)} by the "
            "model's configuration; the files do not belong together"
        )
