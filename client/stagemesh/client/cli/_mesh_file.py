"""What mesh.yaml says to one stage and to the router."""

from __future__ import annotations

from typing import Any

from stagemesh.router.config import MeshFile
from stagemesh.wire.errors import ConfigError


def stage_values(file: MeshFile, path: str, index: int) -> dict[str, Any]:
    """Values of StageConfig for stage `index` of the file."""
    if not 0 <= index < len(file.stages):
        raise ConfigError(f"--index: {path} has no stage {index}; it has {len(file.stages)}, counted from 0")
    entry = file.stages[index]
    return {
        "model": file.model,
        "stage": f"{index}/{len(file.stages)}",
        "layers": entry.layers,
        "tp": entry.tp,
        "listen": entry.address,
        "metrics": entry.metrics,
        "block_size": file.block_size,
        "max_context": file.max_context,
    }


def router_values(file: MeshFile) -> dict[str, Any]:
    """Values of RouterConfig."""
    return {
        "model": file.model,
        "stages": tuple(entry.address for entry in file.stages) or None,
        "listen": file.router.listen,
        "admin": file.router.admin,
        "metrics": file.router.metrics,
        "api_workers": file.router.api_workers,
        "served_model_name": file.served_model_name,
        "max_context": file.max_context,
    }
