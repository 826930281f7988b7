"""Variables that must be set before a worker's CUDA context exists (rule 10 in docs/architecture.md)."""

from __future__ import annotations

import os
import sys
from collections.abc import Mapping
from pathlib import Path

CUDA_VARIABLES = {
    # Kernels of different streams must never queue behind each other in one hardware queue: a receive spins.
    "CUDA_DEVICE_MAX_CONNECTIONS": "32",
    "NCCL_MAX_P2P_NCHANNELS": "2",
    "NCCL_NVLS_ENABLE": "0",
    "TORCH_SYMM_MEM_DISABLE_MULTICAST": "1",
    "NVSHMEM_DISABLE_NVLS": "1",
    "TORCH_NCCL_ASYNC_ERROR_HANDLING": "1",
    "TOKENIZERS_PARALLELISM": "false",
}


def cuda_environment(environment: Mapping[str, str]) -> dict[str, str]:
    """The environment of a CUDA worker: what is set already stays, but for NVLink multicast, which stays off.

    Programs beside the interpreter are found too: FlashInfer compiles with the ninja that pip put there, and whoever starts
    a stage by its path has not activated the environment.
    """
    multicast_off = {
        name: CUDA_VARIABLES[name]
        for name in ("NCCL_NVLS_ENABLE", "TORCH_SYMM_MEM_DISABLE_MULTICAST", "NVSHMEM_DISABLE_NVLS")
    }
    path = os.pathsep.join((environment.get("PATH", os.defpath), str(Path(sys.executable).parent)))
    return {**CUDA_VARIABLES, **environment, **multicast_off, "PATH": path}
