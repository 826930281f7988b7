"""The engine that computes a rank's steps on a GPU.

The launch path waits for nothing: a step's columns are written to pinned memory that no earlier step still
uses, and everything is queued on one compute stream: a kernel that fetches the columns, the step, a kernel that leaves
its tokens in pinned memory. Sampled tokens stay on the
device, by slot, where the next step's embedding finds them. Decode steps replay a graph of their size. Of steps with
some prefill what lies between two attentions is a graph (the piecewise graphs of vLLM and SGLang): attention is
planned anew for any mix of rows. Steps with much of it launch kernel by kernel.
"""

from __future__ import annotations

import logging
import os
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial

import numpy as np
import torch

from stagemesh.model.config import ModelConfig
from stagemesh.model.deal import RankDeal
from stagemesh.stage.cuda.attention import DeviceAttention, StepColumns
from stagemesh.stage.cuda.buckets import bucket_for, graph_buckets, section_buckets
from stagemesh.stage.cuda.buffers import StepBuffers
from stagemesh.stage.cuda.cache import DeviceCache
from stagemesh.stage.cuda.columns import Layout, RowPlan, fill, filtered_rows, plan_rows
from stagemesh.stage.cuda.device import Device, Graph, Stream
from stagemesh.stage.cuda.filtered import FilteredChoice
from stagemesh.stage.cuda.links import DeviceLinks
from stagemesh.stage.cuda.model import DeviceLlama
from stagemesh.stage.cuda.reduce import Reducer
from stagemesh.stage.cuda.staging import Staging, StagingSlot
from stagemesh.stage.cuda.waits import split_wait
from stagemesh.stage.engine.batch import Batch, BlockChanges, SamplingColumns
from stagemesh.stage.engine.interface import RankFacts, StepHandle, StepInputs, StepOutput
from stagemesh.stage.kernels.choose import best_keys, take_tokens
from stagemesh.stage.kernels.tables import change_tables, flatten_tables
from stagemesh.stage.kernels.transfer import transfer
from stagemesh.stage.memory import FILTERED_ROWS
from stagemesh.v1 import stage_pb2
from stagemesh.wire.errors import InvalidArgumentError

log = logging.getLogger(__name__)

SPARE_SLOTS = 2
"""Staging beyond the lane's depth: results are read a moment after they are there."""
MIN_CHANGES = 64
"""Block table changes that every graph takes."""
STEP_TIMEOUT_S = 60.0
SWEEP, LOGITS_SWEEP = 128, 8
"""Products are warmed up for every so many positions: which kernel multiplies depends on their number."""


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineParts:
    """What a rank's engine is made of; parts.py makes it for a GPU, tests for a CPU."""

    config: ModelConfig
    layers: range
    deal: RankDeal
    shards: list[range]
    """Every rank's vocabulary."""
    device: Device
    stream: Stream
    cache: DeviceCache
    attention: DeviceAttention
    reducer: Reducer
    buffers: StepBuffers
    model: DeviceLlama
    filtered: FilteredChoice
    links: DeviceLinks
    max_slots: int
    max_rows: int
    """Of a decode graph."""
    max_tokens: int
    """Of a step."""
    plan_bytes: int
    """Pinned memory of an attention plan."""
    graphs: bool
    weight_bytes: int
    backends: dict[str, str] = field(default_factory=dict)


class DeviceStep:
    """A launched step."""

    done = False

    def __init__(self, slot: StagingSlot, num_samples: int | None, hidden: torch.Tensor | None) -> None:
        self._slot = slot
        self._num_samples = num_samples
        self._hidden = hidden
        self.logits: torch.Tensor | None = None
        self.linked = False
        self.sent_bytes = 0
        self.received_bytes = 0

    def microseconds_after(self, earlier: DeviceStep) -> float:
        """From the end of an earlier step to the moment this one had its inputs, by the device's clock."""
        self._slot.begun.synchronize()
        return earlier._slot.ended.elapsed_time(self._slot.begun) * 1e3

    def wait(self) -> StepOutput:
        slot = self._slot
        slot.ended.synchronize()
        tokens = None
        if self._num_samples is not None:
            tokens = slot.tokens[: self._num_samples].numpy().astype(np.int64)
        hidden = None
        if self._hidden is not None:
            hidden = memoryview(self._hidden.numpy().tobytes())
        waited_ns = int(slot.awaited.elapsed_time(slot.begun) * 1e6) if self.linked else 0
        wait_ns, receive_ns = split_wait(waited_ns, self.received_bytes)
        output = StepOutput(
            hidden=hidden,
            tokens=tokens,
            logits=self.logits.float().cpu().numpy() if self.logits is not None else None,
            compute_ns=int(slot.begun.elapsed_time(slot.ended) * 1e6),
            wait_ns=wait_ns,
            receive_ns=receive_ns,
            sent_bytes=self.sent_bytes,
        )
        slot.in_use = False
        return output


class CudaEngine:
    """One rank on one device.

    Args:
        parts: What it is made of.
        progress: Called with (graphs captured, graphs in all).
        start_seconds: What was spent before, by phase.
    """

    holds_tokens = True

    def __init__(
        self,
        parts: EngineParts,
        *,
        progress: Callable[[int, int], None] | None = None,
        start_seconds: dict[str, float] | None = None,
    ) -> None:
        self._parts = parts
        self._first = parts.layers.start == 0
        self._last = parts.layers.stop == parts.config.num_layers
        self._block_size = parts.cache.block_size
        self._num_steps = {"by a graph": 0, "by graphs between attentions": 0, "without graphs": 0}
        self.links = parts.links
        max_blocks = parts.cache.tables.shape[1]
        # Blocks of cached prefixes up to a step's positions, those of the one that passes it, and what the positions need.
        self._max_changes = 2 * parts.max_tokens + max_blocks
        largest = Layout(
            parts.max_tokens, parts.max_tokens, self._samples_of(parts.max_tokens), self._max_changes
        )
        device = parts.device.torch_device
        self._columns = torch.zeros(largest.size, dtype=torch.int32, device=device)
        self._column_size = largest.size
        # Shared blocks count once for each row: every row's table may be full.
        warm_up_blocks = len(self._longest_step()) * max_blocks
        self._blocks = torch.zeros(
            max(parts.cache.tables.numel(), warm_up_blocks), dtype=torch.int32, device=device
        )
        self._graphs: dict[tuple[int, bool], Graph] = {}
        """By bucket, and whether attention splits contexts."""
        self._summed: dict[int, torch.Tensor] = {}
        self._section_sums: dict[int, torch.Tensor] = {}
        self._sections: dict[int, list[Graph]] = {}
        self._buckets = graph_buckets(parts.max_rows)
        self._section_sizes = section_buckets(parts.max_tokens)
        self._layouts = {
            size: Layout(size, size, self._samples_of(size), max(size, MIN_CHANGES)) for size in self._buckets
        }
        self._staging = self._make_staging(4)
        parts.device.bind(parts.stream)
        began = time.perf_counter()
        self._warm_up()
        warm = time.perf_counter()
        if parts.graphs:
            self._capture(progress)
        captured = time.perf_counter()
        self._load_seconds = {
            **(start_seconds or {}),
            "warm-up": warm - began,
            "graphs": captured - warm,
        }

    def facts(self) -> RankFacts:
        parts = self._parts
        return RankFacts(
            rank=parts.deal.rank,
            device=str(parts.device.torch_device),
            num_heads=len(parts.deal.heads),
            num_kv_heads=len(parts.deal.kv_heads),
            mlp_columns=len(parts.deal.columns),
            weight_bytes=parts.weight_bytes,
            kv_bytes=parts.cache.num_bytes,
            num_blocks=parts.cache.num_blocks,
            process_id=os.getpid(),
            load_seconds=self._load_seconds,
            backends={
                "attention": parts.attention.name,
                "all-reduce": parts.reducer.name,
                "graphs": f"{len(self._graphs)} up to {parts.max_rows} rows, between attentions up to "
                f"{self._section_sizes[-1]} positions"
                if self._graphs
                else "off",
                **parts.backends,
            },
        )

    def open(self, lane: stage_pb2.OpenLaneRequest) -> None:
        """Links of the old epoch are broken off before anything is allocated for the new one."""
        if any(self._num_steps.values()):
            log.info("steps so far: %s", ", ".join(f"{n} {how}" for how, n in self._num_steps.items()))
        self.links.abort()
        self._parts.device.synchronize()
        if lane.max_slots > self._parts.max_slots:
            raise InvalidArgumentError(
                f"max_slots is {lane.max_slots}; this stage's device has tables for {self._parts.max_slots}",
                field="max_slots",
            )
        self._staging = self._make_staging(lane.depth + SPARE_SLOTS)
        self.links.open(lane, self._staging.depth)

    @torch.inference_mode()
    def launch(self, batch: Batch, inputs: StepInputs) -> StepHandle:
        parts = self._parts
        if batch.num_tokens > parts.max_tokens:
            raise InvalidArgumentError(
                f"step {batch.number} has {batch.num_tokens} positions; this stage takes {parts.max_tokens}",
                field="rows.counts",
            )
        if len(batch.changes) > self._max_changes:
            raise InvalidArgumentError(
                f"step {batch.number} changes {len(batch.changes)} blocks; this stage takes {self._max_changes}",
                field="append_blocks",
            )
        index, slot = self._staging.take()
        rows = plan_rows(batch, self._block_size)
        bucket = self._bucket(batch, rows)
        section = bucket_for(self._section_sizes, batch.num_tokens) if self._sections else None
        layout = self._layouts[bucket] if bucket else self._layout_of(batch, section)
        split = parts.attention.variant(rows, bucket) if bucket else False
        self._write(slot, layout, batch, rows, inputs, bucket, split)
        linked = self.links.receives_hidden or self.links.receives_ring
        if not linked:
            slot.begun.record()  # next to the end of the step before: an event between two kernels delays the second
        transfer(slot.columns, self._columns, layout.size)
        if linked:
            slot.awaited.record()
        self.links.await_ring(batch)
        self._receive(batch, inputs, slot)
        if linked:
            slot.begun.record()
        if bucket:
            self._num_steps["by a graph"] += 1
            self._graphs[bucket, split].replay()
            summed = self._summed[bucket]
        else:
            self._num_steps["by graphs between attentions" if section else "without graphs"] += 1
            summed = self._compute(layout, batch, section)
        step = self._hand_on(batch, inputs, index, slot, layout if bucket else None, summed)
        step.linked = linked
        return step

    def _bucket(self, batch: Batch, rows: RowPlan) -> int | None:
        if not self._graphs or rows.num_decodes < rows.num_rows:
            return None
        bucket = bucket_for(self._buckets, rows.num_rows)
        return bucket if bucket and len(batch.changes) <= self._layouts[bucket].changes else None

    def _layout_of(self, batch: Batch, section: int | None = None) -> Layout:
        return Layout(
            section or batch.num_tokens,
            len(batch.slots),
            len(batch.sampled_rows) if self._last else 0,
            len(batch.changes),
        )

    def _samples_of(self, rows: int) -> int:
        return rows if self._last else 0

    def _stage(
        self, slot: StagingSlot, layout: Layout, batch: Batch, bucket: int | None = None, split: bool = False
    ) -> None:
        """Everything a step of padding needs."""
        rows = plan_rows(batch, self._block_size)
        self._write(slot, layout, batch, rows, self._no_inputs(batch), bucket, split)
        transfer(slot.columns, self._columns, layout.size)

    def _write(
        self,
        slot: StagingSlot,
        layout: Layout,
        batch: Batch,
        rows: RowPlan,
        inputs: StepInputs,
        bucket: int | None = None,
        split: bool = False,
    ) -> None:
        """Everything the step needs from the host, where its kernels will find it."""
        parts = self._parts
        fill(
            slot.numbers,
            layout,
            batch,
            rows,
            inputs.tokens,
            block_size=self._block_size,
            scratch_cell=parts.cache.scratch_cell,
            scratch_slot=parts.cache.scratch_slot,
        )
        parts.attention.plan(rows, slot, bucket=bucket, split=split)

    def _receive(self, batch: Batch, inputs: StepInputs, slot: StagingSlot) -> None:
        """Activations from the stage before, over a link or from the host."""
        if self._first:
            return
        residual = self._parts.buffers.residual[: batch.num_tokens]
        if inputs.hidden is None:
            self.links.receive_hidden(residual)
            return
        pinned = self._staging.hidden_bytes(slot, residual.nbytes)
        pinned.numpy()[:] = np.frombuffer(inputs.hidden, np.uint8)
        residual.view(torch.uint8).flatten().copy_(pinned, non_blocking=True)

    def _columns_of(self, layout: Layout) -> dict[str, torch.Tensor]:
        return {name: self._columns[part] for name, part in layout.columns.items()}

    def _compute(self, layout: Layout, batch: Batch | None, section: int | None = None) -> torch.Tensor:
        """Launch a step's kernels, with the graphs of a section size or one by one; without a batch, what the graph
        of a bucket's layout is captured from."""
        parts = self._parts
        column = self._columns_of(layout)
        if layout.changes:
            change_tables(
                parts.cache.tables,
                column["change_slots"],
                column["change_indexes"],
                column["change_blocks"],
            )
        if parts.attention.needs_blocks:
            flatten_tables(parts.cache.tables, column["row_slots"], column["kv_begins"], self._blocks)
        if self._first:
            parts.model.embed(column["tokens"], parts.cache.slot_tokens)
        columns = StepColumns(
            positions=column["positions"],
            token_slots=column["token_slots"],
            kv_begins=column["kv_begins"],
            last_page=column["last_page"],
            prefill_begins=column["prefill_begins"],
            blocks=self._blocks,
        )
        if section and batch is not None:
            summed = self._run_sections(section, batch.num_tokens, columns)
        else:
            summed = parts.model.layers(layout.tokens, column["cells"], columns)
        if layout.samples:
            self._sample(column, summed, layout.samples, batch)
        return summed

    def _run_sections(self, size: int, num_tokens: int, columns: StepColumns) -> torch.Tensor:
        """The layers, by the graphs between attentions. Positions that fill up the size are nobody's."""
        graphs = self._sections[size]
        for index, graph in enumerate(graphs[:-1]):
            graph.replay()
            self._parts.model.attend(index, num_tokens, columns)
        graphs[-1].replay()
        return self._section_sums[size]

    def _sample(
        self, column: dict[str, torch.Tensor], summed: torch.Tensor, count: int, batch: Batch | None
    ) -> None:
        """Choose a token for each of `count` rows; logits exist for a part of them at a time.

        Without a batch (in a graph) top-k and top-p are left to be done behind it.
        """
        parts, buffers = self._parts, self._parts.buffers
        at_once = buffers.logits.shape[0]
        for begin in range(0, count, at_once):
            rows = slice(begin, min(begin + at_once, count))
            logits = parts.model.logits(summed, column["sampled_rows"][rows])
            keys = buffers.keys[: logits.shape[0]]
            best_keys(
                logits,
                column["temperatures"].view(torch.float32)[rows],
                column["seeds"].view(torch.int64)[rows],
                column["sampled_positions"][rows],
                parts.deal.vocab.start,
                buffers.parts,
                keys,
            )
            parts.reducer.greatest_in_place(keys)
            take_tokens(keys, column["sampled_slots"][rows], buffers.tokens[rows], parts.cache.slot_tokens)
            if batch is not None:
                self._choose_filtered(batch, column, rows)

    def _choose_filtered(self, batch: Batch, column: dict[str, torch.Tensor], rows: slice) -> None:
        """Top-k and top-p: choose again for those of the rows, whose logits are there, that ask for them."""
        filtered = filtered_rows(batch)
        first, last = np.searchsorted(filtered, (rows.start, rows.stop))
        if first == last:
            return
        parts, buffers, sampling = self._parts, self._parts.buffers, batch.sampling
        here = slice(int(first), int(last))
        chosen = filtered[here]
        only_k = bool((sampling.top_ks[chosen] > 0).all() and (sampling.top_ps[chosen] >= 1).all())
        at = column["filtered"][here].long()
        tokens = parts.filtered.choose(
            buffers.logits,
            at - rows.start,
            column["temperatures"].view(torch.float32)[at],
            column["seeds"].view(torch.int64)[at],
            column["sampled_positions"][at].long(),
            column["top_ks"][here],
            column["top_ps"].view(torch.float32)[here],
            largest_k=int(sampling.top_ks[chosen].max()) if only_k else 0,
        ).int()
        buffers.tokens.index_copy_(0, at, tokens)
        parts.cache.slot_tokens.index_copy_(0, column["sampled_slots"][at].long(), tokens)

    def _hand_on(
        self,
        batch: Batch,
        inputs: StepInputs,
        index: int,
        slot: StagingSlot,
        graph_layout: Layout | None,
        summed: torch.Tensor,
    ) -> DeviceStep:
        buffers, count = self._parts.buffers, batch.num_tokens
        if self._last:
            samples = len(batch.sampled_rows)
            if graph_layout:
                self._choose_filtered(batch, self._columns_of(graph_layout), slice(0, samples))
            transfer(buffers.tokens, slot.tokens, samples)
            step = DeviceStep(slot, samples, None)
            if inputs.debug_logits and samples:
                step.logits = self._parts.filtered.gather(buffers.logits[:samples]).clone()
            slot.ended.record()
            self.links.send_ring(index, buffers.tokens[:samples])
        elif self.links.sends_hidden:
            out = self.links.send_buffer(count)
            torch.add(buffers.residual[:count], summed[:count], out=out)
            slot.ended.record()
            step = DeviceStep(slot, None, None)
            step.sent_bytes = self.links.send_hidden(out, slot.ended)
        else:
            out = torch.add(buffers.residual[:count], summed[:count], out=buffers.partial[:count])
            pinned = self._staging.hidden_bytes(slot, out.nbytes)
            pinned.copy_(out.view(torch.uint8).flatten(), non_blocking=True)
            step = DeviceStep(slot, None, pinned)
            slot.ended.record()
        self.links.expect_ring(batch)
        if self.links.receives_hidden:
            step.received_bytes = count * self._parts.config.hidden_size * buffers.residual.element_size()
        return step

    def _make_staging(self, depth: int) -> Staging:
        parts = self._parts
        return Staging(
            parts.device,
            depth,
            columns=self._column_size,
            plan_bytes=parts.plan_bytes,
            samples=max(1, self._samples_of(parts.max_tokens)),
            timeout_s=STEP_TIMEOUT_S,
        )

    @torch.inference_mode()
    def _warm_up(self) -> None:
        """Run every kernel once, with the largest step first: types and shapes compile here, memory is found.

        A kernel that is loaded while links are open waits for a spinning receive (rule 9): a stage whose prefill met a new
        kernel stood still for as long as the next stage's step took.
        """
        parts = self._parts
        largest = self._longest_step()
        longest = largest[0]
        steps = [(largest, 0), ([1] * FILTERED_ROWS, 0)]
        # Attention tiles by the mean number of queries, and splits what has far more cells than queries.
        for count in (1, 2, 8, 64):
            most = min(count, longest)
            steps += [([1, most], 0), ([most], longest - most), ([1, 1, most], longest - most)]
        steps.append(([1], 0))
        for counts, start in steps:
            if sum(counts) > parts.max_tokens:
                continue
            batch = padding_batch(counts, parts.cache.scratch_slot, start)
            _, slot = self._staging.take()
            layout = self._layout_of(batch)
            self._stage(slot, layout, batch)
            summed = self._compute(layout, batch)
            count = batch.num_tokens
            torch.add(parts.buffers.residual[:count], summed, out=parts.buffers.partial[:count])
            if self._last:
                transfer(parts.buffers.tokens, slot.tokens, layout.samples)
            parts.device.synchronize()
            slot.in_use = False
        self._columns.zero_()
        for size in range(SWEEP, parts.max_tokens + 1, SWEEP):
            for count in (size - 1, size):
                self._run_products(count)
        self._blocks.zero_()
        for count in (1, *range(LOGITS_SWEEP, parts.buffers.logits.shape[0] + 1, LOGITS_SWEEP)):
            if self._last:
                parts.model.logits(parts.buffers.residual[:count], self._blocks[:count])
        parts.device.synchronize()

    def _longest_step(self) -> list[int]:
        """Positions of the rows of a step of as many as there may be, in as few rows as contexts allow."""
        longest = min(self._parts.max_tokens, self._parts.cache.tables.shape[1] * self._block_size)
        whole, rest = divmod(self._parts.max_tokens, longest)
        return [longest] * whole + ([rest] if rest else [])

    def _run_products(self, count: int) -> None:
        """Every product of a layer, of so many positions that nobody has; the columns must be zero."""
        column = self._columns_of(Layout(count, 0, 0, 0))
        for index in (0, 1):
            self._parts.model.section(index, count, column["cells"], column["positions"])

    def _no_inputs(self, batch: Batch) -> StepInputs:
        return StepInputs(arrived_ns=0, tokens=batch.given_tokens if self._first else None)

    @torch.inference_mode()
    def _capture(self, progress: Callable[[int, int], None] | None) -> None:
        variants = [
            (size, split)
            for size in reversed(self._buckets)
            for split in self._parts.attention.variants(size)
        ]
        total = len(variants) + len(self._section_sizes)
        for done, (size, split) in enumerate(variants):
            self._capture_decode(size, split)
            if progress is not None:
                progress(done + 1, total)
        for done, size in enumerate(reversed(self._section_sizes), len(variants)):
            self._capture_sections(size)
            if progress is not None:
                progress(done + 1, total)

    def _capture_decode(self, size: int, split: bool) -> None:
        """The graph of decode steps of up to so many rows."""
        device, layout = self._parts.device, self._layouts[size]
        _, slot = self._staging.take()
        batch = padding_batch([1], self._parts.cache.scratch_slot)
        self._stage(slot, layout, batch, size, split)
        self._compute(layout, None)  # once without a graph: kernels load
        device.synchronize()

        def work() -> None:
            self._summed[size] = self._compute(layout, None)

        self._graphs[size, split] = device.capture(work)
        self._graphs[size, split].replay()
        device.synchronize()
        slot.in_use = False

    def _capture_sections(self, size: int) -> None:
        """The graphs between attentions for steps of so many positions, which lie where such a step's do."""
        model, device = self._parts.model, self._parts.device
        column = self._columns_of(Layout(size, 0, 0, 0))
        cells, positions = column["cells"], column["positions"]

        def section(index: int) -> None:
            self._section_sums[size] = model.section(index, size, cells, positions)

        self._columns.zero_()
        self._run_products(size)  # once without a graph: kernels load
        device.synchronize()
        self._sections[size] = [
            device.capture(partial(section, index)) for index in range(model.num_sections)
        ]


def padding_batch(counts: list[int], slot: int, start: int = 0) -> Batch:
    """Rows of a slot that nobody has, all positions at cell 0: what warms up before a lane opens.

    Their sampling asks for everything there is, and a change of block tables that is passed over.
    """
    zero = np.zeros(1, np.int64)
    lengths = np.array(counts, np.int64)
    rows, total = len(counts), sum(counts)
    ends = np.cumsum(lengths)
    return Batch(
        number=0,
        slots=np.full(rows, slot),
        counts=lengths,
        starts=np.full(rows, start, np.int64),
        offsets=ends - lengths,
        positions=np.zeros(total, np.int64),
        cells=np.zeros(total, np.int64),
        tables=np.zeros((rows, 1), np.int32),
        input_steps=np.zeros(rows, np.uint64),
        given_tokens=np.zeros(total, np.int64),
        sampled_slots=np.full(rows, slot),
        sampled_rows=ends - 1,
        sampling=SamplingColumns(
            seeds=np.zeros(rows, np.uint64),
            positions=lengths,
            temperatures=np.ones(rows, np.float32),
            top_ks=np.full(rows, 0 if rows > 1 else 2, np.int32),
            top_ps=np.full(rows, 0.9 if rows > 1 else 1.0, np.float32),
        ),
        changes=BlockChanges(slots=zero - 1, indexes=zero, blocks=zero),
    )
