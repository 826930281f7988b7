"""Python and the packages that a role needs."""

from __future__ import annotations

import re
import sys
from importlib import metadata

from stagemesh.client.doctor.finding import Finding, Level

ROLES = ("stage", "router", "client")
_OLDEST, _FIRST_TOO_NEW = (3, 11), (3, 13)
"""As pyproject.toml says, which is not installed; a test holds the two equal."""
_NAME = re.compile(r"[A-Za-z0-9._-]+")
_EXTRA = re.compile(r"extra\s*==\s*['\"](?P<extra>[\w-]+)['\"]")
_SHOWN = ("grpcio", "protobuf", "torch", "cupy-cuda13x", "numpy", "opentelemetry-sdk", "uvloop", "pyzmq")


def guess_role() -> str:
    """The most that is installed here."""
    return next((role for role in ROLES if not missing_packages(role)), "client")


def check_versions(role: str) -> list[Finding]:
    """The interpreter, stagemesh, and what the role needs."""
    return [_python(), _packages(role)]


def missing_packages(role: str) -> list[str]:
    """Packages that the role needs and that are not installed."""
    return [name for name in needed_packages(role) if installed_version(name) is None]


def needed_packages(role: str) -> list[str]:
    """Names of what stagemesh itself says it depends on, with the extra of the role."""
    needed = []
    for line in metadata.requires("stagemesh") or []:
        extra = _EXTRA.search(line)
        name = _NAME.match(line)
        if name and (extra is None or extra["extra"] == role):
            needed.append(name[0])
    return list(dict.fromkeys(needed))


def installed_version(package: str) -> str | None:
    """Its version; None if it is not installed. Nothing is imported."""
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def _python() -> Finding:
    version = ".".join(map(str, sys.version_info[:3]))
    if _OLDEST <= sys.version_info[:2] < _FIRST_TOO_NEW:
        return Finding(check="python", level=Level.OK, found=version, values={"version": version})
    return Finding(
        check="python",
        level=Level.FAIL,
        found=version,
        todo="install Python 3.11 or 3.12 and stagemesh in it",
        values={"version": version},
    )


def _packages(role: str) -> Finding:
    versions = {name: version for name in _SHOWN if (version := installed_version(name))}
    listed = ", ".join(f"{name} {version}" for name, version in versions.items())
    found = f"stagemesh {metadata.version('stagemesh')} as a {role}; {listed}"
    missing = missing_packages(role)
    if not missing:
        return Finding(check="packages", level=Level.OK, found=found, values=dict(versions))
    extra = "" if role == "client" else f"[{role}]"
    return Finding(
        check="packages",
        level=Level.FAIL,
        found=f"{found}; not installed: {', '.join(missing)}",
        todo=f"pip install 'stagemesh{extra}'",
        values={**versions, "missing": ", ".join(missing)},
    )
