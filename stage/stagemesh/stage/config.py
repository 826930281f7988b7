"""The settings of one stage process."""

from __future__ import annotations

from typing import Literal

from pydantic import BaseModel, ConfigDict, Field

from stagemesh.wire.cgroup import usable_cores

GIB = 1 << 30


class StageConfig(BaseModel):
    """What a stage is started with. Defaults are written here and nowhere else."""

    model_config = ConfigDict(frozen=True, extra="forbid", protected_namespaces=())

    model: str = Field(description="Path of a Hugging Face folder or a GGUF file.")
    stage: str | None = Field(default=None, description="This stage and how many there are, from 0: 0/3.")
    layers: str | None = Field(
        default=None, description="Layers BEGIN:END, half-open; overrides the split by cost."
    )
    head_share: float = Field(
        default=1.0,
        ge=0,
        le=4,
        description="Of the head's weights that count when layers are split; less where much is prefill.",
    )
    tp: int = Field(default=1, ge=1, description="Tensor-parallel ranks, a worker process each.")
    listen: str = Field(default="127.0.0.1:50061", description="Address of the stage's gRPC server.")
    device: Literal["auto", "cpu", "cuda"] = Field(default="auto", description="Where the workers compute.")
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = Field(
        default="auto", description="Of weights, activations and KV; auto is float32 on a CPU."
    )
    block_size: int = Field(default=16, ge=1, description="Tokens of a KV block.")
    kv_memory: int = Field(default=GIB, gt=0, description="Bytes for KV on a CPU stage, over all its ranks.")
    gpus: str = Field(default="", description="GPU of each rank, such as 0 or 2,3; empty: from 0 on.")
    memory_share: float = Field(default=0.9, gt=0, le=1, description="Share of a GPU's memory to use.")
    max_step_tokens: int = Field(
        default=8192, ge=1, description="Positions of a step that a GPU has buffers for."
    )
    max_graph_rows: int = Field(
        default=512, ge=1, description="Rows of a decode step up to which a CUDA graph runs it."
    )
    cuda_graphs: bool = Field(default=True, description="Decode by CUDA graphs.")
    pdl: bool = Field(
        default=True,
        description="Kernels start while those ahead of them end (programmatic dependent launch, from Hopper on).",
    )
    symmetric_memory: bool = Field(
        default=True, description="Ranks sum small tensors through memory they share over NVLink."
    )
    fused_all_reduce: bool = Field(
        default=True,
        description="Ranks sum the products of a decode step in one kernel with the norm that follows.",
    )
    nccl_links: bool = Field(default=True, description="Offer NCCL to neighbour stages.")
    max_slots: int = Field(
        default=512, ge=1, description="Sequences the stage holds at most, for each stage of its lane."
    )
    max_context: int | None = Field(
        default=None, ge=1, description="Tokens of a sequence at most; unset: the model's."
    )
    threads: int = Field(
        default=0,
        ge=0,
        description="Compute threads of each worker; 0: cores, or a container's share of them, over ranks.",
    )
    shared_cores: bool = Field(
        default=False, description="Other stages compute on the same cores: idle threads sleep."
    )
    engine: Literal["torch", "sim"] = Field(
        default="torch",
        description="sim: scripted costs and tokens in place of a model; needs config.json alone.",
    )
    cost: str = Field(
        default="1ms", description="Of a step on the sim engine, such as '2ms + 0.01ms*tokens'."
    )
    load_format: Literal["auto", "dummy"] = Field(
        default="auto", description="dummy: random weights from config.json alone."
    )
    linears: Literal["auto", "native", "transposed", "onednn"] = Field(
        default="auto",
        description="Layout of the weights on a CPU; auto: native where it was built and the CPU has AVX-512, else "
        "the faster one for its maker's CPUs.",
    )
    group_timeout_s: float = Field(
        default=30.0, gt=0, description="Seconds a rank waits for another in a collective."
    )
    worker_timeout_s: float = Field(default=60.0, gt=0, description="A worker silent for longer is replaced.")
    trace_ranks: bool = Field(
        default=False, description="In traces of microbatches, a span for each tensor-parallel rank too."
    )
    metrics: str | None = Field(
        default=None, description="Address of an HTTP server for /metrics, /healthz and /readyz; unset: none."
    )
    insecure: bool = Field(default=False, description="Listen beyond loopback without TLS.")
    log_level: str = Field(default="info", description="debug, info, warning or error.")
    log_json: bool = Field(default=False, description="Log JSON lines.")

    @property
    def needs_weights(self) -> bool:
        """Whether the model's weight files are read."""
        return self.engine == "torch" and self.load_format != "dummy"

    @property
    def num_threads(self) -> int:
        """Compute threads of each worker."""
        return self.threads or max(1, usable_cores() // self.tp)
