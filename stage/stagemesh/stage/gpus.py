"""The GPUs of this host, asked of the driver itself: no torch, and no context that would take memory."""

from __future__ import annotations

import ctypes
from dataclasses import dataclass

from stagemesh.wire.errors import ConfigError


@dataclass(frozen=True, slots=True)
class Gpu:
    """One GPU, as CUDA_VISIBLE_DEVICES lets it be seen."""

    index: int
    name: str
    total_bytes: int


def list_gpus() -> tuple[Gpu, ...]:
    """Every GPU; none without a driver."""
    try:
        driver = ctypes.CDLL("libcuda.so.1")
    except OSError:
        return ()
    if driver.cuInit(0):
        return ()
    count = ctypes.c_int()
    if driver.cuDeviceGetCount(ctypes.byref(count)):
        return ()
    return tuple(_ask(driver, index) for index in range(count.value))


def pick_gpus(wanted: str, ranks: int, gpus: tuple[Gpu, ...]) -> tuple[Gpu, ...]:
    """The GPU of each rank.

    Args:
        wanted: Indexes, such as "2,3"; empty: the first ones.
        ranks: How many.
        gpus: Those there are.
    """
    indexes = [part.strip() for part in wanted.split(",")] if wanted else [str(rank) for rank in range(ranks)]
    if not all(index.isdigit() for index in indexes):
        raise ConfigError(f"--gpus: '{wanted}' is not a list of indexes; expected such as 0 or 2,3")
    if len(indexes) != ranks:
        raise ConfigError(f"--gpus: '{wanted}' names {len(indexes)} GPUs for {ranks} ranks (--tp)")
    for index in indexes:
        if int(index) >= len(gpus):
            raise ConfigError(
                f"--device cuda: there is no GPU {index} here, only {len(gpus)}; see --gpus, --tp and CUDA_VISIBLE_DEVICES"
            )
    return tuple(gpus[int(index)] for index in indexes)


def _ask(driver: ctypes.CDLL, index: int) -> Gpu:
    device, name, total = ctypes.c_int(), ctypes.create_string_buffer(100), ctypes.c_size_t()
    driver.cuDeviceGet(ctypes.byref(device), index)
    driver.cuDeviceGetName(name, len(name), device)
    driver.cuDeviceTotalMem_v2(ctypes.byref(total), device)
    return Gpu(index, name.value.decode(), total.value)
