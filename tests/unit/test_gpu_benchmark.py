"""The command line of benchmarks/gpu.py."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

SCRIPT = Path(__file__).parents[2] / "benchmarks" / "gpu.py"


def run(*options: str) -> subprocess.CompletedProcess[str]:
    # No nvidia-smi: a machine without GPUs.
    environment = {**os.environ, "PATH": ""}
    return subprocess.run(
        [sys.executable, str(SCRIPT), *options], capture_output=True, text=True, check=False, env=environment
    )


def test_a_machine_without_gpus_is_refused_and_nothing_is_written(tmp_path: Path) -> None:
    merged = tmp_path / "gpu.json"
    done = run("--json", "--group", "A,B,C,D", "--merge", str(merged), "--out", str(tmp_path / "out"))
    assert done.returncode == 1
    assert done.stdout == ""
    assert done.stderr.startswith("error: nvidia-smi -L lists no GPU here")
    assert list(tmp_path.iterdir()) == []


def test_groups_that_were_not_asked_for_keep_their_rows(tmp_path: Path) -> None:
    # vLLM is not started by a dry run, which makes this quick.
    merged = tmp_path / "gpu.json"
    done = run("--dry-run", "--runs", "vllm-1x1", "--merge", str(merged), "--out", str(tmp_path / "out"))
    assert done.returncode == 0, done.stderr
    found = json.loads(merged.read_text())["results"]
    assert {row["group"] for row in found} == set("ABCD")
    for row in found:
        assert row["value"] is None
        assert "not run" in row["reference"], row
