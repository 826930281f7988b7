"""Quantized GGUF rows to numbers."""

from __future__ import annotations

from typing import Any

import gguf.quants
import numpy as np
import torch
from gguf.constants import GGML_QUANT_SIZES, GGMLQuantizationType
from numpy.typing import NDArray

SUPPORTED_TYPES = (
    *("F32", "F16", "BF16"),
    *("Q8_0", "Q4_0", "Q4_1", "Q5_0", "Q5_1"),
    *("Q2_K", "Q3_K", "Q4_K", "Q5_K", "Q6_K"),
)


def block_of(ggml_type: GGMLQuantizationType) -> tuple[int, int]:
    """Elements and bytes of a block: rows can be cut at multiples of it."""
    elements, num_bytes = GGML_QUANT_SIZES[ggml_type]
    return int(elements), int(num_bytes)


def dequantize_into(out: torch.Tensor, rows: NDArray[Any], ggml_type: GGMLQuantizationType) -> None:
    """Fills `out` [rows, columns] (float32) from raw rows, equal to gguf.quants.dequantize bit for bit.

    Args:
        out: float32, rows contiguous.
        rows: float32 or float16 [rows, columns]; else uint8 [rows, bytes of a row], contiguous.
        ggml_type: One of SUPPORTED_TYPES.
    """
    name = ggml_type.name
    if name in ("F32", "F16"):
        out.copy_(torch.from_numpy(rows))
        return
    if name == "BF16":
        out.copy_(torch.from_numpy(rows).view(torch.bfloat16))
        return
    kernel = _KERNELS.get(name)
    if kernel is None:
        values: NDArray[np.float32] = gguf.quants.dequantize(rows, ggml_type)
        out.copy_(torch.from_numpy(values))
        return
    block, block_bytes = block_of(ggml_type)
    kernel(out.view(-1, block), torch.from_numpy(rows).view(-1, block_bytes))


# Per weight, on one core, in chunks that fit its cache: Q8_0 takes 0.5 ns against gguf's 4.4, Q4_0 and Q4_1 2
# against 4. (The K-quants take gguf 5 to 9, whole tensors at once 21.) Each kernel works on all blocks of a
# chunk: `out` [blocks, elements of a block], `raw` uint8 [blocks, bytes of a block]. Products and sums are
# separate operations, so that no fused multiply-add rounds differently from gguf.


def _half(raw: torch.Tensor, begin: int) -> torch.Tensor:
    """The float16 at a byte of every block, as float32 [blocks, 1]."""
    return raw[:, begin : begin + 2].contiguous().view(torch.float16).float()


def _nibbles(out: torch.Tensor, packed: torch.Tensor) -> None:
    """Low nibbles are the first half of a block, high nibbles the second."""
    half = packed.shape[1]
    out[:, :half].copy_(packed & 15)
    out[:, half:].copy_(packed >> 4)


def _q8_0(out: torch.Tensor, raw: torch.Tensor) -> None:
    out.copy_(raw[:, 2:].view(torch.int8))
    out.mul_(_half(raw, 0))


def _q4_0(out: torch.Tensor, raw: torch.Tensor) -> None:
    _nibbles(out, raw[:, 2:])
    out.sub_(8).mul_(_half(raw, 0))


def _q4_1(out: torch.Tensor, raw: torch.Tensor) -> None:
    _nibbles(out, raw[:, 4:])
    out.mul_(_half(raw, 0)).add_(_half(raw, 2))


_KERNELS = {"Q8_0": _q8_0, "Q4_0": _q4_0, "Q4_1": _q4_1}
