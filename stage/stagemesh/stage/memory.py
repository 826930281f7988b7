"""What a rank will hold of a GPU's memory, worked out before anything is allocated. Pure arithmetic."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from stagemesh.model.config import ModelConfig
from stagemesh.model.deal import RankDeal, deal
from stagemesh.model.shard_shapes import shard_parameters
from stagemesh.model.split import split_layers
from stagemesh.stage.cuda.scratch import plan_scratch
from stagemesh.stage.cuda.workspace import workspace_bytes
from stagemesh.wire.errors import ConfigError

MIB = 1 << 20
GIB = 1 << 30
MAX_GPUS = 64
"""Layouts of more are not looked for."""
MAX_SUMMED_ROWS = 2048
"""Rows that ranks sum through memory they share (reduce.py)."""
SPARE_BYTES = 256 * MIB
"""Of what other processes leave: what they hold may grow a little, and pieces of memory are rounded up."""
LINK_DEPTH = 8
"""Steps whose activations wait on a GPU to be sent, at most: buffers of a link."""
FILTERED_ROWS = 16
FILTER_BYTES = 64
"""Top-k and top-p sort so many rows of logits at once, and take so much for each logit of them."""


@dataclass(frozen=True, slots=True, kw_only=True)
class MemoryNeeds:
    """What the engine asks for besides weights. The byte counts are what was seen on a device, rounded up."""

    step_tokens: int
    """Tokens of a step at most."""
    sampled_rows: int
    """Rows of a step whose logits exist at one time."""
    depth: int
    """D: steps that link buffers hold."""
    max_slots: int
    max_context: int
    """Tokens of a sequence at most."""
    block_size: int
    itemsize: int
    """Bytes of an element of weights, activations and KV."""
    context_bytes: int = 640 * MIB
    """The CUDA context, loaded kernels, cuBLAS and NCCL."""
    workspace_bytes: int = 64 * MIB
    """Of cuBLAS, of all-reduce and of plans."""
    graph_bytes: int = 128 * MIB
    """Of the captured graphs."""


@dataclass(frozen=True, slots=True, kw_only=True)
class GPUMemory:
    """One GPU, and how much of it a rank may use."""

    total_bytes: int
    share: float
    """Of the total, in (0, 1]."""
    used_bytes: int = 0
    """Held by other processes before this stage took anything."""

    @property
    def budget(self) -> int:
        """Bytes a rank may use: its share, or what others leave if that is less."""
        left = self.total_bytes - self.used_bytes - SPARE_BYTES
        return max(0, min(int(self.total_bytes * self.share), left))


@dataclass(frozen=True, slots=True, kw_only=True)
class RankMemory:
    """Bytes of one rank by purpose."""

    weights: int
    activations: int
    """With attention's partial results and logits, which lie in the memory of other activations."""
    sampling: int
    """What top-k and top-p take besides logits."""
    links: int
    tables: int
    """Rotary table and block tables."""
    workspaces: int
    graphs: int
    context: int
    block: int
    """Of one KV block, keys and values of all layers of the stage."""
    budget: int

    @property
    def fixed(self) -> int:
        """Everything but KV."""
        return (
            self.weights
            + self.activations
            + self.sampling
            + self.links
            + self.tables
            + self.workspaces
            + self.graphs
            + self.context
        )

    @property
    def num_blocks(self) -> int:
        """KV blocks that the rest of the budget holds."""
        return max(0, self.budget - self.fixed) // self.block

    @property
    def kv(self) -> int:
        """Bytes of those blocks."""
        return self.num_blocks * self.block

    def describe(self) -> str:
        """One line for people, largest first."""
        parts = (
            "weights",
            "kv",
            "activations",
            "sampling",
            "links",
            "tables",
            "workspaces",
            "graphs",
            "context",
        )
        sizes = sorted(((getattr(self, part), part) for part in parts), reverse=True)
        told = ", ".join(f"{part} {size / GIB:.2f}" for size, part in sizes if size)
        return f"{self.budget / GIB:.2f} GiB: {told}; {self.num_blocks} KV blocks of {self.block} bytes"


def rank_memory(
    model: ModelConfig, layers: range, rank: RankDeal, needs: MemoryNeeds, gpu: GPUMemory
) -> RankMemory:
    """What `rank` of the stage that runs `layers` holds."""
    first, last = layers.start == 0, layers.stop == model.num_layers
    parameters = shard_parameters(model, layers, rank, has_embedding=first, has_head=last)
    hidden, head_dim = model.hidden_size, model.head_dim
    keys = len(rank.kv_heads) * head_dim
    scratch = plan_scratch(
        rank,
        head_dim,
        step_tokens=needs.step_tokens,
        sampled_rows=needs.sampled_rows if last else 0,
        itemsize=needs.itemsize,
        workspace_bytes=workspace_bytes(len(rank.heads), len(rank.kv_heads), head_dim),
    )
    summed_rows = min(needs.step_tokens, MAX_SUMMED_ROWS) if rank.size > 1 else 0
    # Residuals, products that ranks sum, and the sums of some of them.
    rows = 2 * needs.step_tokens + summed_rows
    sorted_logits = min(needs.sampled_rows, FILTERED_ROWS) * model.vocab_size
    hidden_bytes = needs.step_tokens * hidden * needs.itemsize
    num_links = (not first) + (not last)
    max_blocks = -(-needs.max_context // needs.block_size)
    return RankMemory(
        weights=parameters * needs.itemsize,
        activations=rows * hidden * needs.itemsize + scratch.total,
        sampling=sorted_logits * FILTER_BYTES if last else 0,
        links=num_links * needs.depth * hidden_bytes,
        # Block tables, and the lists of blocks that attention reads, which may be as long.
        tables=needs.max_context * head_dim * 2 * 4 + 2 * needs.max_slots * max_blocks * 4,
        workspaces=needs.workspace_bytes,
        graphs=needs.graph_bytes,
        context=needs.context_bytes,
        block=2 * len(layers) * needs.block_size * keys * needs.itemsize,
        budget=gpu.budget,
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class StageMemory:
    """The ranks of one stage."""

    layers: range
    ranks: tuple[RankMemory, ...]

    @property
    def num_blocks(self) -> int:
        """KV blocks of the stage: those of its poorest rank."""
        return min(rank.num_blocks for rank in self.ranks)

    @property
    def limiting_rank(self) -> int:
        """The poorest rank."""
        return min(range(len(self.ranks)), key=lambda rank: self.ranks[rank].num_blocks)


def stage_memory(
    model: ModelConfig,
    layers: range,
    deals: Sequence[RankDeal],
    needs: MemoryNeeds,
    gpus: Sequence[GPUMemory],
) -> StageMemory:
    """What the ranks of a stage hold, rank i on gpus[i]."""
    ranks = tuple(rank_memory(model, layers, rank, needs, gpu) for rank, gpu in zip(deals, gpus, strict=True))
    return StageMemory(layers=layers, ranks=ranks)


@dataclass(frozen=True, slots=True, kw_only=True)
class LaneMemory:
    """A whole model on `len(stages)` stages."""

    stages: tuple[StageMemory, ...]

    @property
    def num_blocks(self) -> int:
        """KV blocks of the lane."""
        return self.stages[self.limiting_stage].num_blocks

    @property
    def limiting_stage(self) -> int:
        """The stage with the fewest KV blocks."""
        return min(range(len(self.stages)), key=lambda stage: self.stages[stage].num_blocks)


def lane_memory(
    model: ModelConfig, num_stages: int, tp: int, needs: MemoryNeeds, gpu: GPUMemory
) -> LaneMemory:
    """What a lane of equal GPUs holds, split as stages split themselves."""
    deals = deal(model, tp)
    return LaneMemory(
        stages=tuple(
            stage_memory(model, layers, deals, needs, [gpu] * tp)
            for layers in split_layers(model, num_stages)
        )
    )


def smallest_layout(
    model: ModelConfig, needs: MemoryNeeds, gpu: GPUMemory, min_blocks: int
) -> tuple[int, int] | None:
    """The fewest such GPUs that leave `min_blocks` KV blocks, as (stages, TP size); None if MAX_GPUS do not.

    Of layouts with as many GPUs, the one with the most blocks.
    """
    for num_gpus in range(1, MAX_GPUS + 1):
        layouts = [
            (lane_memory(model, num_gpus // tp, tp, needs, gpu).num_blocks, num_gpus // tp, tp)
            for tp in range(1, min(num_gpus, model.num_kv_heads) + 1)
            if num_gpus % tp == 0 and num_gpus // tp <= model.num_layers
        ]
        blocks, stages, tp = max(layouts, default=(0, 0, 0))
        if blocks >= max(1, min_blocks):
            return stages, tp
    return None


def require_fit(
    model: ModelConfig, stage: StageMemory, needs: MemoryNeeds, gpu: GPUMemory, min_blocks: int
) -> None:
    """Refuse a stage that leaves fewer than `min_blocks` KV blocks.

    Raises:
        ConfigError: It names what the poorest rank needs, and the smallest layout that fits GPUs like `gpu`.
    """
    if stage.num_blocks >= max(1, min_blocks):
        return
    poorest = stage.ranks[stage.limiting_rank]
    wanted = poorest.fixed + max(1, min_blocks) * poorest.block
    layout = smallest_layout(model, needs, gpu, min_blocks)
    if layout is None:
        remedy = f"{MAX_GPUS} GPUs of this size do not hold the model"
    else:
        stages = f"{layout[0]} stage" + "s" * (layout[0] > 1)
        remedy = f"the smallest layout that fits such GPUs is {stages} with --tp {layout[1]}"
    if wanted <= replace(gpu, used_bytes=0).budget:
        remedy = f"without other processes it would fit this GPU; {remedy}"
    raise ConfigError(
        f"layers {stage.layers.start}:{stage.layers.stop} do not fit: rank {stage.limiting_rank} of {len(stage.ranks)} "
        f"needs {wanted / GIB:.2f} GiB (weights {poorest.weights / GIB:.2f}, {max(1, min_blocks)} KV blocks "
        f"{max(1, min_blocks) * poorest.block / GIB:.2f}, the rest {(poorest.fixed - poorest.weights) / GIB:.2f}) and may use "
        f"{gpu.budget / GIB:.2f} GiB (--memory-share {gpu.share:g} of {gpu.total_bytes / GIB:.2f}, of which other processes "
        f"hold {gpu.used_bytes / GIB:.2f}); {remedy}"
    )
