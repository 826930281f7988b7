"""Print what an image must install, from pyproject.toml alone: `requirements.py [EXTRA...]`.

The Dockerfiles install this before they copy the sources, so that a change of the sources rebuilds
nothing else. An extra that names others ("stagemesh[stage]") is followed.
"""

from __future__ import annotations

import re
import sys
import tomllib
from pathlib import Path

_OWN_EXTRAS = re.compile(r"stagemesh\[(?P<extras>[^\]]+)\]$")


def requirements(project: dict[str, object], extras: list[str]) -> list[str]:
    """The dependencies of the project and of these extras, each once, in order."""
    optional = project["optional-dependencies"]
    assert isinstance(optional, dict)
    found: list[str] = list(project["dependencies"])  # type: ignore[call-overload]
    waiting = list(extras)
    while waiting:
        name = waiting.pop(0)
        if name not in optional:
            sys.exit(f"error: pyproject.toml has no extra '{name}'; it has {', '.join(optional)}")
        for line in optional[name]:
            own = _OWN_EXTRAS.match(line)
            if own:
                waiting += [extra.strip() for extra in own["extras"].split(",")]
            else:
                found.append(line)
    return list(dict.fromkeys(found))


def main() -> None:
    """Of the pyproject.toml in the folder above this file, or beside it (in an image)."""
    here = Path(__file__).resolve().parent
    file = next(path for path in (here / "pyproject.toml", here.parent / "pyproject.toml") if path.exists())
    print("\n".join(requirements(tomllib.loads(file.read_text())["project"], sys.argv[1:])))


if __name__ == "__main__":
    main()
