"""How a CPU multiplies activations by a weight: the layout it is kept in, and the operator for it.

Three layouts, of which a process picks one for all its weights, so that none is held twice:

- native: panels for the kernels of stagemesh.stage.native, float32 only. They multiply while they read, where the
  other two read and then multiply.
- onednn: oneDNN's own blocked format. Elementwise work next to a product is done inside it.
- transposed: [in, out], for MKL's matmul. MKL reads the weight at full bandwidth for one row this way and
  reaches blocked speed from a few rows on, where [out, in] falls back to something three times slower.

Without the kernels, which one is faster depends on who made the CPU: MKL keeps its AVX-512 kernels from any but
Intel's (docs/performance.md, "CPU linears").
"""

from __future__ import annotations

import platform
from functools import cache
from pathlib import Path
from typing import Literal, Protocol, TypeAlias

import torch
import torch.nn.functional as F

from stagemesh.stage import native

Layout: TypeAlias = Literal["native", "transposed", "onednn"]

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


class Native:
    """A weight in panels."""

    def __init__(self, weight: torch.Tensor) -> None:
        self.panels = native.in_panels(weight)
        self._out_features = weight.shape[0]

    def __call__(self, x: torch.Tensor, residual: torch.Tensor | None = None) -> torch.Tensor:
        return native.linear(x, self.panels, self._out_features, residual)


class NativeGated:
    """Both halves in one product, their elementwise work after it; a decode step does that within (native_layers)."""

    def __init__(self, weight: torch.Tensor) -> None:
        gate, up = weight.chunk(2)
        self.panels = native.gated_in_panels(gate, up)
        self._columns = gate.shape[0]

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        both = native.linear(x, self.panels, len(self.panels) * native.PANEL).unflatten(
            1, (-1, 2, native.LANES)
        )
        return F.silu(both[:, :, 0]).mul_(both[:, :, 1]).flatten(1)[:, : self._columns]


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
    if layout == "native" and _is_native(weight):
        return Native(weight)
    return OneDNN(weight) if _packs(weight, layout) else Transposed(weight)


def pack_gated(weight: torch.Tensor, layout: Layout) -> GatedProduct:
    """Ready the weights of gate and up, one over the other."""
    if layout == "native" and _is_native(weight):
        return NativeGated(weight)
    return OneDNNGated(weight) if _packs(weight, layout) else TransposedGated(weight)


@cache
def fastest_layout(dtype: torch.dtype) -> Layout:
    """The layout for weights of that type on this machine's CPU.

    By its instructions and its maker and not by a trial at each start, which on a busy machine could come out either way: two
    starts of a stage then give the same sums to the last bit.
    """
    if dtype == torch.float32 and native.is_available():
        return "native"
    measured_on = torch.backends.mkldnn.is_available() and platform.machine() == "x86_64"
    return "onednn" if measured_on and not _is_intel() else "transposed"


def _is_intel() -> bool:
    cpuinfo = Path("/proc/cpuinfo")
    return cpuinfo.exists() and "GenuineIntel" in cpuinfo.read_text()


def _is_native(weight: torch.Tensor) -> bool:
    return weight.device.type == "cpu" and weight.dtype == torch.float32


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
