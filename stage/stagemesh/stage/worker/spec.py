"""What a leader tells a worker at its start."""

from __future__ import annotations

from pydantic import BaseModel, ConfigDict

from stagemesh.stage.config import StageConfig


class WorkerSpec(BaseModel):
    """Passed as JSON on the command line."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    rank: int
    leader_pid: int
    queue: int
    """Descriptor of its end of the local queue."""
    store: str
    """File where the ranks of the group meet."""
    memory: int | None
    """Descriptor of memory that the ranks share; None: they talk over NCCL or gloo."""
    used_bytes: tuple[int, ...]
    """What other processes held of each rank's GPU before the first worker began; none on a CPU."""
    config: StageConfig
