"""How a CPU multiplies activations by a weight: the layout it is kept in, and the operator for it.

Two layouts, of which a process picks one for all its weights, so that none is held twice:

- onednn: oneDNN's own blocked format. Elementwise work next to a product is done inside it.
- transposed: [in, out], for MKL's matmul. MKL reads the weight at full bandwidth for one row this way and
  reaches blocked speed from a few rows on, where [out, in] falls back to something three times slower.

Which one is faster depends on who made the CPU: MKL keeps its AVX-512 kernels from any but Intel's
(docs/performance.md, "CPU linears").
"""

from __future__ import annotations

import platform
from functools import cache
from pathlib import Path
from typing import Literal, Protocol, TypeAlias

import torch
import torch.nn.functional as F

Layout: TypeAlias = Literal["transposed", "onednn"]

_TUNED_ROWS = 16
"""Rows that oneDNN picks its blocking for; the choice for 1 row makes 16 rows half as fast, not the reverse."""


class Product(Protocol):
    """One weight [out, in], ready to multiply."""

    def __call__(self, x: torch.Tensor, residual: torch.Tensor | None = None) -> torch.Tensor:
        """[T, in] to [T, out], `residual` [T, out] added."""


class GatedProduct(Protocol):
    """The weights of a gated layer, gate over up, [2 * columns, in], ready to multiply."""

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        """silu(gate(x)) * up(x), [T, in] to [T, columns]."""


class Transposed:
    """A weight kept as [in, out]."""

    def __init__(self, weight: torch.Tensor) -> None:
        self._weight = weight.t().contiguous()

    def __call__(self, x: torch.Tensor, residual: torch.Tensor | None = None) -> torch.Tensor:
        return x @ self._weight if residual is None else torch.addmm(residual, x, self._weight)


class TransposedGated:
    """Both halves in one product, their elementwise work after it."""

    def __init__(self, weight: torch.Tensor) -> None:
        self._both = Transposed(weight)

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        gate, up = self._both(x).chunk(2, dim=-1)
        return F.silu(gate).mul_(up)


class OneDNN:
    """A weight in oneDNN's format. The operators are private to torch, so tests hold them to plain formulas."""

    def __init__(self, weight: torch.Tensor) -> None:
        self._weight = _reorder(weight)

    def __call__(self, x: torch.Tensor, residual: torch.Tensor | None = None) -> torch.Tensor:
        if residual is None:
            return _linear(x, self._weight)
        return _linear_with(x, residual, self._weight, "add")


class OneDNNGated:
    """Gate and up apart, so that silu and the multiplication happen inside their products."""

    def __init__(self, weight: torch.Tensor) -> None:
        gate, up = weight.chunk(2)
        self._gate, self._up = _reorder(gate), _reorder(up)

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        return _linear_with(x, _linear(x, self._gate, "swish"), self._up, "mul")


def pack(weight: torch.Tensor, layout: Layout) -> Product:
    """Ready a weight [out, in]. On another device than the CPU the layout is [in, out]."""
    return OneDNN(weight) if _packs(weight, layout) else Transposed(weight)


def pack_gated(weight: torch.Tensor, layout: Layout) -> GatedProduct:
    """Ready the weights of gate and up, one over the other."""
    return OneDNNGated(weight) if _packs(weight, layout) else TransposedGated(weight)


@cache
def fastest_layout() -> Layout:
    """The layout for this machine's CPU.

    By its maker and not by a trial at each start, which on a busy machine could come out either way: two
    starts of a stage then give the same sums to the last bit.
    """
    measured_on = torch.backends.mkldnn.is_available() and platform.machine() == "x86_64"
    return "onednn" if measured_on and not _is_intel() else "transposed"


def _is_intel() -> bool:
    cpuinfo = Path("/proc/cpuinfo")
    return cpuinfo.exists() and "GenuineIntel" in cpuinfo.read_text()


def _packs(weight: torch.Tensor, layout: Layout) -> bool:
    if layout != "onednn" or weight.device.type != "cpu":
        return False
    if weight.dtype == torch.bfloat16:
        return bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())
    return weight.dtype == torch.float32


def _reorder(weight: torch.Tensor) -> torch.Tensor:
    packed: torch.Tensor = torch.ops.mkldnn._reorder_linear_weight(weight.contiguous(), _TUNED_ROWS)
    return packed


def _linear(x: torch.Tensor, packed: torch.Tensor, then: str = "none") -> torch.Tensor:
    out: torch.Tensor = torch.ops.mkldnn._linear_pointwise(x, packed, None, then, [], "")
    return out


def _linear_with(x: torch.Tensor, other: torch.Tensor, packed: torch.Tensor, how: str) -> torch.Tensor:
    out: torch.Tensor = torch.ops.mkldnn._linear_pointwise.binary(x, other, packed, None, how)
    return out
