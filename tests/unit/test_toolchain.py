"""What a GPU stage compiles its kernels with is found as Triton and FlashInfer find it, or named."""

from __future__ import annotations

import sysconfig
from pathlib import Path

import pytest

from stagemesh.stage.toolchain import check_toolchain, find_toolchain
from stagemesh.wire.errors import StartupError


@pytest.fixture
def programs(tmp_path: Path) -> Path:
    folder = tmp_path / "bin"
    folder.mkdir()
    for name in ("gcc", "clang", "c++", "nvcc", "ninja", "cc-of-mine"):
        (folder / name).write_text("#!/bin/sh\n")
        (folder / name).chmod(0o755)
    return folder


def test_all_of_it_is_found(programs: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "Python.h").touch()
    monkeypatch.setattr(sysconfig, "get_path", lambda name, scheme: str(tmp_path))
    tools = find_toolchain({"PATH": str(programs)})
    assert tools.lacks_for_triton == tools.lacks_for_flashinfer == []
    assert (tools.c_compiler, tools.nvcc) == (f"{programs}/gcc", f"{programs}/nvcc")
    check_toolchain({"PATH": str(programs)})


def test_names_in_the_environment_win(programs: Path) -> None:
    environment = {"PATH": str(programs), "CC": "cc-of-mine", "CXX": "/no/such", "CUDA_HOME": "/no/such"}
    tools = find_toolchain(environment)
    assert tools.c_compiler == f"{programs}/cc-of-mine"
    assert tools.cpp_compiler is None
    assert tools.nvcc is None, "FlashInfer takes CUDA_HOME at its word"


def test_a_toolkit_is_found_by_its_home(programs: Path) -> None:
    tools = find_toolchain({"PATH": "/nowhere", "CUDA_HOME": str(programs.parent)})
    assert tools.nvcc == f"{programs}/nvcc"


def test_a_stage_that_could_compile_no_kernel_says_what_is_missing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sysconfig, "get_path", lambda name, scheme: str(tmp_path))
    with pytest.raises(
        StartupError, match=r"not a C compiler \(gcc\) nor Python's headers \(python3-dev\) here"
    ):
        check_toolchain({"PATH": str(tmp_path)})
