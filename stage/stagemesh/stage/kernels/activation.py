"""SiLU of the gate times up."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from stagemesh.stage.kernels.pdl import pdl_options

BLOCK = 1024


@triton.jit
def _silu_mul(gate_up, out, width, out_width, BLOCK: tl.constexpr, PDL: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    columns = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = columns < width
    at = gate_up + row * 2 * width + columns
    if PDL:
        tl.extra.cuda.gdc_wait()
        tl.extra.cuda.gdc_launch_dependents()
    gate = tl.load(at, mask=inside, other=0.0).to(tl.float32)
    up = tl.load(at + width, mask=inside, other=0.0)
    # Rounded where a model computed operation by operation rounds.
    silu = (gate / (1.0 + tl.exp(-gate))).to(up.dtype)
    product = silu.to(tl.float32) * up.to(tl.float32)
    tl.store(out + row * out_width + columns, product.to(out.dtype.element_ty), mask=inside)


def silu_mul(gate_up: torch.Tensor, out: torch.Tensor, *, pdl: bool = False) -> None:
    """out [T, width] from gate_up [T, 2 * width], contiguous, the gate first; out may be the place of the gates."""
    tokens, width = out.shape
    _silu_mul[(tokens, triton.cdiv(width, BLOCK))](
        gate_up, out, width, out.stride(0), BLOCK=BLOCK, num_warps=4, **pdl_options(pdl)
    )
