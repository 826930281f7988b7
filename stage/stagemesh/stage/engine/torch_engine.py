"""The engine that runs a model with torch, on the CPU."""

from __future__ import annotations

import os
import time
from collections.abc import Callable

import numpy as np
import numpy.typing as npt
import torch

from stagemesh.model.deal import RankDeal
from stagemesh.model.source import ModelSource
from stagemesh.stage.attention import TorchPagedAttention
from stagemesh.stage.engine.batch import Batch, SamplingColumns
from stagemesh.stage.engine.interface import HostEngine, RankFacts, StepOutput
from stagemesh.stage.group import RankGroup
from stagemesh.stage.models.llama import LlamaStage
from stagemesh.stage.models.native_layers import NativeLayers
from stagemesh.stage.models.product import Layout, fastest_layout
from stagemesh.stage.sampling.sampler import Sampler
from stagemesh.stage.weights import load_shard

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


class TorchEngine(HostEngine):
    """One rank's layers, KV cache and sampler.

    Args:
        source: The model.
        layers: This stage's layers of it.
        deals: Every rank's share, in rank order.
        group: The stage's ranks.
        dtype: Name of the type of weights, activations and KV.
        num_blocks: KV blocks.
        block_size: Tokens of a block.
        max_context: Tokens of a sequence at most.
        layout: Of the weights in memory; None: this machine's fastest.
        dummy: Random weights instead of the model's.
        progress: Called with (bytes read, bytes in all) while loading.
        start_seconds: What the process spent before, by phase.
    """

    def __init__(
        self,
        source: ModelSource,
        layers: range,
        deals: tuple[RankDeal, ...],
        group: RankGroup,
        *,
        dtype: str,
        num_blocks: int,
        block_size: int,
        max_context: int,
        layout: Layout | None = None,
        dummy: bool = False,
        progress: Callable[[int, int], None] | None = None,
        start_seconds: dict[str, float] | None = None,
    ) -> None:
        config, deal = source.config, deals[group.rank]
        self._config = config
        self._deal = deal
        self._dtype = DTYPES[dtype]
        self._num_blocks = num_blocks
        first, last = layers.start == 0, layers.stop == config.num_layers
        began = time.perf_counter()
        weights = load_shard(
            source,
            layers,
            deal,
            dtype=self._dtype,
            has_embedding=first,
            has_head=last,
            dummy=dummy,
            progress=progress,
        )
        storages = {
            tensor.untyped_storage().data_ptr(): tensor.untyped_storage().nbytes()
            for tensor in weights.values()
        }
        self._weight_bytes = sum(storages.values())
        read = time.perf_counter()
        layout = layout or fastest_layout(self._dtype)
        self._model = LlamaStage(
            config,
            layers,
            deal,
            weights,
            group,
            dtype=self._dtype,
            max_context=max_context,
            layout=layout,
        )
        if self._model.head is not None:
            self._weight_bytes += self._model.head.copied_bytes
        self._attention = TorchPagedAttention(
            num_layers=len(layers),
            num_blocks=num_blocks,
            block_size=block_size,
            num_heads=len(deal.heads),
            num_kv_heads=len(deal.kv_heads),
            head_dim=config.head_dim,
            dtype=self._dtype,
        )
        self._kv_bytes = self._attention.num_bytes
        if layout == "native" and NativeLayers.fits(config, self._dtype):
            self._model.native = NativeLayers(config, deal, self._model.layers, self._attention, group)
        self._backends = {"linears": layout, "decode": "native" if self._model.native else "torch"}
        self._sampler = (
            Sampler(group, deal.vocab, config.vocab_size, [other.vocab for other in deals]) if last else None
        )
        packed = time.perf_counter()
        self._warm_up(block_size)
        self._load_seconds = {
            **(start_seconds or {}),
            "read": read - began,
            "pack": packed - read,
            "warm-up": time.perf_counter() - packed,
        }

    def facts(self) -> RankFacts:
        return RankFacts(
            rank=self._deal.rank,
            device="cpu",
            num_heads=len(self._deal.heads),
            num_kv_heads=len(self._deal.kv_heads),
            mlp_columns=len(self._deal.columns),
            weight_bytes=self._weight_bytes,
            kv_bytes=self._kv_bytes,
            num_blocks=self._num_blocks,
            process_id=os.getpid(),
            load_seconds=self._load_seconds,
            backends=self._backends,
        )

    @torch.inference_mode()
    def run(
        self,
        batch: Batch,
        *,
        arrived_ns: int,
        tokens: npt.NDArray[np.int64] | None,
        hidden: memoryview | None,
        debug_logits: bool,
    ) -> StepOutput:
        self._attention.plan(batch)
        if tokens is not None:
            inputs = torch.from_numpy(tokens)
        else:
            assert hidden is not None
            inputs = torch.frombuffer(hidden, dtype=self._dtype).view(
                batch.num_tokens, self._config.hidden_size
            )
        out = self._model(inputs, torch.from_numpy(batch.positions), self._attention)
        if self._sampler is None:
            return StepOutput(hidden=memoryview(out.contiguous().view(torch.uint8).numpy()).cast("B"))
        if not len(batch.sampled_rows):
            return StepOutput(tokens=np.zeros(0, np.int64))
        logits = self._model.logits(out[torch.from_numpy(batch.sampled_rows)])
        sampled = self._sampler.sample(logits, batch.sampling)
        whole = self._sampler.gather(logits).numpy() if debug_logits else None
        return StepOutput(tokens=sampled.numpy(), logits=whole)

    def _warm_up(self, block_size: int) -> None:
        """One prefill and one decode on block 0, so that the first request finds every kernel loaded."""
        first = self._model.embedding is not None
        for start, count in ((0, min(2, block_size - 1)), (min(2, block_size - 1), 1)):
            batch = _warm_up_batch(start, count)
            hidden = memoryview(bytearray(count * self._config.hidden_size * self._dtype.itemsize))
            self.run(
                batch,
                arrived_ns=time.monotonic_ns(),
                tokens=np.zeros(count, np.int64) if first else None,
                hidden=None if first else hidden,
                debug_logits=False,
            )


def _warm_up_batch(start: int, count: int) -> Batch:
    positions = np.arange(start, start + count)
    one = np.zeros(1, np.int64)
    return Batch(
        number=0,
        slots=one,
        counts=one + count,
        starts=one + start,
        offsets=one,
        positions=positions,
        cells=positions,
        tables=np.zeros((1, 1), np.int32),
        input_steps=np.zeros(1, np.uint64),
        given_tokens=np.zeros(count, np.int64),
        sampled_slots=one,
        sampled_rows=one + count - 1,
        sampling=SamplingColumns(
            seeds=np.zeros(1, np.uint64),
            positions=one + start + count,
            temperatures=np.zeros(1, np.float32),
            top_ks=np.zeros(1, np.int32),
            top_ps=np.ones(1, np.float32),
        ),
    )
