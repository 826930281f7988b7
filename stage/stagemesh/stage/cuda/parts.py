"""Makes the engine of a rank on a GPU out of a stage's plan."""

from __future__ import annotations

import importlib.util
import logging
import os
import time
from collections.abc import Callable
from pathlib import Path

import torch

from stagemesh.stage.config import StageConfig
from stagemesh.stage.cuda.attention import HeadShape, make_attention
from stagemesh.stage.cuda.buffers import make_buffers
from stagemesh.stage.cuda.cache import DeviceCache
from stagemesh.stage.cuda.device import CudaDevice, Stream
from stagemesh.stage.cuda.engine import CudaEngine, EngineParts
from stagemesh.stage.cuda.filtered import FilteredChoice
from stagemesh.stage.cuda.fused_reduce import FusedReducer, load_module
from stagemesh.stage.cuda.links import DeviceLinks, NcclLinks
from stagemesh.stage.cuda.model import DeviceLlama
from stagemesh.stage.cuda.reduce import Reducer, SharedReducer, time_in_graph
from stagemesh.stage.cuda.scratch import plan_scratch
from stagemesh.stage.cuda.workspace import workspace_bytes
from stagemesh.stage.engine.torch_engine import DTYPES
from stagemesh.stage.group import RankGroup
from stagemesh.stage.kernels.choose import num_parts
from stagemesh.stage.kernels.pdl import has_pdl
from stagemesh.stage.plan import StagePlan
from stagemesh.stage.weights import load_shard

log = logging.getLogger(__name__)

PLAN_BYTES = 1 << 20

Progress = Callable[[str, int, int], None]
"""Called with what is being done, and how much of how much of it is."""


def make_cuda_engine(
    config: StageConfig,
    plan: StagePlan,
    group: RankGroup,
    device: CudaDevice,
    *,
    progress: Progress,
    start_seconds: dict[str, float],
) -> CudaEngine:
    """Load the rank's shard, allocate everything, warm up and capture graphs."""
    began = time.perf_counter()
    stream = device.stream()
    device.bind(stream)
    model, deal = plan.source.config, plan.deals[group.rank]
    dtype, where = DTYPES[plan.dtype], device.torch_device
    first, last = plan.layers.start == 0, plan.layers.stop == model.num_layers
    weights = load_shard(
        plan.source,
        plan.layers,
        deal,
        dtype=dtype,
        has_embedding=first,
        has_head=last,
        device=where,
        dummy=config.load_format == "dummy",
        progress=lambda done, total: progress("weights", done, total),
    )
    device.synchronize()
    storages = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in weights.values()}
    read = time.perf_counter()
    shape = HeadShape(
        num_heads=len(deal.heads),
        num_kv_heads=len(deal.kv_heads),
        head_dim=model.head_dim,
        most_kv_heads=max(len(other.kv_heads) for other in plan.deals),
    )
    max_rows = min(config.max_graph_rows, config.max_step_tokens)
    cache = DeviceCache(
        where,
        num_layers=len(plan.layers),
        num_blocks=plan.num_blocks,
        block_size=config.block_size,
        num_kv_heads=shape.num_kv_heads,
        head_dim=shape.head_dim,
        dtype=dtype,
        max_slots=plan.max_slots,
        max_blocks=-(-plan.max_context // config.block_size),
    )
    pdl = config.pdl and has_pdl(where)
    reducer = _reducer(group, config, model.hidden_size, dtype, where, pdl)
    samples = max(max_rows, 1) if last else 0
    scratch = plan_scratch(
        deal,
        model.head_dim,
        step_tokens=config.max_step_tokens,
        sampled_rows=samples,
        itemsize=dtype.itemsize,
        workspace_bytes=workspace_bytes(shape.num_heads, shape.num_kv_heads, shape.head_dim),
    )
    buffers = make_buffers(
        model,
        deal,
        scratch,
        max_tokens=config.max_step_tokens,
        max_samples=samples,
        num_parts=num_parts(len(deal.vocab)),
        dtype=dtype,
        device=where,
        partial=reducer.partial if isinstance(reducer, SharedReducer) else None,
    )
    attention, reason = make_attention(
        cache, shape, buffers.workspace, group, max_rows=max_rows, max_tokens=config.max_step_tokens, pdl=pdl
    )
    links, transports = _links(config, group, device, stream, model.hidden_size, dtype, cache)
    made = time.perf_counter()
    return CudaEngine(
        EngineParts(
            config=model,
            layers=plan.layers,
            deal=deal,
            shards=[other.vocab for other in plan.deals],
            device=device,
            stream=stream,
            cache=cache,
            attention=attention,
            reducer=reducer,
            buffers=buffers,
            model=DeviceLlama(
                model,
                plan.layers,
                deal,
                weights,
                attention,
                reducer,
                buffers,
                max_context=plan.max_context,
                pdl=pdl,
            ),
            filtered=FilteredChoice(group, [other.vocab for other in plan.deals]),
            links=links,
            max_slots=plan.max_slots,
            max_rows=max_rows,
            max_tokens=config.max_step_tokens,
            plan_bytes=PLAN_BYTES,
            graphs=config.cuda_graphs,
            weight_bytes=sum(storages.values()),
            backends={
                "gpu": torch.cuda.get_device_name(where),
                "gpu-id": str(torch.cuda.get_device_properties(where).uuid),
                "links": transports,
                "pdl": "on" if pdl else "off",
                **({"attention-reason": reason} if reason else {}),
            },
        ),
        progress=lambda done, total: progress("graphs", done, total),
        start_seconds={**start_seconds, "read": read - began, "kernels": made - read},
    )


def _reducer(
    group: RankGroup,
    config: StageConfig,
    hidden: int,
    dtype: torch.dtype,
    device: torch.device,
    pdl: bool,
) -> Reducer:
    if group.size == 1 or not config.symmetric_memory:
        return Reducer(group)
    module, reason = load_module(group, hidden, dtype) if config.fused_all_reduce else (None, "")
    if reason:
        log.warning("all-reduce: not in one kernel with the norm: %s", reason)
    reducer: SharedReducer
    try:
        if module is None:
            reducer = SharedReducer(group, config.max_step_tokens, hidden, dtype, device)
        else:
            reducer = FusedReducer(group, config.max_step_tokens, hidden, dtype, device, module)
    except RuntimeError as error:
        log.warning("all-reduce: NCCL alone, the ranks cannot share memory: %s", error)
        return Reducer(group)
    folder = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "stagemesh"
    reducer.measure(folder / "all-reduce.json", time_in_graph, pdl=pdl)
    return reducer


def _links(
    config: StageConfig,
    group: RankGroup,
    device: CudaDevice,
    stream: Stream,
    hidden: int,
    dtype: torch.dtype,
    cache: DeviceCache,
) -> tuple[DeviceLinks, str]:
    if not config.nccl_links:
        return DeviceLinks(), "--no-nccl-links"
    if importlib.util.find_spec("cupy") is None:
        log.warning("links: through the host alone, cupy is not installed")
        return DeviceLinks(), "cupy is not installed"
    links = NcclLinks(
        device,
        stream,
        rank=group.rank,
        size=group.size,
        hidden=hidden,
        dtype=dtype,
        max_tokens=config.max_step_tokens,
        max_samples=config.max_step_tokens,
        slot_tokens=cache.slot_tokens,
    )
    return links, "nccl"
