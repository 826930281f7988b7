"""The images to build on: Debian by debootstrap, and with it a folder of wheels. Both are made once."""

from __future__ import annotations

import hashlib
import subprocess
import sys
import tempfile
from pathlib import Path

from compose_commands import CommandError, run, run_again
from compose_engine import docker
from compose_packages import find

ROOT = Path(__file__).parents[2]
SUITE = "bookworm"
PYTHON = "3.11"
"""Of that Debian."""
BASE = f"stagemesh-base:{SUITE}"
_PACKAGES = "python3,python3-venv,python3-pip,ca-certificates"
_LEFT_OUT = (
    "./dev/*",
    "./proc/*",
    "./sys/*",
    "./var/cache/apt/*",
    "./var/lib/apt/lists/*",
    "./usr/share/doc/*",
    "./usr/share/man/*",
    "./usr/share/locale/*",
)
_BUILD_TOOLS = ("setuptools>=77", "grpcio-tools")


def base_image() -> str:
    """A small Debian with Python, from the mirror that apt uses; its name."""
    if not _exists(BASE):
        with tempfile.TemporaryDirectory(prefix="stagemesh-base-", dir="/var/tmp") as folder:
            root = Path(folder, "root")
            command = ["debootstrap", "--variant=minbase", f"--include={_PACKAGES}", SUITE, root, *_mirror()]
            try:
                run_again(["sh", "-c", 'rm -rf "$0"; exec "$@"', root, *command], timeout_s=480)
                _import(root)
            finally:  # what an interrupted debootstrap leaves mounted must not be emptied with the folder
                for name in ("proc", "sys", "dev/pts", "dev"):
                    run(["umount", "--lazy", root / name], timeout_s=30, check=False)
    return BASE


def build_image(base: str) -> str:
    """`base` with every wheel that the images install; the name says which."""
    requirements = run(
        [sys.executable, ROOT / "compose/requirements.py", "router", "stage"], timeout_s=30
    ).stdout
    wanted = "\n".join([requirements, *_BUILD_TOOLS, ""])
    constraints = ROOT / "constraints-dev.txt"
    base_id = docker("image", "inspect", "--format", "{{.Id}}", base)
    digest = hashlib.sha256("\0".join([wanted, constraints.read_text(), base_id]).encode()).hexdigest()
    name = f"stagemesh-build:{digest[:12]}"
    if not _exists(name):
        with tempfile.TemporaryDirectory(prefix="stagemesh-wheels-", dir="/var/tmp") as folder:
            wheels = Path(folder, "wheels")
            listed = Path(folder, "requirements.txt")
            listed.write_text(wanted)
            pip = [sys.executable, "-m", "pip", "--disable-pip-version-check", "download", "--quiet"]
            pip += ["--only-binary", ":all:", "--python-version", PYTHON, "--dest", str(wheels)]
            run_again([*pip, "--constraint", constraints, "--requirement", listed], timeout_s=600)
            file = ROOT / "compose/Dockerfile.build"
            docker(
                *(
                    "build",
                    "--quiet",
                    "--file",
                    file,
                    "--build-arg",
                    f"BASE_IMAGE={base}",
                    "--tag",
                    name,
                    wheels,
                ),
                timeout_s=300,
            )
    return name


def size_mb(image: str) -> float:
    """What an image weighs, unpacked."""
    return int(docker("image", "inspect", "--format", "{{.Size}}", image)) / 1e6


def _exists(image: str) -> bool:
    return bool(docker("image", "ls", "--quiet", image).strip())


def _mirror() -> list[str]:
    """The address that apt has for Debian; none: debootstrap's own."""
    targets = run(
        ["apt-get", "indextargets", "--format", "$(REPO_URI)", "Created-By: Packages"], timeout_s=30
    )
    return targets.stdout.split()[:1]


def _import(root: Path) -> None:
    excludes = [f"--exclude={path}" for path in _LEFT_OUT]
    with subprocess.Popen(["tar", "-C", str(root), *excludes, "-c", "."], stdout=subprocess.PIPE) as tar:
        done = subprocess.run(
            [find("docker") or "docker", "import", "-", BASE],
            stdin=tar.stdout,
            capture_output=True,
            text=True,
            timeout=300,
            check=False,
        )
    if tar.returncode != 0 or done.returncode != 0:
        raise CommandError(f"docker import of {root} failed: {done.stderr.strip()} (tar: {tar.returncode})")
