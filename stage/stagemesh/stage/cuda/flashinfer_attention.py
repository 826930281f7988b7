"""FlashInfer's paged attention: the FA2 template with tensor cores, for decode and for prefill.

Its kernels are called without the wrappers of the flashinfer package: those copy block lists to the device
and back, and have one pinned buffer where steps are planned ahead of the device. A plan is host arithmetic and
one copy of a few KiB from the step's own staging slot.

In a decode graph the plan has a fixed shape. Where contexts are split, rows that a step does not fill have no queries
there; where they are not, each row is one piece of work, that of a padding row without keys. Such a plan is the same for
every step of its graph (lengths are read from the columns): made when the graph is captured, in memory of its own.
"""

from __future__ import annotations

from importlib.metadata import PackageNotFoundError, version
from typing import Any

import numpy as np
import torch

from stagemesh.stage.cuda.attention import DeviceAttention, HeadShape, StepColumns
from stagemesh.stage.cuda.cache import DeviceCache
from stagemesh.stage.cuda.columns import RowPlan
from stagemesh.stage.cuda.staging import StagingSlot
from stagemesh.stage.cuda.workspace import most_splits

PLAN_BYTES = 1 << 20
"""Of a plan: a few numbers for each tile of queries."""
WHOLE_NUMBERS, WHOLE_SPARE_BYTES = 4, 256
"""Of a plan without splits: int32 numbers for each row, and what lies beside them; FlashInfer checks that it suffices."""
MERGE_TOKENS = 400
"""Tokens of a context that are read in the time that splitting and merging takes."""
SATURATING_HEADS = 64
"""Contexts times KV heads that, read side by side, take all the memory's bandwidth."""
NON_CAUSAL, CAUSAL = 0, 1
NHD = 0


class FlashInferAttention(DeviceAttention):
    """Decode rows by one call, the others by another.

    Args:
        cache: Of the rank.
        shape: Its heads.
        workspace: For partial results.
        max_rows: Of a decode step.
        max_tokens: Of any step.
        pdl: Launch kernels before the one ahead of them has ended.
    """

    needs_blocks = True

    def __init__(
        self,
        cache: DeviceCache,
        shape: HeadShape,
        workspace: torch.Tensor,
        *,
        max_rows: int,
        max_tokens: int,
        pdl: bool,
    ) -> None:
        super().__init__(cache, shape)
        from flashinfer.jit.attention import gen_batch_prefill_module

        dtype, device = cache.pages.dtype, cache.pages.device
        self._module: Any = gen_batch_prefill_module(
            "fa2", dtype, dtype, dtype, torch.int32, shape.head_dim, shape.head_dim, 0, False, False, False
        ).build_and_load()
        self.name = f"flashinfer {_version()} fa2"
        self._scale = shape.head_dim**-0.5
        self._pdl = pdl
        self._most_splits = most_splits(
            shape.most_kv_heads, torch.cuda.get_device_properties(device).multi_processor_count
        )
        self._float_workspace = workspace
        self._decode_workspace = torch.zeros(PLAN_BYTES, dtype=torch.uint8, device=device)
        self._prefill_workspace = torch.zeros(PLAN_BYTES, dtype=torch.uint8, device=device)
        # Rows and their begins are the same in every decode.
        self._ones_begins = torch.arange(max(max_rows, max_tokens) + 1, dtype=torch.int32, device=device)
        self._whole: dict[int, tuple[torch.Tensor, Any]] = {}
        """By bucket: the workspace and the plan of the graph that does not split contexts."""
        self._decode_in = self._decode_workspace
        """The workspace of the decode plan."""
        self._decode_plan: Any = None
        self._prefill_plan: Any = None
        self._num_decodes = 0
        self._num_rows = 0

    def try_out(self) -> None:
        """Plan and run decode and prefill once, a query of one cell: what cannot run on this device raises here.

        Pages must be readable as they are; nothing is written to them.
        """
        dtype, device = self.cache.pages.dtype, self.cache.pages.device
        query = torch.zeros(1, self.shape.num_heads, self.shape.head_dim, dtype=dtype, device=device)
        begins, out = self._ones_begins[:2], torch.empty_like(query)
        plan_memory = torch.zeros(PLAN_BYTES, dtype=torch.uint8)
        for mask in (NON_CAUSAL, CAUSAL):
            ends = np.array([0, 1], np.int32)
            plan = self._plan(self._decode_workspace, plan_memory, ends, ends, 1, False)
            self._run(
                0,
                self._decode_workspace,
                plan,
                query,
                out,
                begins,
                begins,
                last_page=begins[1:],
                blocks=begins[:1],
                mask=mask,
            )
        torch.cuda.synchronize(device)

    def variants(self, bucket: int) -> tuple[bool, ...]:
        return (False, True) if bucket <= self._most_splits else (False,)

    def variant(self, rows: RowPlan, bucket: int) -> bool:
        # Whole, a step takes as long as its longest context, or as memory takes for all of them; split, the latter and
        # a merge.
        if bucket > self._most_splits:
            return False
        block_size = self.cache.block_size
        longest = int(np.diff(rows.kv_begins).max()) * block_size
        together = int(rows.kv_begins[-1]) * block_size * self.shape.num_kv_heads / SATURATING_HEADS
        return longest > together + MERGE_TOKENS

    def plan(
        self, rows: RowPlan, slot: StagingSlot, *, bucket: int | None = None, split: bool = False
    ) -> None:
        self._num_decodes, self._num_rows = rows.num_decodes, rows.num_rows
        self._decode_plan = self._prefill_plan = None
        self._decode_in = self._decode_workspace
        if bucket is not None:
            if split:
                self._decode_plan = self._plan_split(rows, slot, bucket)
            else:
                self._decode_in, self._decode_plan = self._plan_whole(slot, bucket)
            self._num_decodes = self._num_rows = bucket
            return
        count = rows.num_decodes
        if count:
            begins = np.arange(count + 1, dtype=np.int32)
            self._decode_plan = self._plan(
                self._decode_workspace, slot.plans[0], begins, rows.kv_begins[: count + 1], count, False
            )
        if count < rows.num_rows:
            self._prefill_plan = self._plan(
                self._prefill_workspace,
                slot.plans[1],
                rows.prefill_begins,
                rows.kv_begins[count:],
                int(rows.prefill_begins[-1]),
                False,
            )

    def attend(self, layer: int, qkv: torch.Tensor, out: torch.Tensor, columns: StepColumns) -> None:
        shape, count = self.shape, self._num_decodes
        heads = qkv.view(qkv.shape[0], -1, shape.head_dim)[:, : shape.num_heads]
        into = out.view(out.shape[0], shape.num_heads, shape.head_dim)
        if self._decode_plan is not None:
            self._run(
                layer,
                self._decode_in,
                self._decode_plan,
                heads[:count],
                into[:count],
                self._ones_begins[: count + 1],
                columns.kv_begins[: count + 1],
                columns.last_page[:count],
                columns.blocks,
                NON_CAUSAL,
            )
        if self._prefill_plan is not None:
            last = self._num_rows - count
            self._run(
                layer,
                self._prefill_workspace,
                self._prefill_plan,
                heads[count:],
                into[count:],
                columns.prefill_begins[: last + 1],
                columns.kv_begins[count : self._num_rows + 1],
                columns.last_page[count : self._num_rows],
                columns.blocks,
                CAUSAL,
            )

    def _plan_split(self, rows: RowPlan, slot: StagingSlot, bucket: int) -> Any:
        begins = np.minimum(np.arange(bucket + 1, dtype=np.int32), rows.num_rows)
        kv_begins = np.full(bucket + 1, rows.kv_begins[-1], np.int32)
        kv_begins[: len(rows.kv_begins)] = rows.kv_begins
        return self._plan(self._decode_workspace, slot.plans[0], begins, kv_begins, bucket, True)

    def _plan_whole(self, slot: StagingSlot, bucket: int) -> tuple[torch.Tensor, Any]:
        """FlashInfer's own graph mode always splits, and merges what may be one piece."""
        if bucket not in self._whole:
            size = WHOLE_NUMBERS * bucket * 4 + WHOLE_SPARE_BYTES
            workspace = torch.zeros(size, dtype=torch.uint8, device=self._decode_workspace.device)
            begins = np.arange(bucket + 1, dtype=np.int32)
            plan = self._plan(workspace, slot.plans[0], begins, begins, bucket, False, whole=True)
            self._whole[bucket] = workspace, plan
        return self._whole[bucket]

    def _plan(
        self,
        workspace: torch.Tensor,
        pinned: torch.Tensor,
        begins: np.ndarray,
        kv_begins: np.ndarray,
        num_tokens: int,
        graph: bool,
        *,
        whole: bool = False,
    ) -> Any:
        shape = self.shape
        begins_host, kv_host = torch.from_numpy(begins), torch.from_numpy(np.ascontiguousarray(kv_begins))
        return self._module.plan(
            self._float_workspace,
            workspace,
            pinned,
            begins_host,
            kv_host,
            kv_host,  # lengths, which this template does not read
            num_tokens,
            len(begins) - 1,
            shape.num_heads,
            shape.num_kv_heads,
            self.cache.block_size,
            graph,
            shape.head_dim,
            shape.head_dim,
            False,
            -1,  # no window
            -1,  # splits of its own choice
            whole,
            0,
        )

    def _run(
        self,
        layer: int,
        workspace: torch.Tensor,
        plan: Any,
        query: torch.Tensor,
        out: torch.Tensor,
        begins: torch.Tensor,
        kv_begins: torch.Tensor,
        last_page: torch.Tensor,
        blocks: torch.Tensor,
        mask: int,
    ) -> None:
        self._module.paged_run(
            self._float_workspace,
            workspace,
            plan,
            query,
            self.cache.pages[layer, 0],
            self.cache.pages[layer, 1],
            begins,
            kv_begins,
            blocks,
            last_page,
            out,
            None,  # no log-sum-exp
            mask,
            NHD,
            -1,
            self._pdl,
            None,
            None,
            None,
            None,
            None,
            None,
            None,
            None,
            0.0,
            self._scale,
            1.0,
            1.0,
            0,
        )


def _version() -> str:
    try:
        return version("flashinfer-python")
    except PackageNotFoundError:
        return "of unknown version"
