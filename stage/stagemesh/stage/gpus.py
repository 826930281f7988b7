"""The GPUs of this host, asked of the driver itself: no torch, and no context that would take memory."""

from __future__ import annotations

import ctypes
import logging
import time
import uuid
from dataclasses import dataclass

from stagemesh.wire.errors import ConfigError

log = logging.getLogger(__name__)

SETTLE_S, SETTLE_STEP_S = 5.0, 0.25
"""How long, and how often, memory that shrinks is looked at: the driver takes a moment to free what an ended process held."""


@dataclass(frozen=True, slots=True)
class Gpu:
    """One GPU, as CUDA_VISIBLE_DEVICES lets it be seen."""

    index: int
    name: str
    total_bytes: int
    uuid: str = ""
    """As CUDA has it, without the prefix that tells a whole GPU from a part of one."""


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


def memory_in_use(gpus: tuple[Gpu, ...]) -> tuple[int, ...]:
    """Bytes of each GPU that processes hold, asked of NVML; zeros, and a line in the log, where it does not tell."""
    try:
        nvml = ctypes.CDLL("libnvidia-ml.so.1")
    except OSError:
        return _unknown(gpus, "there is no libnvidia-ml.so.1")
    if code := nvml.nvmlInit_v2():
        return _unknown(gpus, f"nvmlInit says {code}")
    try:
        return tuple(_in_use(nvml, gpu) for gpu in gpus)
    except OSError as error:
        return _unknown(gpus, str(error))
    finally:
        nvml.nvmlShutdown()


def settled_memory_in_use(gpus: tuple[Gpu, ...], harmless_share: float) -> tuple[int, ...]:
    """The same, looked at again for as long as it becomes less.

    Args:
        gpus: To be asked about.
        harmless_share: Of a GPU's memory; where nobody holds more, the first look will do.
    """
    held, deadline = memory_in_use(gpus), time.monotonic() + SETTLE_S
    while time.monotonic() < deadline and any(
        used > harmless_share * gpu.total_bytes for used, gpu in zip(held, gpus, strict=True)
    ):
        time.sleep(SETTLE_STEP_S)
        before, held = held, memory_in_use(gpus)
        if not any(now < then for now, then in zip(held, before, strict=True)):
            break
    return held


class _NvmlMemory(ctypes.Structure):
    """nvmlMemory_t, bytes."""

    _fields_ = (("total", ctypes.c_ulonglong), ("free", ctypes.c_ulonglong), ("used", ctypes.c_ulonglong))


def _in_use(nvml: ctypes.CDLL, gpu: Gpu) -> int:
    """By its UUID: NVML counts GPUs without regard to CUDA_VISIBLE_DEVICES. OSError if it does not tell."""
    handle, memory = ctypes.c_void_p(), _NvmlMemory()
    code = nvml.nvmlDeviceGetHandleByUUID(f"GPU-{gpu.uuid}".encode(), ctypes.byref(handle))
    if code:
        code = nvml.nvmlDeviceGetHandleByUUID(f"MIG-{gpu.uuid}".encode(), ctypes.byref(handle))
    code = code or nvml.nvmlDeviceGetMemoryInfo(handle, ctypes.byref(memory))
    if code:
        raise OSError(f"NVML says {code} of GPU {gpu.index} ({gpu.uuid})")
    # Not its `used`, which has what the driver keeps for itself: CUDA's total is without that.
    return max(0, gpu.total_bytes - int(memory.free))


def _unknown(gpus: tuple[Gpu, ...], why: str) -> tuple[int, ...]:
    log.warning("what other processes hold of the GPUs' memory is not known, and not counted: %s", why)
    return (0,) * len(gpus)


def _ask(driver: ctypes.CDLL, index: int) -> Gpu:
    device, name, total = ctypes.c_int(), ctypes.create_string_buffer(100), ctypes.c_size_t()
    identity = (ctypes.c_ubyte * 16)()
    driver.cuDeviceGet(ctypes.byref(device), index)
    driver.cuDeviceGetName(name, len(name), device)
    driver.cuDeviceTotalMem_v2(ctypes.byref(total), device)
    driver.cuDeviceGetUuid_v2(ctypes.byref(identity), device)
    return Gpu(index, name.value.decode(), total.value, str(uuid.UUID(bytes=bytes(identity))))
