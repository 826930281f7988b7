"""Sums over the ranks in one kernel with the residual and the norm that read them: FlashInfer's one-shot all-reduce.

Each rank writes its part into every rank's buffer (stores over NVLink to memory that torch maps, no multicast) and waits
there for the others' parts: three buffers in turn, whose elements are negative zeros until they are written.
"""

from __future__ import annotations

import logging
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from stagemesh.stage.cuda.optional import on_every_rank
from stagemesh.stage.cuda.reduce import SharedReducer, TimeOf
from stagemesh.stage.group import RankGroup

log = logging.getLogger(__name__)

SOURCE = Path(__file__).with_suffix(".cu")
FUSED_ROWS = (1, 8, 32, 64, 128)
"""Rows that it is measured at; of more the kernel's authors take another."""
SIZES = (2, 4, 8)
"""Ranks that it is compiled for."""
BUFFERS = 3


class FusedReducer(SharedReducer):
    """A SharedReducer that sums few rows together with what follows.

    Args:
        group: Of NCCL.
        max_tokens: Rows of the buffer.
        hidden: Width of it.
        dtype: Of it, of two bytes.
        device: Where.
        module: Of `load_module`.
    """

    def __init__(
        self,
        group: RankGroup,
        max_tokens: int,
        hidden: int,
        dtype: torch.dtype,
        device: torch.device,
        module: Any,
    ) -> None:
        super().__init__(group, max_tokens, hidden, dtype, device)
        import torch.distributed._symmetric_memory as symmetric

        self._module = module
        self._fused_rows = 0
        width = group.size * FUSED_ROWS[-1] * hidden
        self._parts = symmetric.empty(BUFFERS * width, dtype=dtype, device=device).fill_(-0.0)
        pointers = symmetric.rendezvous(self._parts, self._name).buffer_ptrs
        # Counter, the flags of two ways to sum, bytes of a buffer, elements to clear.
        self._state = torch.tensor([0, 0, 0, width * dtype.itemsize, 0], dtype=torch.int32, device=device)
        # Buffers and flags of its two-shot way, which is not used; the three buffers of every rank; the state.
        self._workspace = torch.tensor(
            [0] * (2 * group.size) + [*pointers, self._state.data_ptr()], dtype=torch.int64, device=device
        )
        torch.cuda.synchronize(device)
        dist.barrier()

    def sum_add_norm(
        self,
        part: torch.Tensor,
        residual: torch.Tensor,
        weight: torch.Tensor,
        eps: float,
        out: torch.Tensor,
        *,
        pdl: bool = False,
    ) -> None:
        if part.shape[0] <= self._fused_rows:
            self._fused(part, residual, weight, eps, out, pdl=pdl)
        else:
            super().sum_add_norm(part, residual, weight, eps, out, pdl=pdl)

    def measure(self, cache: Path, time_of: TimeOf, *, pdl: bool = False) -> None:
        """Also find up to how many rows one kernel is faster than two."""
        super().measure(cache, time_of, pdl=pdl)
        what = f", with norm{' and PDL' if pdl else ''}"
        (self._fused_rows,) = self._recall(cache, what, 1, lambda: [self._measure_fused(time_of, pdl)])
        self.name = f"with norm to {self._fused_rows} rows, else {self.name}"
        log.info("all-reduce: %s", self.name)

    def _measure_fused(self, time_of: TimeOf, pdl: bool) -> int:
        """The most of FUSED_ROWS up to which it is the faster one."""
        residual = torch.zeros_like(self.partial[: FUSED_ROWS[-1]])
        weight = torch.ones_like(residual[0])
        fused_rows, faster = 0, True
        # Each rank makes every call, whatever its own clock says: a call waits for the other ranks'.
        for rows in FUSED_ROWS:
            if rows > self.partial.shape[0]:
                break
            tensors = (self.partial[:rows], residual[:rows], weight, 1e-5, self.partial[:rows])
            apart = time_of(partial(super().sum_add_norm, *tensors, pdl=pdl))
            together = time_of(partial(self._fused, *tensors, pdl=pdl))
            log.info("all-reduce with norm of %d rows: %.1f us together, %.1f apart", rows, together, apart)
            faster = faster and together < apart
            if faster:
                fused_rows = rows
        self.partial.zero_()
        return fused_rows

    def _fused(
        self,
        part: torch.Tensor,
        residual: torch.Tensor,
        weight: torch.Tensor,
        eps: float,
        out: torch.Tensor,
        *,
        pdl: bool = False,
    ) -> None:
        self._module.sum_add_norm(
            part, residual, weight, out, self._workspace, self._group.rank, self._group.size, eps, pdl
        )


def load_module(group: RankGroup, hidden: int, dtype: torch.dtype) -> tuple[Any, str]:
    """The compiled kernel, on every rank or on none, and why there is none (empty: there is).

    It takes 16 s to compile; FlashInfer keeps it on disk.
    """
    if group.size not in SIZES:
        return None, f"there is no kernel for {group.size} ranks"
    if dtype.itemsize != 2 or hidden % (8 * 128):
        return None, f"there is no kernel for {hidden} values of {str(dtype).removeprefix('torch.')}"
    return on_every_rank(_build, "its kernel", group, torch.device("cuda"))


def _build() -> Any:
    from flashinfer.compilation_context import CompilationContext
    from flashinfer.jit.core import gen_jit_spec

    flags = CompilationContext().get_nvcc_flags_list(supported_major_versions=[9, 10])
    return gen_jit_spec("stagemesh_fused_reduce", [SOURCE], extra_cuda_cflags=flags).build_and_load()
