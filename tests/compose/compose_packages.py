"""Debian's packages that the run needs."""

from __future__ import annotations

import os
import shutil

import pytest
from compose_commands import run_again

_PROGRAM_OF_PACKAGE = {
    "docker.io": "dockerd",
    "docker-compose": "docker-compose",
    "debootstrap": "debootstrap",
    "iptables": "iptables",
    "prometheus": "promtool",
}
_TIMEOUT_S = 300.0


def install_missing() -> list[str]:
    """Install those whose program is not there; returns their names. Needs root and apt."""
    missing = [package for package, program in _PROGRAM_OF_PACKAGE.items() if find(program) is None]
    if not missing:
        return []
    if os.geteuid() != 0 or find("apt-get") is None:
        pytest.exit(
            f"this needs {', '.join(missing)}: run it as root on Debian, or install them first", returncode=1
        )
    env = {"DEBIAN_FRONTEND": "noninteractive"}
    # A machine that has just started may be updating itself.
    apt = ["apt-get", "--option", "DPkg::Lock::Timeout=120", "--quiet"]
    run_again([*apt, "update"], timeout_s=_TIMEOUT_S, env=env)
    install = [*apt, "install", "--yes", "--no-install-recommends", *missing]
    run_again(install, timeout_s=_TIMEOUT_S, env=env)
    return missing


def find(program: str) -> str | None:
    """The path of a program, Debian's own before others; administrators' folders count too."""
    return shutil.which(program, path="/usr/bin:/usr/sbin:/bin:/sbin:" + os.environ.get("PATH", ""))
