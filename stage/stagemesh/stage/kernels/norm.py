"""Root mean square norm, fused with the residual it follows."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from stagemesh.stage.kernels.pdl import pdl_options


@triton.jit
def _norm(
    partial,
    residual,
    weight,
    out,
    rows,
    width,
    eps,
    ADD: tl.constexpr,
    GATHER: tl.constexpr,
    BLOCK: tl.constexpr,
    PDL: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    source = row
    if GATHER:
        source = tl.load(rows + row).to(tl.int64)
    columns = tl.arange(0, BLOCK)
    inside = columns < width
    at = source * width + columns
    gain = tl.load(weight + columns, mask=inside, other=0.0).to(tl.float32)
    if PDL:
        tl.extra.cuda.gdc_wait()
        tl.extra.cuda.gdc_launch_dependents()
    x = tl.load(residual + at, mask=inside, other=0.0)
    if ADD:
        x = (x.to(tl.float32) + tl.load(partial + at, mask=inside, other=0.0).to(tl.float32)).to(x.dtype)
        if not GATHER:
            tl.store(residual + at, x, mask=inside)
    wide = x.to(tl.float32)
    scale = tl.rsqrt(tl.sum(wide * wide, axis=0) / width + eps)
    scaled = wide * scale * gain
    tl.store(out + row * width + columns, scaled.to(out.dtype.element_ty), mask=inside)


def rms_norm(
    residual: torch.Tensor, weight: torch.Tensor, eps: float, out: torch.Tensor, *, pdl: bool = False
) -> None:
    """out = norm(residual), all [T, width]."""
    _launch(None, residual, weight, eps, out, None, pdl)


def add_rms_norm(
    partial: torch.Tensor,
    residual: torch.Tensor,
    weight: torch.Tensor,
    eps: float,
    out: torch.Tensor,
    *,
    pdl: bool = False,
) -> None:
    """residual += partial; out = norm(residual), all [T, width]; out may be partial.

    The sum is rounded to the residual's type.
    """
    _launch(partial, residual, weight, eps, out, None, pdl)


def gather_add_rms_norm(
    partial: torch.Tensor,
    residual: torch.Tensor,
    rows: torch.Tensor,
    weight: torch.Tensor,
    eps: float,
    out: torch.Tensor,
    *,
    pdl: bool = False,
) -> None:
    """out[i] = norm(residual[rows[i]] + partial[rows[i]]) for int32 rows [S]; out [S, width]."""
    _launch(partial, residual, weight, eps, out, rows, pdl)


def _launch(
    partial: torch.Tensor | None,
    residual: torch.Tensor,
    weight: torch.Tensor,
    eps: float,
    out: torch.Tensor,
    rows: torch.Tensor | None,
    pdl: bool,
) -> None:
    width = residual.shape[1]
    block = triton.next_power_of_2(width)
    _norm[(out.shape[0],)](
        residual if partial is None else partial,
        residual,
        weight,
        out,
        residual if rows is None else rows,
        width,
        eps,
        ADD=partial is not None,
        GATHER=rows is not None,
        BLOCK=block,
        num_warps=min(16, max(1, block // 512)),
        **pdl_options(pdl),
    )
