"""Build the device kit: wheels that a GPU machine without a package registry needs, and stagemesh's own.

The image of such a machine is taken to hold what tools/device-image.txt lists. What stagemesh[router,cuda] and
the pins of tools/device-kit.txt need beyond that is found by following the wheels' own metadata, so that a
dependency added to pyproject.toml is in the next kit. Wheels already there are kept; stagemesh's is
built anew each time. On the machine: `sh install.sh TARGET`.
"""

from __future__ import annotations

import argparse
import email.parser
import shutil
import subprocess
import sys
import tomllib
import zipfile
from collections.abc import Iterable
from pathlib import Path

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name, parse_wheel_filename

ROOT = Path(__file__).resolve().parent.parent
EXTRAS = ("router", "cuda")
LIMIT_MB = 25.0
PYTHON = "3.12"
# pip takes a platform literally: a wheel for an older glibc must be named as such.
PLATFORMS = [f"manylinux_2_{minor}_x86_64" for minor in (39, 38, 36, 35, 34, 31, 28, 27, 26, 24, 17, 12, 5)]
PLATFORMS += ["manylinux2014_x86_64", "manylinux2010_x86_64", "manylinux1_x86_64"]
MARKERS = {
    "python_version": PYTHON,
    "python_full_version": f"{PYTHON}.3",
    "implementation_name": "cpython",
    "platform_python_implementation": "CPython",
    "sys_platform": "linux",
    "platform_system": "Linux",
    "platform_machine": "x86_64",
    "os_name": "posix",
}
# FlashInfer names these for kernels that stagemesh does not call; it imports without them.
NOT_WANTED = {"cuda-tile", "nvidia-cudnn-frontend", "nvidia-cutlass-dsl"}

INSTALL = """\
#!/bin/sh
# Install this kit without a registry: into TARGET, a folder for PYTHONPATH, or without one into $PYTHON's own
# environment. Then say what is missing, if anything.
set -eu
kit=$(cd "$(dirname "$0")" && pwd)
python=${PYTHON:-python3}
"$python" -m pip --disable-pip-version-check install --quiet --no-index --find-links "$kit" --no-deps \\
    --no-compile --no-cache-dir --upgrade --root-user-action ignore ${1:+--target "$1"} "$kit"/*.whl
[ $# -eq 0 ] || export PYTHONPATH="$1${PYTHONPATH:+:$PYTHONPATH}"
"$python" "$kit/check.py"
[ $# -eq 0 ] || echo "export PYTHONPATH=$PYTHONPATH PATH=$1/bin:\\$PATH"
"""

CHECK = '''\
"""Is everything that stagemesh[router,cuda] needs here, in a version that it takes?"""

import importlib.metadata
import sys

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name


def wanted(name, extras, seen):
    """Lines for what `name` needs and this environment lacks."""
    for text in importlib.metadata.requires(name) or ():
        need = Requirement(text)
        if need.marker and not any(need.marker.evaluate({"extra": extra}) for extra in ("", *extras)):
            continue
        key = canonicalize_name(need.name)
        if key == "stagemesh":
            yield from wanted(key, tuple(need.extras), seen)
            continue
        try:
            version = importlib.metadata.version(need.name)
        except importlib.metadata.PackageNotFoundError:
            yield f"{name} needs {need}: not there"
            continue
        if not need.specifier.contains(version, prereleases=True):
            yield f"{name} needs {need}: {version} is there"


missing = sorted(set(wanted("stagemesh", ("router", "cuda"), set())))
for line in missing:
    print("error:", line, file=sys.stderr)
print(f"stagemesh {importlib.metadata.version('stagemesh')} on Python {sys.version.split()[0]}:",
      f"{len(missing)} needs unmet" if missing else "everything it needs is here")
sys.exit(1 if missing else 0)
'''


def read_requirements(path: Path) -> list[Requirement]:
    """The lines of a requirements file that are not comments."""
    lines = (line.partition("#")[0].strip() for line in path.read_text().splitlines())
    return [Requirement(line) for line in lines if line]


def stagemesh_requirements() -> list[Requirement]:
    """What stagemesh[router,cuda] needs, by pyproject.toml."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    found = [Requirement(text) for text in project["dependencies"]]
    open_extras, seen = list(EXTRAS), set()
    while open_extras:
        extra = open_extras.pop()
        if extra in seen:
            continue
        seen.add(extra)
        for need in map(Requirement, project["optional-dependencies"][extra]):
            if canonicalize_name(need.name) == "stagemesh":
                open_extras += need.extras
            else:
                found.append(need)
    return found


def needs_of(wheel: Path) -> list[Requirement]:
    """What a wheel needs on the GPU machine, its extras left aside."""
    with zipfile.ZipFile(wheel) as archive:
        name = next(n for n in archive.namelist() if n.endswith(".dist-info/METADATA"))
        metadata = email.parser.BytesParser().parsebytes(archive.read(name))
    needs = [Requirement(text) for text in metadata.get_all("Requires-Dist", [])]
    return [need for need in needs if need.marker is None or need.marker.evaluate({**MARKERS, "extra": ""})]


def pip(*arguments: str) -> None:
    """Run pip; exits with what went wrong."""
    command = [sys.executable, "-m", "pip", "--disable-pip-version-check", *arguments]
    done = subprocess.run(command, check=False, capture_output=True, text=True)
    if done.returncode != 0:
        errors = [line for line in done.stderr.splitlines() if "is ignored: it is neither" not in line]
        sys.exit("error: " + " ".join(command) + "\n" + "\n".join(errors))


def download(needs: Iterable[str], folder: Path) -> None:
    """Fetch wheels for the GPU machine's Python, without what they need in turn."""
    arguments = ["download", "--quiet", "--no-deps", "--only-binary", ":all:", "--dest", str(folder)]
    arguments += ["--python-version", PYTHON, "--implementation", "cp"]
    for platform in PLATFORMS:
        arguments += ["--platform", platform]
    pip(*arguments, *needs)


def wheels_of(folder: Path) -> dict[str, Path]:
    """The wheels of a folder by their canonical name; a second version of one is an error."""
    found: dict[str, Path] = {}
    for path in sorted(folder.glob("*.whl")):
        name = parse_wheel_filename(path.name)[0]
        if name in found:
            sys.exit(f"error: two wheels of {name}: {found[name].name}, {path.name}; remove {folder}")
        found[name] = path
    return found


def accepts(need: Requirement, wheel: Path) -> bool:
    """Does the version of `wheel` satisfy `need`?"""
    return need.specifier.contains(parse_wheel_filename(wheel.name)[1], prereleases=True)


def wanted_by(roots: list[Requirement], have: dict[str, Path]) -> dict[str, list[Requirement]]:
    """All that is needed by name: `roots`, and what the wheels at hand need in turn."""
    wanted: dict[str, list[Requirement]] = {}
    open_needs = list(roots)
    while open_needs:
        need = open_needs.pop()
        name = canonicalize_name(need.name)
        known = wanted.setdefault(name, [])
        if not known and name in have:
            open_needs += needs_of(have[name])
        if str(need) not in map(str, known):
            known.append(need)
    return wanted


def gather(folder: Path, image: dict[str, Requirement]) -> None:
    """Download until everything that is needed is in the folder or on the image."""
    pinned = read_requirements(ROOT / "tools" / "device-kit.txt")
    not_packed = NOT_WANTED | (set(image) - {canonicalize_name(need.name) for need in pinned})
    while True:
        have = wheels_of(folder)
        wanted = wanted_by([*stagemesh_requirements(), *pinned], have)
        missing = []
        for name in set(wanted) - not_packed:
            if name in have and all(accepts(need, have[name]) for need in wanted[name]):
                continue
            if name in have:
                have[name].unlink()
            missing.append(name + ",".join(str(need.specifier) for need in wanted[name] if need.specifier))
        if not missing:
            break
        print("downloading", " ".join(sorted(missing)), file=sys.stderr, flush=True)
        download(missing, folder)
    for name in set(have) - set(wanted) - {"stagemesh"}:
        have[name].unlink()
    for name in set(wanted) & set(image) & not_packed:
        for pin in image[name].specifier:
            for need in wanted[name]:
                if not need.specifier.contains(pin.version, prereleases=True):
                    sys.exit(f"error: {need} is needed and the image is listed with {name} {pin.version}")


def build_stagemesh(folder: Path) -> None:
    """Build stagemesh's wheel of this tree, its stubs in it."""
    for old in folder.glob("stagemesh-*.whl"):
        old.unlink()
    # setuptools packs whatever an earlier build left in build/lib.
    _remove_leftovers()
    pip("wheel", "--quiet", "--no-deps", "--wheel-dir", str(folder), str(ROOT))
    _remove_leftovers()


def _remove_leftovers() -> None:
    for leftovers in (ROOT / "build").glob("lib*"):
        shutil.rmtree(leftovers)


def main() -> None:
    """Gather, build, check the size and print what is in the kit."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path, nargs="?", default=ROOT / "build" / "device-kit")
    folder: Path = parser.parse_args().folder
    folder.mkdir(parents=True, exist_ok=True)
    image = {
        canonicalize_name(need.name): need for need in read_requirements(ROOT / "tools" / "device-image.txt")
    }
    gather(folder, {str(name): need for name, need in image.items()})
    build_stagemesh(folder)
    (folder / "install.sh").write_text(INSTALL)
    (folder / "check.py").write_text(CHECK)
    wheels = wheels_of(folder)
    for name, path in sorted(wheels.items()):
        print(f"{name:<44} {parse_wheel_filename(path.name)[1]!s:<12} {path.stat().st_size / 1e6:8.2f} MB")
    total = sum(path.stat().st_size for path in wheels.values()) / 1e6
    print(f"{'in all':<44} {len(wheels):<12} {total:8.2f} MB in {folder}")
    if total > LIMIT_MB:
        sys.exit(f"error: the kit has {total:.2f} MB; at most {LIMIT_MB:g} MB are meant to travel")


if __name__ == "__main__":
    main()
