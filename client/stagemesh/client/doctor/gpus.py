"""GPUs, their driver, NCCL, and what compiles kernels, as far as the node has them."""

from __future__ import annotations

import os
import shutil
import socket
import subprocess
from dataclasses import asdict

from stagemesh.client.doctor.finding import Finding, Level, Value
from stagemesh.client.doctor.versions import installed_version
from stagemesh.stage.toolchain import find_toolchain

_QUERY = "index,name,memory.total,memory.used,driver_version"
_TIMEOUT_S = 20.0
_BUSY_SHARE = 0.1
_NCCL_PACKAGES = ("nvidia-nccl-cu13", "nvidia-nccl-cu12")


def check_gpus(role: str, *, wanted: bool) -> list[Finding]:
    """What nvidia-smi lists, and whether NCCL, cupy and compilers are there for them.

    Args:
        role: Only a stage uses GPUs.
        wanted: Whether having none is a failure.
    """
    if role != "stage":
        return []
    rows, problem = _query()
    if not rows:
        level = Level.FAIL if wanted else Level.OK
        todo = "install the driver, or start this stage with --device cpu" if wanted else ""
        return [Finding(check="GPUs", level=level, found=problem or "none", todo=todo, values={"gpus": 0})]
    return [_devices(rows), _kernels(), _nccl(), *_socket_interface()]


def has_gpus() -> bool:
    """Whether nvidia-smi lists any."""
    return bool(_query()[0])


def _query() -> tuple[list[list[str]], str]:
    """Rows of nvidia-smi, or why there are none."""
    program = shutil.which("nvidia-smi")
    if program is None:
        return [], "none (no nvidia-smi)"
    command = [program, f"--query-gpu={_QUERY}", "--format=csv,noheader,nounits"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=_TIMEOUT_S, check=False)
    except (OSError, subprocess.TimeoutExpired) as error:
        return [], f"nvidia-smi does not answer: {error}"
    if done.returncode != 0:
        return [], f"nvidia-smi fails: {' '.join((done.stdout + done.stderr).split())}"
    rows = [[cell.strip() for cell in line.split(",")] for line in done.stdout.splitlines() if line.strip()]
    return [row for row in rows if len(row) == len(_QUERY.split(","))], ""


def _devices(rows: list[list[str]]) -> Finding:
    found = ", ".join(f"{index}: {name} {total} MiB ({used} used)" for index, name, total, used, _ in rows)
    driver = rows[0][4]
    busy = [row[0] for row in rows if _number(row[3]) > _BUSY_SHARE * _number(row[2])]
    values: dict[str, Value] = {"gpus": len(rows), "driver": driver, "busy": ", ".join(busy)}
    if busy:
        todo = f"end what uses the memory of {', '.join(busy)} (nvidia-smi), or lower --memory-share"
        return Finding(
            check="GPUs", level=Level.WARN, found=f"{found}; driver {driver}", todo=todo, values=values
        )
    return Finding(check="GPUs", level=Level.OK, found=f"{found}; driver {driver}", values=values)


def _kernels() -> Finding:
    tools = find_toolchain(os.environ)
    flashinfer = installed_version("flashinfer-python")
    found = f"FlashInfer {flashinfer}" if flashinfer else "no FlashInfer"
    values: dict[str, Value] = {"flashinfer": flashinfer, **asdict(tools)}
    missing = [*tools.lacks_for_triton, *tools.lacks_for_flashinfer]
    found += f"; there is not {' nor '.join(missing)}" if missing else f"; {tools.c_compiler}, {tools.nvcc}"
    if tools.lacks_for_triton:
        todo = "install them: a stage compiles its kernels when it first starts (compose/Dockerfile.gpu-base has all)"
        return Finding(check="kernels", level=Level.FAIL, found=found, todo=todo, values=values)
    if missing or not flashinfer:
        todo = "install what is missing and 'stagemesh[cuda]': without FlashInfer attention is slower"
        return Finding(check="kernels", level=Level.WARN, found=found, todo=todo, values=values)
    return Finding(check="kernels", level=Level.OK, found=found, values=values)


def _nccl() -> Finding:
    cupy = installed_version("cupy-cuda13x")
    nccl = next(
        (f"{name} {version}" for name in _NCCL_PACKAGES if (version := installed_version(name))), None
    )
    found = f"{nccl or 'no NCCL package'}, {f'cupy {cupy}' if cupy else 'no cupy'}"
    values = {"nccl": nccl, "cupy": cupy}
    if nccl and cupy:
        return Finding(check="NCCL", level=Level.OK, found=found, values=values)
    todo = "pip install 'stagemesh[cuda]': without it links between stages go over gRPC"
    return Finding(check="NCCL", level=Level.WARN, found=found, todo=todo, values=values)


def _socket_interface() -> list[Finding]:
    """NCCL_SOCKET_IFNAME, if it is set: a name that no interface has makes NCCL fail late and unclearly."""
    wanted = os.environ.get("NCCL_SOCKET_IFNAME", "")
    if not wanted or wanted.startswith("^"):
        return []
    names = [name for _, name in socket.if_nameindex()]
    exact = wanted.startswith("=")
    patterns = [part for part in wanted.removeprefix("=").split(",") if part]
    fits = [name for name in names for p in patterns if (name == p if exact else name.startswith(p))]
    if fits:
        found = f"NCCL_SOCKET_IFNAME={wanted} is {', '.join(fits)}"
        return [Finding(check="NCCL interface", level=Level.OK, found=found)]
    return [
        Finding(
            check="NCCL interface",
            level=Level.FAIL,
            found=f"NCCL_SOCKET_IFNAME={wanted} fits none of {', '.join(names)}",
            todo="name the interface by which the peers are reached (see their route below)",
        )
    ]


def _number(text: str) -> float:
    try:
        return float(text)
    except ValueError:  # "[N/A]", as on devices with shared memory
        return 0.0
