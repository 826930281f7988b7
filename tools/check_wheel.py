"""Check that a wheel holds what must be in it: every package, the stubs, the protos and the type markers."""

from __future__ import annotations

import sys
import zipfile
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
KERNELS = "stagemesh/stage/native/_kernels.abi3.so"
"""There if the wheel was built with a C compiler."""
ROOTS = ("protos", "router", "stage", "client")


def expected() -> set[str]:
    """Paths inside the wheel: every source of the four roots, and three stubs for each proto."""
    names: set[str] = set()
    for root in ROOTS:
        base = ROOT / root
        for pattern in ("*.py", "*.proto", "py.typed", "_kernels.pyi", "*.cu"):
            names |= {path.relative_to(base).as_posix() for path in base.rglob(pattern)}
    for proto in [name for name in names if name.endswith(".proto")]:
        stem = proto.removesuffix(".proto")
        names |= {f"{stem}_pb2.py", f"{stem}_pb2.pyi", f"{stem}_pb2_grpc.py"}
    return names


def main() -> None:
    """Exit 1 with a line for each path that is missing."""
    if len(sys.argv) != 2:
        sys.exit(f"usage: {sys.argv[0]} stagemesh-VERSION-*.whl")
    with zipfile.ZipFile(sys.argv[1]) as wheel:
        there = set(wheel.namelist())
    wanted = expected()
    missing = sorted(wanted - there)
    for name in missing:
        print(f"error: {name} is not in the wheel", file=sys.stderr)
    foreign = sorted(name for name in there - wanted if ".dist-info/" not in name and name != KERNELS)
    for name in foreign:
        print(f"error: {name} is in the wheel and in no root", file=sys.stderr)
    if missing or foreign:
        sys.exit(1)
    kernels = "and the compiled kernels" if KERNELS in there else "without compiled kernels"
    print(f"the wheel has all {len(wanted)} files, {kernels}")


if __name__ == "__main__":
    main()
