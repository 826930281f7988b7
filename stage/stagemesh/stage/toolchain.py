"""What compiles the kernels of a GPU stage at its first start: looked for by the doctor, and by a stage before it loads."""

from __future__ import annotations

import shutil
import sys
import sysconfig
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from stagemesh.wire.errors import StartupError

_CUDA = "/usr/local/cuda"
"""Where FlashInfer looks if nothing else names the toolkit."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Toolchain:
    """Paths of what is there; None for what is not."""

    c_compiler: str | None
    """Triton's, for what launches a kernel."""
    python_headers: str | None
    """Which that includes."""
    cpp_compiler: str | None
    """FlashInfer's, as the next two."""
    nvcc: str | None
    ninja: str | None

    @property
    def lacks_for_triton(self) -> list[str]:
        """Without which no kernel runs."""
        return _missing(
            {"a C compiler (gcc)": self.c_compiler, "Python's headers (python3-dev)": self.python_headers}
        )

    @property
    def lacks_for_flashinfer(self) -> list[str]:
        """Without which attention and the fused all-reduce are the slower ones."""
        return _missing(
            {
                "nvcc (the CUDA toolkit)": self.nvcc,
                "a C++ compiler (g++)": self.cpp_compiler,
                "ninja": self.ninja,
            }
        )


def find_toolchain(environment: Mapping[str, str]) -> Toolchain:
    """As Triton and FlashInfer will look for it in a worker.

    Args:
        environment: Of the stage.
    """
    path = environment.get("PATH")

    def which(*programs: str) -> str | None:
        return next((found for program in programs if (found := shutil.which(program, path=path))), None)

    # Not the default scheme, which on Debian names a folder for headers of local packages.
    header = Path(sysconfig.get_path("include", "posix_prefix")) / "Python.h"
    cuda = environment.get("CUDA_HOME") or environment.get("CUDA_PATH")
    return Toolchain(
        c_compiler=which(environment["CC"]) if environment.get("CC") else which("gcc", "clang"),
        python_headers=str(header.parent) if header.exists() else None,
        cpp_compiler=which(environment.get("CXX") or "c++"),
        nvcc=which(f"{cuda}/bin/nvcc") if cuda else which("nvcc", f"{_CUDA}/bin/nvcc"),
        ninja=which("ninja", str(Path(sys.executable).with_name("ninja"))),
    )


def check_toolchain(environment: Mapping[str, str]) -> None:
    """StartupError if no kernel could be compiled."""
    if missing := find_toolchain(environment).lacks_for_triton:
        raise StartupError(
            f"Triton compiles the kernels of a GPU stage, and there is not {' nor '.join(missing)} here: install what is "
            "missing, or name a compiler in CC"
        )


def _missing(parts: Mapping[str, str | None]) -> list[str]:
    return [name for name, found in parts.items() if found is None]
