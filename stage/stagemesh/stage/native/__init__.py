"""Compiled float32 kernels for x86-64 CPUs with AVX-512; a build without a C compiler lacks them, and nothing needs them.

A weight is kept in panels (see product.h). Callers see to it that tensors are contiguous, float32 and on the CPU.
"""

from __future__ import annotations

import torch  # before the kernels, whose OpenMP is then torch's: one pool of threads
import torch.nn.functional as F

from stagemesh.stage.native.huge_pages import HugePages

try:
    from stagemesh.stage.native import _kernels
except ImportError:
    _kernels = None  # type: ignore[assignment]

PANEL = 32
"""Outputs of a panel."""
LANES = 16
"""Of a vector; of a panel of gate and up each has so many."""

_memory = HugePages()


def is_available() -> bool:
    """Whether the kernels were built and this CPU can run them."""
    return _kernels is not None and _kernels.is_supported()


def in_panels(weight: torch.Tensor) -> torch.Tensor:
    """[out, in] as [panels, in, 32], the last panel filled up with zeros."""
    return _on_huge_pages(_blocks(weight, PANEL))


def gated_in_panels(gate: torch.Tensor, up: torch.Tensor) -> torch.Tensor:
    """[columns, in] each as [panels, in, 32]: of a panel's outputs 16 are the gate's, then come up's of the same columns."""
    return _on_huge_pages(torch.cat([_blocks(gate, LANES), _blocks(up, LANES)], dim=1))


def _blocks(weight: torch.Tensor, size: int) -> torch.Tensor:
    """[out, in] as [blocks, size, in]"""
    rest = -weight.shape[0] % size
    filled = F.pad(weight, (0, 0, 0, rest)) if rest else weight
    return filled.reshape(-1, size, weight.shape[1])


def _on_huge_pages(blocks: torch.Tensor) -> torch.Tensor:
    """[panels, 32, in] as [panels, in, 32]"""
    assert _kernels is not None
    blocks = blocks.contiguous()
    panels = _memory.empty((blocks.shape[0], blocks.shape[2], PANEL))
    _kernels.turn(
        blocks.data_ptr(), panels.data_ptr(), panels.shape[0], panels.shape[1], torch.get_num_threads()
    )
    return panels


def linear(
    x: torch.Tensor, panels: torch.Tensor, out_features: int, residual: torch.Tensor | None = None
) -> torch.Tensor:
    """[T, in] times a weight in panels, to [T, out_features], `residual` [T, out_features] added."""
    assert _kernels is not None
    x = x.contiguous()
    residual = residual if residual is None else residual.contiguous()
    out = x.new_empty(x.shape[0], out_features)
    _kernels.linear(
        x.data_ptr(),
        panels.data_ptr(),
        0 if residual is None else residual.data_ptr(),
        out.data_ptr(),
        x.shape[0],
        x.shape[1],
        out_features,
        torch.get_num_threads(),
    )
    return out


def halves(shape: bytes, layers: bytes, begin: int, end: int, *step: int) -> None:
    """Halves [begin, end) of decoder layers; see `_kernels.pyi` for what a step's numbers are."""
    assert _kernels is not None
    _kernels.halves(shape, layers, begin, end, *step)
