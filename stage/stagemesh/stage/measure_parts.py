"""Times a layer and the head of a model on this machine's CPU, in this process."""

from __future__ import annotations

import statistics
import tempfile
import time
from pathlib import Path

import numpy as np

from stagemesh.model.config import ModelConfig
from stagemesh.model.cost import StepShape
from stagemesh.model.deal import deal
from stagemesh.model.layer_split import PartTimes
from stagemesh.model.source import ModelSource
from stagemesh.stage.engine.batch import Batch
from stagemesh.stage.engine.slots import SlotTable
from stagemesh.v1 import stage_pb2
from stagemesh.wire.columns import F32, U32, U64, pack

FEW, MORE = 1, 4
"""Layers of the two stages whose difference is a layer's time."""
ROUNDS = 7
BLOCK = 16


def measure_parts(source: ModelSource, shape: StepShape, threads: int) -> PartTimes:
    """Random weights; the median of ROUNDS for each of three small stages.

    Args:
        source: The model; its weights are not read.
        shape: Of the step.
        threads: Of torch.
    """
    import torch

    torch.set_num_threads(threads)
    config = source.config
    count = config.num_layers
    more = min(MORE, count)
    with torch.inference_mode():
        few = _seconds(source, range(min(FEW, count)), shape)
        many = _seconds(source, range(more), shape)
        last = _seconds(source, range(count - 1, count), shape)
    layer = max((many - few) / max(1, more - FEW), 1e-9)
    step = max(0.0, few - layer)
    return PartTimes(layer_s=layer, head_s=max(0.0, last - layer - step), step_s=step)


def _seconds(source: ModelSource, layers: range, shape: StepShape) -> float:
    from stagemesh.stage.engine.torch_engine import TorchEngine
    from stagemesh.stage.group import RankGroup

    config = source.config
    per_row = max(1, shape.context // max(1, shape.rows))
    blocks = shape.rows * (-(-per_row // BLOCK)) + -(-shape.prefill // BLOCK) + shape.rows
    with tempfile.TemporaryDirectory() as folder:
        group = RankGroup.connect(0, 1, Path(folder) / "store", timeout_s=30.0)
        engine = TorchEngine(
            source,
            layers,
            deal(config, 1),
            group,
            dtype="float32",
            num_blocks=blocks,
            block_size=BLOCK,
            max_context=config.max_context,
            dummy=True,
        )
        batch = step_batch(shape, blocks, config)
        tokens = np.zeros(batch.num_tokens, np.int64) if layers.start == 0 else None
        hidden = memoryview(bytearray(4 * batch.num_tokens * config.hidden_size))
        times = []
        for _ in range(ROUNDS):
            began = time.perf_counter()
            engine.run(
                batch,
                arrived_ns=0,
                tokens=tokens,
                hidden=None if layers.start == 0 else hidden,
                debug_logits=False,
            )
            times.append(time.perf_counter() - began)
    return statistics.median(times[1:])


def step_batch(shape: StepShape, num_blocks: int, config: ModelConfig) -> Batch:
    """A step of that shape: rows that decode, with their context, and the prefill as a further chunk of the last."""
    context = min(max(1, shape.context // max(1, shape.rows)), config.max_context - shape.prefill - 1)
    slots = np.arange(shape.rows)
    counts = np.ones(shape.rows, np.int64)
    counts[-1] += shape.prefill
    table = SlotTable(
        max_slots=shape.rows,
        max_blocks=-(-config.max_context // BLOCK),
        block_size=BLOCK,
        num_blocks=num_blocks,
    )
    held = -(-(context - 1 + counts) // BLOCK)
    step = stage_pb2.Step(
        epoch=1,
        number=1,
        admissions=stage_pb2.Admissions(
            slots=pack(slots, U32),
            positions=pack(np.full(shape.rows, context - 1), U32),
            seeds=pack(slots, U64),
            temperatures=pack(np.zeros(shape.rows), F32),
            top_ks=pack(np.zeros(shape.rows), U32),
            top_ps=pack(np.ones(shape.rows), F32),
        ),
        append_slots=pack(np.repeat(slots, held), U32),
        append_blocks=pack(np.arange(int(held.sum())), U32),
        rows=stage_pb2.Rows(
            slots=pack(slots, U32),
            counts=pack(counts, U32),
            tokens=pack(np.zeros(int(counts.sum())), U32),
        ),
    )
    return table.apply(step)
