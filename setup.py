"""Makes the gRPC stubs and the CPU kernels when the package is built; everything else is in pyproject.toml."""

from __future__ import annotations

from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_py import build_py

ROOT = Path(__file__).parent
PROTOS = ROOT / "protos"
KERNELS = "stage/stagemesh/stage/native"


def make_stubs() -> None:
    """Write stagemesh/v1/*_pb2.py, .pyi and _pb2_grpc.py beside the protos."""
    from grpc_tools import protoc  # a build requirement only

    files = sorted(str(path.relative_to(ROOT)) for path in PROTOS.glob("stagemesh/v1/*.proto"))
    arguments = ["protoc", "-Iprotos", "--python_out=protos", "--pyi_out=protos", "--grpc_python_out=protos"]
    if protoc.main([*arguments, *files]) != 0:
        raise SystemExit(f"protoc could not make the stubs of {', '.join(files)}; see its message above")


class BuildPy(build_py):
    """build_py, after the stubs are made."""

    def run(self) -> None:
        make_stubs()
        super().run()


setup(
    cmdclass={"build_py": BuildPy},
    ext_modules=[
        Extension(
            "stagemesh.stage.native._kernels",
            [f"{KERNELS}/_kernels.c"],
            depends=[str(path) for path in sorted(Path(KERNELS).glob("*.h"))],
            extra_compile_args=["-O2", "-g0", "-fopenmp"],
            extra_link_args=["-fopenmp"],
            py_limited_api=True,
            optional=True,  # where it cannot be built, products are torch's
        )
    ],
    # One wheel for every Python from 3.11 on.
    options={"bdist_wheel": {"py_limited_api": "cp311"}},
)
